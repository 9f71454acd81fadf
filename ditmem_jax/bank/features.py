"""The rows that a memory encoder makes of each video of a bank, stored once: `ditmem bank tokens`.

Before the attention that mixes videos, the rows of a video depend on it and on the encoder alone (see
`VideoEncoder.video_rows`). Kept in a store by the checksum of the video's latents, they spare sampling the latents
and the convolutions. The rest of the encoder is one small attention.

Sampling from latents makes the rows with `encode_video` as well, one video at a time: in a batch they are rounded
otherwise (by 4e-7 of the largest, seen on CPUs). So stored and fresh rows come from one program; two processes may
still round its last bits otherwise (see "The same result again" in docs/training.md).

A store is a LanceDB database, a folder or s3:// ..., and may be the bank itself. It has a table per encoder, named by
the SHA-256 of the encoder's file, so that rows of another encoder are never taken.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from flax import nnx
from jaxtyping import Array, Float, Float32

from ditmem_jax.bank.table import Table, lance_errors, to_matrix
from ditmem_jax.data.record import DTYPES
from ditmem_jax.data.records import Meta
from ditmem_jax.data.references import References
from ditmem_jax.errors import UserError
from ditmem_jax.models.encoders import VideoEncoder, per_video
from ditmem_jax.progress import track
from ditmem_jax.storage.digests import of_file
from ditmem_jax.storage.encoders import load_encoder
from ditmem_jax.storage.files import parse_json
from ditmem_jax.storage.locks import owned

FORMAT = 1
KEYS = {"shape", "latents_bytes"}
COMMIT_EVERY = 256  # videos; a run that was killed loses the work on fewer than that


@nnx.jit
def _video_rows(encoder: VideoEncoder, latents: Float[Array, "T H W C"]) -> Float[Array, "2 M D"]:
    return encoder.video_rows(latents[None], training=False)[0].astype(jnp.float32)


def encode_video(encoder: VideoEncoder, latents: Float[np.ndarray, "T H W C"]) -> Float32[Array, "2 M D"]:
    """The rows of one video for the high and the low band."""
    return _video_rows(encoder, jnp.asarray(latents, jnp.float32))


class Features:
    """The rows that one encoder made of the videos of a bank; see `open` and `make_features`.

    Attributes:
        shape: (2, M, D) of a video's rows.
        latents_bytes: of a video's latents, which need not be read.
    """

    def __init__(self, uri: str, table: lancedb.table.Table):
        self.uri, self._table = uri, table
        text = (table.schema.metadata or {}).get(b"ditmem_jax", b"{}").decode(errors="replace")
        stored = parse_json(text, f"the schema of the tokens in {uri}")
        if not isinstance(stored, dict) or (stored.get("format") == FORMAT and not KEYS <= stored.keys()):
            raise UserError(f"the schema of the tokens in {uri} is damaged", found=text[:200])
        if stored.get("format") != FORMAT:
            raise UserError(
                f"the tokens in {uri} have another format",
                expected=f"format {FORMAT}",
                found=f"format {stored.get('format')}",
                fix="the version of ditmem_jax that made them, or make them again in another folder",
            )
        self.shape: tuple[int, int, int] = tuple(stored["shape"])
        self.latents_bytes: int = stored["latents_bytes"]

    @classmethod
    def open(cls, uri: str | Path, encoder: str | Path) -> "Features":
        """The rows that the encoder in a file made.

        Raises:
            UserError: if there are none in the store; those of other encoders are told.
        """
        uri, name = str(uri), _table_name(encoder)
        others = _table_names(uri)
        if name not in others:
            raise UserError(
                f"{uri} holds no tokens of the encoder {encoder}",
                expected=name,
                found=", ".join(others) or "no tokens at all",
                fix=f"ditmem bank tokens --bank BANK --encoder {encoder} --out {uri}",
            )
        with lance_errors(f"cannot open the tokens in {uri}"):
            return cls(uri, lancedb.connect(uri).open_table(name))

    def __len__(self) -> int:
        return self._table.count_rows()

    @property
    def checksums(self) -> list[str]:
        """Of the latents of all videos that have rows here."""
        with lance_errors(f"cannot read the tokens in {self.uri}"):
            return self._table.search().select(["checksum"]).to_arrow()["checksum"].to_pylist()

    def rows(self, checksums: Sequence[str]) -> Float32[np.ndarray, "R 2 M D"]:
        """The rows of the videos with these checksums of latents.

        Raises:
            UserError: if a video is missing, or its rows are not as they were written.
        """
        listed = ", ".join(f"'{checksum}'" for checksum in checksums)
        with lance_errors(f"cannot read the tokens in {self.uri}"):
            found = self._table.search().where(f"checksum IN ({listed})").to_arrow()
        places = pc.index_in(pa.array(checksums, pa.string()), found["checksum"])
        if places.null_count:
            raise UserError(
                f"the tokens in {self.uri} lack {places.null_count} of {len(checksums)} videos",
                found="no video with latents of checksum "
                + next(c for c, place in zip(checksums, places, strict=True) if not place.is_valid),
                fix="ditmem bank tokens once more; it adds those that are new in the bank",
            )
        found = found.take(places)
        rows = to_matrix(found["rows"]).reshape(-1, *self.shape)
        for checksum, digest, video in zip(checksums, found["digest"].to_pylist(), rows, strict=True):
            if digest != _digest(video):
                raise UserError(
                    f"the tokens of the video {checksum} in {self.uri} were altered",
                    expected=f"digest {digest}",
                    found=_digest(video),
                    fix="delete the store and make it again",
                )
        return rows


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of `make_features`: videos done now and before, those without latents, and what a video now costs."""

    made: int
    found: int
    without: int
    bytes: tuple[int, int]  # of latents, of rows
    seconds: tuple[float, float]  # from latents to rows on this device, and reading rows, per video

    def __str__(self) -> str:
        (latents, rows), (encoding, reading) = self.bytes, self.seconds
        lacking = f", {self.without} have no record" if self.without else ""
        return (
            f"{self.made} videos encoded, {self.found} found encoded{lacking}\n"
            f"a video as tokens: {rows:,} bytes instead of {latents:,}, 1/{latents / rows:.1f}; "
            f"{1e3 * reading:.1f} ms instead of {1e3 * encoding:.1f} ms"
        )


def make_features(
    bank: Table, encoder: str | Path, out: str | Path, commit_every: int = COMMIT_EVERY
) -> Summary:
    """Stores what an encoder makes of every video of a bank that the store lacks, under a progress bar.

    Every `commit_every` videos are one commit, so the same command continues a run that was killed.

    Raises:
        UserError: if the file is no encoder, or one that is not of videos, its grid is another than the bank's, a
            record is gone or altered, or another process makes these.
    """
    out = str(out)
    with contextlib.nullcontext() if "://" in out else owned(Path(out, f"{_table_name(encoder)}.lance")):
        return _make_features(bank, encoder, out, commit_every)


def _make_features(bank: Table, encoder: str | Path, out: str, commit_every: int) -> Summary:
    network = per_video(load_encoder(encoder))
    rows = bank.rows(columns=["id", "records", "row", "checksum"]).to_pylist()
    videos = {row["checksum"]: row for row in rows if row["records"] is not None}
    if not videos:
        raise UserError(f"no video of the bank {bank.uri} has a record", fix="a bank of records")
    references = References.of(videos.values())
    features = Features.open(out, encoder) if _table_name(encoder) in _table_names(out) else None
    done = set(features.checksums) if features else set()
    waiting = [index for index, checksum in enumerate(videos) if checksum not in done]
    for group in _groups(track(waiting, "encoding", disable=not waiting), commit_every):
        latents = (references[index].latents for index in group)
        made = np.stack([np.asarray(encode_video(network, x.astype(np.float32))) for x in latents])
        checksums = [references.pointers[index].checksum for index in group]
        features = _write(out, encoder, features, checksums, made, references.meta)
    start = time.perf_counter()
    np.asarray(encode_video(network, references[0].latents.astype(np.float32)))
    middle = time.perf_counter()
    features.rows([references.pointers[0].checksum])
    seconds = middle - start, time.perf_counter() - middle
    without = sum(row["records"] is None for row in rows)
    sizes = features.latents_bytes, 4 * math.prod(features.shape)
    return Summary(len(waiting), len(videos) - len(waiting), without, sizes, seconds)


def _write(
    uri: str,
    encoder: str | Path,
    features: Features | None,
    checksums: list[str],
    rows: Float32[np.ndarray, "n 2 M D"],
    meta: Meta,
) -> Features:
    """Adds rows in one commit; the first one makes the table."""
    latents_bytes = math.prod(meta.latents) * DTYPES[meta.dtype].itemsize
    about = {"format": FORMAT, "shape": rows.shape[1:], "latents_bytes": latents_bytes}
    columns = {
        "checksum": pa.array(checksums, pa.string()),
        "digest": pa.array([_digest(video) for video in rows], pa.string()),
        "rows": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), math.prod(rows.shape[1:])),
    }
    table = pa.table(columns).replace_schema_metadata({"ditmem_jax": json.dumps(about)})
    with lance_errors(f"cannot write tokens to {uri}"):
        if features is None:
            return Features(uri, lancedb.connect(uri).create_table(_table_name(encoder), table))
        features._table.add(table)
    return features


def _table_name(encoder: str | Path) -> str:
    return f"tokens-{of_file(encoder)}"


def _table_names(uri: str) -> list[str]:
    """The tables of tokens in a store; connecting to a folder that is not there would make it."""
    if "://" not in uri and not Path(uri).is_dir():
        return []
    with lance_errors(f"cannot open the tokens in {uri}"):
        names = lancedb.connect(uri).list_tables(limit=10_000).tables
    return [name for name in names if name.startswith("tokens-")]


def _digest(rows: Float32[np.ndarray, "2 M D"]) -> str:
    return hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest()


def _groups(items: Iterator[int], size: int) -> Iterator[list[int]]:
    group: list[int] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
