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
# # A memory for Wan, trained on your own videos
#
# Encodes your videos with Wan's VAE and text encoder, finds each one's references, and trains a memory encoder against
# the frozen Wan 2.1 1.3B on one chip of 16 GB: shorter clips, the transformer in 8 bits, blocks recomputed. The TPU
# compiler says beforehand whether that fits.
#
# **What was run.** There were no published weights and no TPU where this was written. The outputs kept here are of
# `SMALL` on two CPU cores that other work shared: every cell with the tiny Wan, a few steps, nothing learned, and the TPU
# compiler was not installed. How long a step takes at full size on a TPU was not measured; one of 81 frames with random
# weights took 2.2 s on an H100 (`experiments/benchmarks`).
#
# Weights are those of notebook 2, and are fetched here if they are missing.

# %% tags=["parameters"]
import os

SMALL = "DITMEM_SMALL" in os.environ  # True: the least sizes, the tiny weights, no download
DRIVE = False  # True, on Colab: what is made lies in your Google Drive, and is found there after a reconnect
EXTRA = "convert"  # what this notebook needs of the package beside the chip's part
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

import matplotlib.pyplot as plt
import numpy as np

import ditmem_jax as dm
from ditmem_jax.data.video import read_video, write_video
from ditmem_jax.report.notebook import show, tell_costs

tell_costs()
if DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")

OUT = ("/content/drive/MyDrive/" if DRIVE else "") + "ditmem/memory"
os.environ["OUT"] = OUT  # for the commands
Path(OUT).mkdir(parents=True, exist_ok=True)

# %%
WEIGHTS = "tiny_weights" if SMALL else "weights/wan2.1-t2v-1.3b"  # on the machine's own disk
CONFIG = "tiny" if SMALL else "wan"
SHORT = {  # what makes it fit one chip
    "weights.dtype": "int8",
    "video.frames": 33,
    "memory.filter": "radial",  # the released filter is made for clips of 81 frames only
    "memory.latent_grid": (9, 60, 104),
}
TINY = {"data.batch_size": 8, "run.validation_batches": 1, "sample.steps": 4}
values = {"weights.path": WEIGHTS, "data.records": f"{OUT}/records", "data.bank": f"{OUT}/bank"}
values |= {"data.validation": f"{OUT}/held_out", "run.out": f"{OUT}/run", "run.steps": 6 if SMALL else 2000}
values |= TINY if SMALL else SHORT
config = dm.load_config(CONFIG, values)
SHORT_FLAGS = " ".join(f"--config.{name}={value}".replace(" ", "") for name, value in SHORT.items())
ENCODE_FLAGS = "" if SMALL else f"--config.video.frames={SHORT['video.frames']}"
os.environ |= {
    "WEIGHTS": WEIGHTS,
    "CONFIG": CONFIG,
    "SHORT": SHORT_FLAGS,
    "ENCODE": ENCODE_FLAGS,
    "K": str(config.data.references),
}

# %% [markdown]
# ## Does it fit?
# A training step of Wan 2.1 1.3B in full, compiled for one v5e chip. Where it does not fit, make `SHORT` shorter.

# %% language="bash"
# python -c "import libtpu" 2> /dev/null || { echo "the TPU compiler is not installed here (extra tpu)"; exit 0; }
# ditmem aot --config wan $SHORT --program train --topology v5e:1x1 --batch 1 | head -n 22

# %% [markdown]
# ## Weights

# %%
if not Path(WEIGHTS, "config.json").exists():
    if SMALL:
        from importlib.resources import files

        source = files("ditmem_jax.tiny_weights")
    else:
        from huggingface_hub import snapshot_download

        source = snapshot_download(
            config.weights.hub, local_dir="download", ignore_patterns=["assets/*", "examples/*"]
        )
    dm.convert_checkpoint(source, WEIGHTS)
    shutil.rmtree("download", ignore_errors=True)

# %% [markdown]
# ## Videos
# `captions.csv` with the columns `video` and `caption`, and `source` where several clips were cut from one film: those
# are never each other's references. Put your own there, a hundred or more; without one, made-up planets take their place.
# Some are held out, to see what the memory is worth on videos that did not train it.

# %% language="bash"
# test -e $OUT/train/captions.csv || ditmem worlds --split=train --worlds=3 --clips=12 --out=$OUT/train
# test -e $OUT/held_out_videos/captions.csv || ditmem worlds --split=unseen --worlds=2 --clips=12 --out=$OUT/held_out_videos
# common="--config $CONFIG --config.weights.path=$WEIGHTS $ENCODE --batch 1"
# ditmem encode $common --table $OUT/train/captions.csv --videos $OUT/train/videos --out $OUT/records
# ditmem encode $common --table $OUT/held_out_videos/captions.csv --videos $OUT/held_out_videos/videos --out $OUT/held_out

# %%
show(*(read_video(path).frames for path in sorted(Path(OUT, "train/videos").glob("*.mp4"))[:6]))

# %% [markdown]
# ## Bank and references
# `--threshold=1` keeps references whose captions are equal in words, as short captions are; leave it out for long ones.

# %% language="bash"
# test -e $OUT/bank || ditmem bank build --bank $OUT/bank --records $OUT/records,$OUT/held_out
# ditmem bank match $OUT/records --bank $OUT/bank --k $K --threshold=1
# ditmem bank match $OUT/held_out --bank $OUT/bank --k $K --threshold=1

# %% [markdown]
# ## Training
# A checkpoint is kept every `run.save_every` steps; after a reconnect the same cell goes on, bit for bit.

# %%
encoder = Path(OUT, "run/encoder.safetensors")
if not encoder.exists():
    dm.train_memory(config)

# %% [markdown]
# The gain is 1 - loss with memory / loss without, at each noise level, on the held-out videos: with their own
# references, and with those of another video. A memory that has learned something is above 0, and above the other's.

# %%
table = np.genfromtxt(f"{OUT}/run/validation.csv", delimiter=",", names=True, ndmin=1)
plt.figure(figsize=(6, 2.5))
for name in [name for name in table.dtype.names if name.startswith("gain")][:8]:
    plt.plot(table["step"], table[name], marker=".", label=name)
plt.axhline(0, color="grey", linewidth=0.5)
plt.xlabel("step")
plt.legend(fontsize=7, ncols=2)
plt.show()

# %% [markdown]
# ## Use it
# The file says how the encoder was made; sampling takes it as it is. An encoder of the released kind (81 frames, the
# released filter) can also be written as the released program saves it: `ditmem convert --export dit-mem`.

# %%
from ditmem_jax.storage.encoders import encoder_metadata

memory, extra = encoder_metadata(encoder)
print(memory)
print({name: extra[name] for name in list(extra)[:6]})

# %%
prompt = dm.Bank.open(f"{OUT}/bank").search(["a block slides"], k=1).rows[0][0]["caption"]
found = dm.Bank.open(f"{OUT}/bank").search([prompt], k=config.data.references)
sampler = dm.Sampler.load(config, encoder, prompts=[prompt])
without = sampler.generate([prompt], seeds=[0])[0]
with_memory = sampler.generate([prompt], seeds=[0], references=found)[0]
write_video(f"{OUT}/with_memory.mp4", with_memory, config.video.fps)
show(without, with_memory, titles=("without memory", "with memory"))
