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
# # Wan 2.1 1.3B with a memory, on one TPU chip
#
# From the download of Wan2.1-T2V-1.3B to a clip of 480 x 832 with a memory of your reference videos, on one chip with
# 16 GB (Colab's v5e-1), or a GPU of that size. Before anything is downloaded, the TPU compiler says for each stage
# whether it fits.
#
# **What was run.** There were no published weights and no TPU where this was written. The outputs kept here are of
# `SMALL` on two CPU cores that other work shared: every cell with the tiny Wan in place of Wan 2.1, and an encoder
# without training, and the TPU compiler was not installed. How long a cell takes at full size was not measured on a TPU;
# a denoising step of the full model with random weights took 1.06 s on an H100 (`experiments/benchmarks`).
#
# Room: the download is 17 GB, the converted weights about as much again while both are there; `DRIVE` keeps records
# and clips, and leaves the weights on the machine's own disk.

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

import numpy as np

import ditmem_jax as dm
from ditmem_jax.data.video import read_video, write_video
from ditmem_jax.report.notebook import show, tell_costs

tell_costs()
if DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")

OUT = ("/content/drive/MyDrive/" if DRIVE else "") + "ditmem/wan"
os.environ["OUT"] = OUT  # for the commands
Path(OUT).mkdir(parents=True, exist_ok=True)

# %%
WEIGHTS = "tiny_weights" if SMALL else "weights/wan2.1-t2v-1.3b"  # on the machine's own disk
overrides = {"weights.path": WEIGHTS, "data.bank": f"{OUT}/bank"}
overrides |= {"data.references": 3, "sample.steps": 4 if SMALL else 40}
config = dm.load_config("tiny" if SMALL else "wan", overrides)
os.environ |= {"WEIGHTS": WEIGHTS, "CONFIG": "tiny" if SMALL else "wan"}
print(
    f"{config.video.frames} frames of {config.video.height} x {config.video.width}, latents {config.latent_shape}"
)

# %% [markdown]
# ## Does it fit?
# Each stage is compiled for one v5e chip, of Wan 2.1 1.3B in full; nothing is loaded. The weights are in bfloat16. Where a
# stage does not fit, `weights.dtype=int8` halves the transformer and a smaller `video.frames` all else; they belong into
# `overrides` above, and here behind `--config.`. The text encoder, the largest network, takes 10.73 of the 15.75 GiB.

# %% language="bash"
# python -c "import libtpu" 2> /dev/null || { echo "the TPU compiler is not installed here (extra tpu)"; exit 0; }
# for program in text encode memory sample decode; do
#   ditmem aot --config wan --program $program --topology v5e:1x1 --batch 1 | grep -E "v5e|fit"
# done

# %% [markdown]
# ## Weights
# Downloaded, converted to our layout, and the download deleted. What is there is not fetched again.

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
print({path.name: f"{path.stat().st_size / 2**30:.2f} GiB" for path in Path(WEIGHTS).iterdir()})

# %% [markdown]
# ## Reference videos
# Put your own mp4 files into the folder, each with a text file of the same name that says what it shows (`ball.mp4`,
# `ball.txt`). Without any, made-up planets take their place, of 32 x 32 pixels: enough to see that all works.

# %%
VIDEOS = Path(OUT, "videos")
if not list(VIDEOS.glob("*.mp4")):
    from ditmem_jax.worlds.captions import caption
    from ditmem_jax.worlds.laws import splits
    from ditmem_jax.worlds.simulate import sample_clip

    VIDEOS.mkdir(exist_ok=True)
    (planet,) = splits(0, unseen=1).unseen
    rng = np.random.default_rng(0)
    for number, phenomenon in enumerate(("fall", "throw", "slide", "fall", "pendulum", "collision")):
        clip = sample_clip(rng, planet, phenomenon)
        write_video(VIDEOS / f"{number}.mp4", clip.video, fps=16)
        (VIDEOS / f"{number}.txt").write_text(caption(clip, planet.name))
names = sorted(VIDEOS.glob("*.mp4"))
print(*(f"{path.name}: {path.with_suffix('.txt').read_text()}" for path in names), sep="\n")
show(*(read_video(path).frames for path in names[:3]))

# %% [markdown]
# Each stage that needs the chip is a command: when it ends, the chip is free for the next. One video at a time leaves
# room beside the text encoder.

# %% language="bash"
# ditmem encode --config $CONFIG --config.weights.path=$WEIGHTS --videos $OUT/videos --out $OUT/records --batch 1
# test -e $OUT/bank || ditmem bank build --bank $OUT/bank --records $OUT/records

# %% [markdown]
# ## Memory encoder
# `ENCODER` is the file of a trained encoder: one that notebook 4 trained, or a released DiT-Mem encoder after
# `ditmem convert`. Without one, an untrained encoder shows that the parts fit together; its clips mean nothing.

# %%
ENCODER = ""
if not ENCODER:
    import jax
    from flax import nnx

    from ditmem_jax.models.state import split
    from ditmem_jax.storage.encoders import save_encoder

    ENCODER = f"{OUT}/untrained.safetensors"
    with jax.default_device(jax.devices("cpu")[0]):
        _, arrays = split(dm.MemoryEncoder(config.memory, rngs=nnx.Rngs(0)))
    save_encoder(ENCODER, arrays, config.memory, extra={"trained": "not at all"})
print(ENCODER)

# %% [markdown]
# ## Clips
# The prompts are embedded first, and the text encoder is gone from the chip before the transformer comes.

# %%
prompt = names[0].with_suffix(".txt").read_text()
found = dm.Bank.open(f"{OUT}/bank").search([prompt], k=config.data.references)
for video, score in zip(found.rows[0], found.scores[0]):
    print(f"{score:.3f}", video["caption"])
sampler = dm.Sampler.load(config, ENCODER, prompts=[prompt])

# %%
without = sampler.generate([prompt], seeds=[0])[0]
with_memory = sampler.generate([prompt], seeds=[0], references=found)[0]
write_video(f"{OUT}/without.mp4", without, config.video.fps)
write_video(f"{OUT}/with_memory.mp4", with_memory, config.video.fps)
show(without, with_memory, titles=("without memory", "with memory"))

# %% [markdown]
# The strength of the memory is an argument: 0 is exactly the frozen model.

# %%
half = sampler.generate([prompt], seeds=[0], references=found, strength=0.5)[0]
show(without, half, with_memory, titles=("0", "0.5", "1"))
