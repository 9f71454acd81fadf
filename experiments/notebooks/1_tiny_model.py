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
# # From videos to a report, with the tiny model
#
# A frozen video model films made-up planets that it never heard of. Clips of other planets train a *memory encoder*;
# then a few clips of an unseen planet, found by a search, tell the frozen model the laws there. Every step is shown:
# videos, records, bank, training, clips with and without memory, the laws measured from pixels, a report.
#
# It runs on a CPU, a GPU or a TPU. At the rates that `experiments/demo` measured on two CPU cores (50 videos rendered,
# 50 encoded, 5.6 training steps and 4 clips a second) the full size below takes about ten minutes. Under each cell
# stands what it took where it ran. **The outputs kept here are of `SMALL` on two CPU cores that other work shared: all
# parts work, and a memory of so few steps has learned nothing.** `ditmem demo` makes the full study, with intervals.

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

import matplotlib.pyplot as plt
import numpy as np

import ditmem_jax as dm
from ditmem_jax.data.video import read_video
from ditmem_jax.report.notebook import show, tell_costs

tell_costs()
if DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")

OUT = ("/content/drive/MyDrive/" if DRIVE else "") + "ditmem/tiny"
os.environ["OUT"] = OUT  # for the commands
Path(OUT).mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Videos
# Clips of 32 x 32 pixels, 25 frames, six phenomena, each planet with its own gravity, bounciness, drag, friction and
# springs. A caption names the planet and says nothing of its laws.

# %%
os.environ |= (
    {"TRAIN": "3", "UNSEEN": "2", "CLIPS": "12"} if SMALL else {"TRAIN": "64", "UNSEEN": "8", "CLIPS": "18"}
)

# %% language="bash"
# test -e $OUT/train/captions.csv || ditmem worlds --split=train --worlds=$TRAIN --clips=$CLIPS --out=$OUT/train
# test -e $OUT/unseen/captions.csv || ditmem worlds --split=unseen --worlds=$UNSEEN --clips=$CLIPS --out=$OUT/unseen
# head -n 7 $OUT/train/captions.csv | cut -d, -f2


# %%
def film(name):
    return read_video(next(Path(OUT).glob(f"*/videos/{name}"))).frames


show(*(film(f"train_{number:06d}.mp4") for number in range(6)))

# %% [markdown]
# ## Records
# The frozen VAE and text encoder run once per video. The same call takes up what an interrupted one left.

# %%
config = dm.load_config("tiny", {"data.bank": f"{OUT}/bank", "data.records": f"{OUT}/records/train"})
for split in ("train", "unseen"):
    videos = f"{OUT}/{split}/videos"
    print(dm.encode_videos(config, f"{OUT}/records/{split}", videos, f"{OUT}/{split}/captions.csv"))

# %%
from ditmem_jax.data.records import RecordReader

record = RecordReader(f"{OUT}/records/train")[0]
figure, axes = plt.subplots(1, record.latents.shape[-1], figsize=(12, 1.6))
for channel, axis in enumerate(axes):
    axis.imshow(record.latents[3, :, :, channel])
    axis.set(xticks=[], yticks=[], title=f"channel {channel}")
figure.suptitle(f"latents {record.latents.shape}, the fourth moment", y=1.2)
plt.show()

# %% [markdown]
# ## Bank
# All clips in one searchable table. Unseen planets are in the bank, but never among what trains.

# %%
from ditmem_jax.bank.table import Table

bank_exists = Table.exists(f"{OUT}/bank")
records = [f"{OUT}/records/train", f"{OUT}/records/unseen"]
bank = dm.Bank.open(f"{OUT}/bank") if bank_exists else dm.Bank.build(f"{OUT}/bank", records)
found = bank.search([record.caption], k=3)
for video, score in zip(found.rows[0], found.scores[0]):
    print(f"{score:.3f}", video["caption"])
show(*map(film, found.ids[0]))

# %% [markdown]
# The references of each training record are found once, by the same search, without the record itself.

# %%
from ditmem_jax.bank import matches

found = matches.find(RecordReader(f"{OUT}/records/train"), bank, k=config.data.references, threshold=1)
found.save(f"{OUT}/records/train/matches.parquet")
print(found.left_out)

# %% [markdown]
# ## Training
# Only the encoder trains. A run that was stopped goes on where it was.

# %%
steps = {"run.steps": 10, "data.batch_size": 8} if SMALL else {"run.steps": 1500}
config = dm.load_config(
    "tiny",
    {"data.bank": f"{OUT}/bank", "data.records": f"{OUT}/records/train", "run.out": f"{OUT}/run", **steps},
)
encoder = Path(OUT, "run/encoder.safetensors")
if not encoder.exists():
    dm.train_memory(config)

# %%
curve = np.genfromtxt(f"{OUT}/run/metrics.csv", delimiter=",", names=True, ndmin=1)
plt.figure(figsize=(6, 2.5))
plt.plot(curve["step"], curve["gain"], marker=".")
plt.axhline(0, color="grey", linewidth=0.5)
plt.xlabel("step")
plt.ylabel("gain of the memory")
plt.title("1 - loss with memory / loss without, while training")
plt.show()

# %% [markdown]
# ## Clips of unseen planets
# The same noise and the same prompt: without memory, with what the bank finds for the prompt (right), with what it
# finds for another planet's name (wrong). Beside them what truly happens there.

# %%
from ditmem_jax.worlds.captions import caption
from ditmem_jax.worlds.laws import splits
from ditmem_jax.worlds.simulate import sample_clip

planets = splits(0, unseen=int(os.environ["UNSEEN"])).unseen
phenomena = ("slide", "fall", "pendulum")[: 1 if SMALL else 3]
rng = np.random.default_rng(7)
trials = [(planet, sample_clip(rng, planet, each)) for planet in planets for each in phenomena]
others = [planets[(planets.index(planet) + 1) % len(planets)] for planet, _ in trials]
prompts = [caption(clip, planet.name) for planet, clip in trials]
asked_wrong = [caption(clip, other.name) for (_, clip), other in zip(trials, others)]
print(*prompts[:3], sep="\n")

# %%
config = dm.load_config("tiny", {"data.bank": f"{OUT}/bank", **({"sample.steps": 6} if SMALL else {})})
sampler = dm.Sampler.load(config, encoder)
seeds = range(len(prompts))
right, wrong = (bank.search(asked, k=config.data.references) for asked in (prompts, asked_wrong))
clips = {
    "true": np.stack([clip.video for _, clip in trials]),
    "no memory": sampler.generate(prompts, seeds),
    "right memory": sampler.generate(prompts, seeds, references=right),
    "wrong memory": sampler.generate(prompts, seeds, references=wrong),
}
show(*(films[0] for films in clips.values()), titles=clips)

# %% [markdown]
# ## The laws, measured from pixels
# The law error is |ln(measured / true)|; 0.1 is about 10 %. A clip that shows no such motion tells nothing.

# %%
from ditmem_jax.evaluate.laws import law_error, told

errors = {way: [] for way in clips}
for number, (planet, clip) in enumerate(trials):
    for way, films in clips.items():
        measured = told(films[number], clip.scene.phenomenon)
        for constant, true in planet.shown_by(clip.scene.phenomenon).items():
            errors[way].append(law_error(measured.get(constant, np.nan), true))
means = {way: np.nanmean(values) if np.isfinite(values).any() else np.nan for way, values in errors.items()}
for way, mean in means.items():
    print(f"{way:14}{mean:.2f}, {np.isfinite(errors[way]).sum()} of {len(errors[way])} constants measured")
plt.figure(figsize=(6, 2.5))
plt.bar(list(means), list(means.values()))
plt.ylabel("mean law error")
plt.show()

# %% [markdown]
# ## Report
# One file with the clips, which play in step, and the table.

# %%
from ditmem_jax.report import Film, FilmRow, film_grid, page, section, table

tones = {"true": "grey", "no memory": "blue", "right memory": "green", "wrong memory": "red"}
rows = [FilmRow(prompt, [Film(clips[way][n]) for way in clips]) for n, prompt in enumerate(prompts[:8])]
text = page(
    "A memory and the laws of planets",
    section("Clips", film_grid([(way, tones[way]) for way in clips], rows, config.video.fps)),
    section(
        "Mean law error", table(["clips", "error"], [(way, f"{mean:.2f}") for way, mean in means.items()])
    ),
    name="the tiny model" + (", at small sizes: it finds nothing" if SMALL else ""),
)
Path(OUT, "report.html").write_text(text, encoding="utf-8")
print(f"{OUT}/report.html: {len(text):,} bytes; open it from the panel of files")

# %% [markdown]
# `ditmem demo` does all this with 24 unseen planets, states what was found with intervals, and takes the longer
# training. A memory for Wan is the next notebook's.
