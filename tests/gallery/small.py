"""A small bank of clips for the tests of the page, and random networks for it."""

import csv
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.bank.embedders import make_embedder
from ditmem_jax.bank.rows import rows_of_records
from ditmem_jax.bank.table import Table
from ditmem_jax.config import Config, UMT5Config, VAEConfig, VideoConfig
from ditmem_jax.data.sources import Videos, read_table
from ditmem_jax.data.video import write_video
from ditmem_jax.encode.dataset import encode_dataset
from ditmem_jax.encode.engines import Local
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.tokenizer import Tokenizer
from ditmem_jax.models.wan.umt5 import UMT5
from ditmem_jax.models.wan.vae import VAE
from experiments.tiny_wan.tokenizer import train_tokenizer
from tests.tiny import tiny_config

CLIPS = {
    f"{colour} {planet}": (colour, planet) for planet in ("zorvex", "quindara") for colour in ("red", "blue")
}
COUNT = len(CLIPS)
NASTY = (
    "a ball <script>alert(1)</script> <img src=x onerror=alert(2)> falls",
    "a ball \"quoted\" 'twice' `${alert(3)}` {{value}} &amp; \\n falls",
    "a ball\nfalls\r\n\tdown",
    "a ball 🪐🔥 falls, כדור נופל على الأرض, 球落下",
    "ball " * 2000,
)


def config(folder: Path) -> Config:
    return tiny_config(
        folder,
        video=VideoConfig(frames=5, height=16, width=16, fps=8),
        vae=VAEConfig(4, 4, (1, 1), 1, (True,), mean=(0.0,) * 4, std=(1.0,) * 4),  # quick to compile
        text=UMT5Config(dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=1, vocab=64),
    )


def with_networks(folder: Path, seed: int = 0) -> tuple[VAE, tuple[UMT5, Tokenizer]]:
    """Networks of small random numbers."""

    def random(create):
        structure, shapes = abstract(create)
        draw = np.random.default_rng(seed).normal
        return structure.merge(
            {path: jnp.asarray(draw(0, 0.1, x.shape), x.dtype) for path, x in shapes.items()}
        )

    settings = config(folder)
    vae = random(lambda: VAE(settings.vae, rngs=nnx.Rngs(0)))
    umt5 = random(lambda: UMT5(settings.text, rngs=nnx.Rngs(0)))
    tokenizer = (folder / "records").resolve().parent / "tokenizer.json"
    return vae, (umt5, Tokenizer(tokenizer, settings.dit.text_len))


def load_random(monkeypatch, folder: Path, seed: int = 0) -> None:
    """Lets every config's networks be those of `with_networks`."""
    for module in ("gallery", "clips"):
        monkeypatch.setattr(f"ditmem_jax.gallery.{module}.load_vae", lambda _: with_networks(folder, seed)[0])
    monkeypatch.setattr("ditmem_jax.gallery.gallery.load_umt5", lambda _: with_networks(folder, seed)[1])


def make_bank(folder: Path) -> Path:
    """Videos of a ball that falls, their records and the bank of them; red on zorvex moves least."""
    (folder / "videos").mkdir()
    rows = []
    for number, (name, (colour, planet)) in enumerate(CLIPS.items()):
        frames = np.full((12, 64, 64, 3), 230, np.uint8)
        for time, frame in enumerate(frames):
            frame[4 * time : 4 * time + 14, 10 * number + 8 : 10 * number + 22] = (
                (200, 40, 40) if colour == "red" else (40, 40, 200)
            )
        write_video(folder / "videos" / f"{name}.mp4", frames, fps=8)
        rows.append(
            {
                "video": f"{name}.mp4",
                "caption": f"a {colour} ball falls on {planet}",
                "motion": number / 4 + 0.05,
                "planet": planet,
            }
        )
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    train_tokenizer([row["caption"] for row in rows], folder / "tokenizer.json")
    (folder / "records").mkdir()
    entries = read_table(folder / "captions.csv")
    rows = Videos([folder / "videos"]).rows(entries)
    encode_dataset(rows, folder / "records", config(folder), Local(with_networks(folder)), batch=1)
    rows = rows_of_records([folder / "records"])
    Table.create(folder / "bank", make_embedder("lexical", rows["caption"].to_pylist()), rows)
    return folder
