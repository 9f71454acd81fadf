"""Random networks of a tiny size in original names, their converted form, and a few records: no download, no training."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from ditmem_jax.bank import matches
from ditmem_jax.bank.search import Bank
from ditmem_jax.config import (
    Config,
    DataConfig,
    DiTConfig,
    ExpertsConfig,
    MemoryConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    UMT5Config,
    VAEConfig,
    VideoConfig,
    WeightsConfig,
    to_dict,
)
from ditmem_jax.convert import dit, umt5, vae
from ditmem_jax.convert.folder import convert_checkpoint
from ditmem_jax.convert.original import original
from ditmem_jax.data.record import Record
from ditmem_jax.data.records import Meta, RecordReader, RecordWriter
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.models.wan.umt5 import UMT5
from ditmem_jax.models.wan.vae import VAE
from experiments.tiny_wan.tokenizer import train_tokenizer

PLANETS = ("Aron", "Brux", "Cyta", "Dorn")
CAPTIONS = tuple(f"A ball falls on planet {planet}, take {i}." for i in range(4) for planet in PLANETS)


def tiny_config(folder: str | Path, **parts) -> Config:
    """A configuration of the tiny networks whose weights and records lie in `folder` (see `make_tiny`)."""
    folder = Path(folder)
    defaults = dict(
        dit=DiTConfig(
            dim=48,
            ffn_dim=96,
            num_heads=4,
            num_layers=2,
            in_dim=4,
            out_dim=4,
            text_dim=16,
            text_len=16,
            freq_dim=32,
            clean_frames=True,
        ),
        memory=MemoryConfig(
            dim=48,
            in_dim=4,
            stages=((16, 3, 1, 1), (16, 3, 1, 2)),
            latent_grid=(3, 4, 4),
            filter="radial",
            tokens=(1, 1, 1),
            num_heads=4,
            norm="group",
        ),
        vae=VAEConfig(dim=8, z_dim=4, mean=(0.1, -0.2, 0.3, 0.0), std=(1.5, 0.7, 1.0, 1.2)),
        text=UMT5Config(dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=2, vocab=64),
        video=VideoConfig(frames=9, height=32, width=32, fps=8),
        weights=WeightsConfig(path=str(folder / "weights"), dtype="float32"),
        data=DataConfig(
            records=str(folder / "records"),
            bank=str(folder / "bank"),
            validation=str(folder / "validation"),
            references=2,
            batch_size=8,
            cache=True,
        ),
        objective=ObjectiveConfig(kind="running", density="uniform", memory_dropout=0.2),
        optim=OptimConfig(learning_rate=1e-3),
        run=RunConfig(
            out=str(folder / "run"),
            steps=6,
            log_every=2,
            validate_every=3,
            validation_batches=1,
            save_every=2,
        ),
    )
    return Config(**defaults | parts)


def make_tiny(folder: str | Path, seed: int = 0) -> Config:
    """Writes original and converted weights, records, a bank and matches below `folder`; returns their `tiny_config`."""
    folder = Path(folder)
    config = tiny_config(folder)
    write_original(folder / "original", config, seed)
    convert_checkpoint(folder / "original", config.weights.path)
    for name, number, count in (("records", 1, 16), ("library", 2, 12), ("validation", 3, 8)):
        write_records(folder / name, config, count, seed=number)
    bank = make_bank(config.data.bank, folder / "library")
    for name in ("records", "validation"):
        records = RecordReader(folder / name)
        matches.find(records, bank, config.data.references).save(records.folder / matches.FILE)
    return config


def make_bank(uri: str | Path, *folders: str | Path) -> Bank:
    """A bank of folders of records."""
    return Bank.build(uri, folders)


def with_experts(config: Config, folder: str | Path, trains: str = "both") -> Config:
    """`config` with a second transformer for noise levels from 0.875 on; its weights are copied to `folder` first."""
    folder = Path(folder)
    if not folder.exists():
        shutil.copytree(config.weights.path, folder)
        arrays = random_arrays(abstract(lambda: DiT(config.dit, rngs=nnx.Rngs(0)))[1], seed=7)
        safetensors.numpy.save_file(arrays, folder / "dit_high.safetensors")
        index = json.loads((folder / "config.json").read_text())
        index["networks"]["dit_high"] = index["networks"]["dit"]
        del index["sha256"]
        (folder / "config.json").write_text(json.dumps(index))
    experts = ExpertsConfig(boundary=0.875, trains=trains)
    return replace(dataclasses.replace(config, experts=experts), "weights", path=str(folder))


def write_original(folder: Path, config: Config, seed: int = 0) -> None:
    """Random weights as a folder in original names."""
    folder.mkdir(parents=True)
    networks = {
        "dit": (lambda: DiT(config.dit, rngs=nnx.Rngs(0)), dit.table(config.dit)),
        "vae": (lambda: VAE(config.vae, rngs=nnx.Rngs(0)), vae.table(config.vae)),
        "text": (lambda: UMT5(config.text, rngs=nnx.Rngs(0)), umt5.table()),
    }
    for number, (name, (create, table)) in enumerate(networks.items()):
        arrays = random_arrays(abstract(create)[1], seed=seed + number)
        safetensors.numpy.save_file(original(table, arrays), folder / f"{name}.safetensors")
    train_tokenizer(CAPTIONS, folder / "tokenizer.json")
    described = to_dict(config.dit) | {
        "model_type": "t2v",
        "vae": to_dict(config.vae),
        "text": to_dict(config.text),
    }
    (folder / "config.json").write_text(json.dumps(described))


def random_arrays(shapes: dict[str, jax.ShapeDtypeStruct], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a plausible scale; much quicker than the initialisation of the networks, which compiles."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, x in shapes.items():
        fan_in = np.prod(x.shape[name.startswith("blocks.") : -1], dtype=int)
        arrays[name] = (rng.standard_normal(x.shape) / np.sqrt(max(fan_in, 1))).astype(np.float32)
        if name.endswith("bias"):
            arrays[name] *= 0.02
        if name.endswith("scale"):
            arrays[name] = 1 + 0.1 * arrays[name]
    return arrays


def write_records(folder: str | Path, config: Config, count: int, seed: int = 0) -> None:
    """Records of noise with captions of four planets, in turn."""
    rng, grid = np.random.default_rng(seed), config.latent_shape
    with RecordWriter(folder, Meta(grid, config.text.dim, "float32")) as writer:
        for i in range(count):
            caption = CAPTIONS[i % len(CAPTIONS)]
            text = rng.standard_normal((5 + i % 7, config.text.dim)).astype(np.float32)
            latents = rng.standard_normal(grid).astype(np.float32)
            writer.add(Record(f"video{seed}_{i}", caption, f"{i}.mp4", latents, text))


def replace(config: Config, part: str, **values) -> Config:
    """`config` with some values of one part replaced."""
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})


def write_config(path: Path, config: Config) -> Path:
    """A config file for the command line, in which the values of `config` are written out."""
    path.write_text(
        "import json\nfrom ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict(json.loads({json.dumps(to_dict(config))!r}))\n"
    )
    return path
