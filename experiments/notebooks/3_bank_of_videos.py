# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A bank of your own videos: searched, edited, used
#
# A bank is a table of captions, their vectors, your own columns and where each video's record is. This notebook makes
# one, searches it by words and by your columns, adds and removes videos, goes back to an older version, and gives what
# it finds to the frozen model as a memory.
#
# It uses the tiny model, which runs everywhere; `CONFIG = "wan"` with converted weights (notebook 2) does the same.
# Under each cell stands what it took. **The outputs kept here are of `SMALL` on two CPU cores that other work shared;
# there the memory is trained for a few steps only, and has learned nothing.**

# %% tags=["parameters"]
import os

SMALL = "DITMEM_SMALL" in os.environ  # True: the least sizes, the tiny weights, no download
DRIVE = False  # True, on Colab: what is made lies in your Google Drive, and is found there after a reconnect
EXTRA = ""  # what this notebook needs of the package beside the chip's part
ADDRESS = ""  # of the repository, as "git+https://..."; empty: the package index has a release

# %% [markdown]
# The next cell installs the package with its own JAX, which is newer than Colab's. Where that replaces what the kernel
# has imported already, the runtime restarts by itself: then choose *Run all* once more. Nothing is installed twice.

# %%
import glob
import importlib.util
import shutil
import subprocess
import sys
from importlib import metadata


def versions():
    """Of all packages that this kernel has imported from."""
    importlib.invalidate_caches()
    owners = metadata.packages_distributions()
    modules = {name.partition(".")[0] for name in list(sys.modules)}
    return {owner: metadata.version(owner) for name in modules for owner in owners.get(name, ())}


if importlib.util.find_spec("ditmem_jax") is None:
    on_tpu = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*")
    chip = "tpu" if on_tpu else "cuda" if shutil.which("nvidia-smi") else ""
    wanted = f"ditmem_jax[{','.join(filter(None, [chip, EXTRA]))}]" + (f" @ {ADDRESS}" if ADDRESS else "")
    before = versions()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)
    if {name: version for name, version in versions().items() if name in before} != before:
        print("The runtime restarts with the new packages: choose Run all once more.")
        get_ipython().kernel.do_shutdown(True)

# %%
from pathlib import Path

import ditmem_jax as dm
from ditmem_jax.data.video import read_video
from ditmem_jax.report.notebook import show, tell_costs

tell_costs()
if DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")

OUT = ("/content/drive/MyDrive/" if DRIVE else "") + "ditmem/bank"
os.environ["OUT"] = OUT  # for the commands
Path(OUT).mkdir(parents=True, exist_ok=True)

# %%
CONFIG = "tiny"
config = dm.load_config(CONFIG, {"data.bank": f"{OUT}/bank", "data.references": 3})
os.environ["CONFIG"] = CONFIG

# %% [markdown]
# ## Videos
# `captions.csv` has the columns `video` and `caption`, `source` (the film that a clip was cut from) if you like, and
# any others, to search by. Put your own beside your videos. Without one, clips of two made-up planets take their place:
# the constants of each planet are columns.

# %% language="bash"
# test -e $OUT/videos/captions.csv || ditmem worlds --split=train --worlds=2 --clips=12 --out=$OUT/videos
# head -n 3 $OUT/videos/captions.csv

# %%
summary = dm.encode_videos(config, f"{OUT}/records", f"{OUT}/videos/videos", f"{OUT}/videos/captions.csv")
print(summary, summary.skipped)
videos = Path(OUT, "videos/videos")
show(*(read_video(path).frames for path in sorted(videos.glob("*.mp4"))[:6]))

# %% [markdown]
# ## Search
# By words; by default each caption is a vector of its words, and a text model of sentence-transformers can take their
# place (`dm.Bank.build(..., embedder="sentence-transformers:NAME")`, extra `retrieval`).

# %%
from ditmem_jax.bank.table import Table

bank_exists = Table.exists(f"{OUT}/bank")
bank = dm.Bank.open(f"{OUT}/bank") if bank_exists else dm.Bank.build(f"{OUT}/bank", f"{OUT}/records")


def look(found):
    for video, score in zip(found.rows[0], found.scores[0]):
        print(f"{score:.3f}  {video['id']}  gravity {float(video['gravity']):.1f}  {video['caption']}")
    return show(*(read_video(videos / name).frames for name in found.ids[0]))


look(bank.search(["a ball drops and bounces"], k=3))

# %% [markdown]
# By your own columns, with a filter in SQL; and by a video: its own vector is a query too.

# %%
look(bank.search(["a ball drops and bounces"], k=3, where="gravity > 4 AND phenomenon <> 'fall'"))

# %%
first = bank.search(["a ball on a spring"], k=1)
look(bank.search(bank.vectors(first.places[0]), k=3))

# %% [markdown]
# ## Edit
# Every change is one commit. What is added or removed counts at once, without training; old versions can be opened.

# %%
before, version = len(bank), bank.version
bank.remove(where="phenomenon = 'collision'")
print(f"{before} videos before, {len(bank)} now")
old = dm.Bank.open(f"{OUT}/bank", version=version)
print(f"version {version} still has {len(old)}")

# %% [markdown]
# The records are still there, so the same videos can be added again: rows that the bank holds are left out.

# %% language="bash"
# ditmem bank versions --bank $OUT/bank

# %%
import pyarrow.compute as pc

from ditmem_jax.bank.rows import rows_of_records

rows = rows_of_records([f"{OUT}/records"])
known = bank.table.rows(columns=["id"])["id"].combine_chunks()
bank.add(rows.filter(pc.invert(pc.is_in(rows["id"], known))))
print(f"{len(bank)} videos")
look(bank.search(["a ball hits a ball"], k=3))

# %% [markdown]
# ## Use
# References for training: each record's, without itself, clips of its source and near duplicates.

# %%
from ditmem_jax.bank import matches
from ditmem_jax.data.records import RecordReader

found = matches.find(RecordReader(f"{OUT}/records"), bank, k=config.data.references, threshold=1)
found.save(f"{OUT}/records/matches.parquet")
print(found.table.slice(0, 3).select(["id", "matches"]).to_pylist(), found.left_out)

# %% [markdown]
# As a memory: what the bank finds for a prompt goes to the sampler. `ENCODER` is a trained encoder, such as that of
# notebook 1; without one, a short training makes one here that shows the way and no more.

# %%
ENCODER = "ditmem/tiny/run/encoder.safetensors"
if SMALL or not Path(ENCODER).exists():
    ENCODER = f"{OUT}/run/encoder.safetensors"
    values = {
        "data.records": f"{OUT}/records",
        "data.bank": f"{OUT}/bank",
        "data.references": 3,
        "data.batch_size": 8,
    }
    if not Path(ENCODER).exists():
        dm.train_memory(
            dm.load_config(CONFIG, values | {"run.out": f"{OUT}/run", "run.steps": 4 if SMALL else 300})
        )
print(ENCODER)

# %%
config = dm.load_config(CONFIG, {"data.bank": f"{OUT}/bank", "sample.steps": 4 if SMALL else 30})
sampler = dm.Sampler.load(config, ENCODER)
caption = bank.search(["a block slides"], k=1).rows[0][0]["caption"]
print(caption)
found = bank.search([caption], k=3)
without = sampler.generate([caption], seeds=[0])[0]
with_memory = sampler.generate([caption], seeds=[0], references=found)[0]
show(without, with_memory, titles=("without memory", "with memory"))

# %% [markdown]
# What the encoder makes of each video can be stored with the bank: 12 kB in place of 4.2 MB for a video of 480p and the
# released encoder, with the same clip to the last bit. `ditmem bank serve` shows the bank as a page.

# %%
from ditmem_jax.bank.features import Features, make_features

make_features(bank.table, ENCODER, f"{OUT}/bank")
store = Features.open(f"{OUT}/bank", Path(ENCODER))
checksums = [video["checksum"] for video in found.rows[0]]
again = sampler.generate([caption], seeds=[0], references=(store.rows(checksums)[None],))[0]
print("the same clip to the last bit:", bool((again == with_memory).all()))
