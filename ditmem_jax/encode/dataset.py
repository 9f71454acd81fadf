"""Videos and captions of a folder or table to records."""

import contextlib
import csv
import dataclasses
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ditmem_jax.config import Config
from ditmem_jax.data.records import RecordWriter
from ditmem_jax.data.sources import Row, Videos, expand, read_table
from ditmem_jax.encode.engines import Engine, Local
from ditmem_jax.encode.shards import Job, Part, find_part
from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import make_folder, write_text, writing
from ditmem_jax.storage.locks import owned
from ditmem_jax.storage.weights import load_umt5, load_vae

SHARD_SIZE = 64  # rows at least; a multiple of the batch


@dataclasses.dataclass(frozen=True)
class Summary:
    """How many records were made now, how many were there before, and the rows (id, reason) left out."""

    made: int
    found: int
    skipped: list[tuple[str, str]]

    def __str__(self) -> str:
        return f"{self.made} videos encoded, {self.found} found encoded, {len(self.skipped)} skipped"


def encode_videos(
    config: Config,
    out: str | Path,
    videos: str | Path | Sequence[str | Path] = (),
    table: str | Path | None = None,
    engine: Engine | None = None,
    **options: Any,
) -> Summary:
    """Encode the videos of a folder, or of a table, to the records in `out`; a second call takes up what is new.

    Args:
        config: its `weights` are loaded, its `video` decides the size of the clips.
        videos: folders, zip or tar files, folders of input records, or patterns such as "part*.zip"; by default the
            table's own folder.
        table: CSV, parquet or JSON lines with columns video and caption; by default each video takes its caption from
            the text file beside it.
        engine: where to encode, such as `encode.engines.OnRay()`; by default in this process.
        options: `batch`, `minimum` and `shard_size` as `encode_dataset` takes them.
    Raises:
        UserError: if there are no such videos or weights, and as `encode_dataset`.
    """
    places = [videos] if isinstance(videos, (str, Path)) else list(videos)
    if table is not None:
        rows = Videos(expand(map(str, places or [Path(table).parent]))).rows(read_table(table))
    elif places:
        rows = Videos(expand(map(str, places))).rows()
    else:
        raise UserError("nothing to encode", expected="a table, videos or both")
    weights = os.path.abspath(config.weights.path)  # workers of an engine may run in other folders
    config = dataclasses.replace(config, weights=dataclasses.replace(config.weights, path=weights))
    with owned(out):
        pass  # else refused before the networks are loaded
    engine = engine or Local((load_vae(config), load_umt5(config)))
    return encode_dataset(rows, out, config, engine, **options)


def encode_dataset(
    rows: Sequence[Row],
    out: str | Path,
    config: Config,
    engine: Engine,
    *,
    batch: int = 4,
    minimum: int = 2,
    shard_size: int = SHARD_SIZE,
) -> Summary:
    """Encodes videos and captions to the records in `out`, and the prompts that sampling needs.

    Args:
        rows: what to encode (see `data.sources.Videos.rows`). The records depend on the rows and not on the engine.
        config: its `video` decides the size of the clips, `weights.dtype` the type of the stored numbers.
        batch: clips that go through the networks at once.
        minimum: frames that a video must have.
        shard_size: rows in a shard, rounded up to whole batches.

    Raises:
        UserError: if `out` holds anything but records of the same making and table (it is left as it is), or if
            not one of the videos can be encoded.
    """
    shard_size = -(-shard_size // batch) * batch
    meta, prompts = engine.prepare(config)
    with RecordWriter(out, meta) as writer:
        _check_table(rows, writer)
        found = {entry.id for entry in writer.entries}
        waiting = [row for row in rows if row[0].id not in found and row[0].id not in writer.skipped]
        shards = [waiting[start : start + shard_size] for start in range(0, len(waiting), shard_size)]
        parts = Path(out).absolute() / "parts"
        made = 0
        for part in _finish(shards, Job(config, meta, parts, batch, minimum), engine):
            writer.take(parts, part.shard, part.skipped)
            made += part.shard.records
        shutil.rmtree(parts, ignore_errors=True)
        _write_skipped(Path(out) / "skipped.csv", writer.skipped)
        if not made and not found:
            raise UserError(
                f"none of {len(rows)} videos could be encoded", found=next(iter(writer.skipped.values()))
            )
        writer.add_prompts(prompts)
    return Summary(made, len(found), list(writer.skipped.items()))


def _finish(shards: Sequence[list[Row]], job: Job, engine: Engine) -> Iterator[Part]:
    """The parts of all shards in order: those that an interrupted run left, and what the engine makes."""
    make_folder(job.parts)
    left = [find_part(shard, job) for shard in shards]
    todo = [shard for shard, part in zip(shards, left, strict=True) if part is None]
    with contextlib.closing(engine.run(todo, job)) as made:
        for part in left:
            yield part or next(made)
        next(made, None)  # lets the engine finish its progress bar


def _check_table(rows: Sequence[Row], writer: RecordWriter) -> None:
    by_id = {entry.id: entry for entry, _ in rows}
    for entry in writer.entries:
        if by_id.get(entry.id) != entry:
            raise UserError(
                f"{writer.folder} holds the records of another table",
                expected=by_id.get(entry.id, f"a row for {entry.id!r}"),
                found=entry,
                fix="another output folder, or the table of that run (rows may be added to it)",
            )


def _write_skipped(path: Path, skipped: dict[str, str]) -> None:
    with writing(path):
        path.unlink(missing_ok=True)
    if skipped:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("video", "reason"), *skipped.items()])
        write_text(path, table.getvalue())
