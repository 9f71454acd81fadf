"""Writes the clips of many worlds as a user's data would come: a folder of mp4 files and a CSV."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from rich.console import Console

from ditmem_jax.data.video import write_video
from ditmem_jax.errors import UserError
from ditmem_jax.progress import track
from ditmem_jax.storage.files import make_folder, replacing
from ditmem_jax.worlds.captions import caption
from ditmem_jax.worlds.laws import PHENOMENA, RANGES, World, splits
from ditmem_jax.worlds.render import CAMERA, Camera
from ditmem_jax.worlds.simulate import Clip, sample_clip

Split = Literal["backbone", "train", "unseen"]


def clips_of(
    worlds: tuple[World, ...], split: Split, clips: int, seed: int, camera: Camera = CAMERA
) -> Iterator[tuple[int, World, Clip, str]]:
    """Yields `clips` clips of each world with their captions, the phenomena in turn.

    Captions of named worlds name the planet and state nothing; half of the others state
    their constants, in words or numbers.
    A clip depends on the seed, the split and its place only, not on how many are made.
    """
    phenomena = list(PHENOMENA)
    for number, world in enumerate(worlds):
        for k in range(clips):
            rng = np.random.default_rng([seed, get_args(Split).index(split), number, k])
            clip = sample_clip(rng, world, phenomena[k % len(phenomena)], camera)
            state = None if world.name else rng.choice(np.array([None, None, "words", "numbers"]))
            yield number, world, clip, caption(clip, world.name, state)


def make(out: Path, *, split: Split, worlds: int, clips: int, seed: int, camera: Camera = CAMERA) -> int:
    """Writes OUT/videos/*.mp4 and then OUT/captions.csv; returns the number of clips.

    Columns: video, caption, world, phenomenon, then every constant of the world (the law's ground truth).

    Raises:
        UserError: if OUT already holds captions, or there are not that many planets.
    """
    table = out / "captions.csv"
    if table.exists():
        raise UserError(
            f"{table} exists already", fix="choose another --out, or delete that folder to make it anew"
        )
    chosen = getattr(splits(seed, **{split: worlds}), split)
    make_folder(out / "videos")

    with replacing(table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "caption", "world", "phenomenon", *RANGES])
        todo = clips_of(chosen, split, clips, seed, camera)
        for row, (number, world, clip, text) in enumerate(
            track(todo, f"{split} worlds", worlds * clips, console=Console(stderr=True))
        ):
            video = f"{split}_{row:06d}.mp4"
            write_video(out / "videos" / video, clip.video, camera.fps)
            constants = [f"{getattr(world, constant):.6g}" for constant in RANGES]
            writer.writerow(
                [video, text, world.name or f"unnamed {number}", clip.scene.phenomenon, *constants]
            )
    return worlds * clips
