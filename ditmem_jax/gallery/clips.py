"""The file that plays a video of the bank: its original, or its latents decoded once."""

import dataclasses
import functools
import mimetypes
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ditmem_jax.config import Config
from ditmem_jax.data.record import checksum
from ditmem_jax.data.records import RecordReader
from ditmem_jax.data.video import from_unit, write_video
from ditmem_jax.encode.shards import fingerprint
from ditmem_jax.errors import UserError
from ditmem_jax.models.wan.vae import VAE, decode
from ditmem_jax.storage.files import make_folder
from ditmem_jax.storage.weights import load_vae

Row = Mapping[str, Any]


def below(folder: Path, name: str) -> Path:
    """The video file `name` in `folder`, with links followed.

    Raises:
        UserError: if there is none, it lies outside of the folder, or it is no video.
    """
    if not name or not os.path.isfile(folder / name):
        raise UserError(f"there is no file {name!r} in the folder of videos")
    path, folder = (folder / name).resolve(), folder.resolve()
    if not path.is_relative_to(folder):
        raise UserError(f"{name!r} lies outside of the folder of videos", expected="a path below it")
    if not (mimetypes.guess_type(path.name)[0] or "").startswith("video/"):
        raise UserError(f"{name!r} is no video file")
    return path


class Decoder:
    """Latents of records to mp4 files in the folder `cache`, each made once; the VAE is loaded when first needed."""

    def __init__(self, config: Config, cache: Path):
        self.config, self.cache = config, cache
        self._lock = threading.Lock()  # one clip at a time, and no clip twice

    def __call__(self, row: Row) -> Path:
        """Raises UserError if the record is gone or altered, or was made by another VAE."""
        with self._lock:
            vae, made_by = self._vae
            path = self.cache / made_by[:16] / f"{row['checksum']}.mp4"
            if not path.exists():
                latents = jnp.asarray(_latents(row, made_by), jnp.float32)
                frames = from_unit(np.asarray(decode(vae, latents[None]))[0])
                make_folder(path.parent)
                write_video(
                    path, frames, len(frames) / row["duration"] if row["duration"] else self.config.video.fps
                )
            return path

    @functools.cached_property
    def _vae(self) -> tuple[VAE, str]:
        vae = load_vae(self.config)
        return vae, fingerprint(vae)


def _latents(row: Row, made_by: str) -> np.ndarray:
    """Latents [T, H, W, C] of a row, made by the VAE of that fingerprint."""
    folder, number = row["records"], row["row"]
    index = Path(folder) / "index.json"
    records = _reader(folder, index.stat().st_mtime if index.exists() else 0.0)
    if (theirs := records.meta.made_by.get("vae")) != made_by:
        raise UserError(f"the records in {folder} were made by another VAE", expected=made_by, found=theirs)
    latents = records[number].latents if number < len(records) else None
    if latents is None or checksum(latents) != row["checksum"]:
        raise UserError(f"record {number} of {folder} is not the one that the bank means", fix="bank verify")
    return latents


@functools.lru_cache(maxsize=4)
def _reader(folder: str, written: float) -> RecordReader:
    """`RecordReader`, whose lists are long, once for each state of the folder."""
    return RecordReader(folder)


@dataclasses.dataclass(frozen=True)
class Clips:
    """Where the clips of a bank are.

    Args:
        videos: folder of the originals, which a row's `source` names below it.
        own: folder of what was added by the page: for each video a folder with the original and its records.
        decoder: for rows without an original.
    """

    videos: Path | None
    own: Path
    decoder: Decoder | None

    def file(self, row: Row) -> Path:
        """The file that plays a row. Raises UserError, whose text is for the page, if there is none."""
        if (original := self._original(row)) is not None:
            return original
        if self.decoder is not None and row["records"]:
            return self.decoder(row)
        raise UserError(self.missing(row))

    def missing(self, row: Row) -> str:
        """The reason why a row cannot be played, or ""."""
        try:
            if self._original(row) is not None or (self.decoder is not None and row["records"]):
                return ""
        except UserError as error:
            return str(error)
        if self.decoder is not None:
            return "The bank knows no records of this video to decode."
        return "Start with --videos DIR to play the originals, or with --config FILE to decode the latents."

    def _original(self, row: Row) -> Path | None:
        records = Path(row["records"] or "")
        if records.is_relative_to(self.own):
            return below(records.parent, row["source"])
        if self.videos is None:
            return None
        try:
            return below(self.videos, row["source"])
        except UserError:
            if self.decoder is not None and row["records"]:
                return None
            raise
