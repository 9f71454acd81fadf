"""Videos and captions of a folder or table to records."""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ditmem_jax.config import Config
from ditmem_jax.data.record import Entry, Record
from ditmem_jax.data.records import Line, RecordWriter, read_list, read_shard
from ditmem_jax.data.sources import Row, Videos, cut, expand, read_table
from ditmem_jax.encode.engines import Engine, Local
from ditmem_jax.encode.shards import Job, Part, find_part
from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import make_folder, write_text, writing
from ditmem_jax.storage.locks import owned
from ditmem_jax.storage.weights import load_umt5, load_vae

SHARD_SIZE = 64  # rows at least; a multiple of the batch


@dataclasses.dataclass(frozen=True)
class Summary:
    """How many records were made now, how many were there before, and the rows (id, reason) left out.

    Attributes:
        again: records made anew of videos whose files have changed.
        retold: records whose caption, source or other columns have changed.
        removed: records of rows that are gone from the table.
        complaints: of how many errors FFmpeg told while decoding, by id.
        left_out: files in the places that are neither videos nor captions of one.
    """

    made: int
    found: int
    skipped: list[tuple[str, str]]
    again: int = 0
    retold: int = 0
    removed: int = 0
    complaints: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        changes = {
            "encoded again": self.again,
            "with another caption or columns": self.retold,
            "removed": self.removed,
        }
        told = "".join(f", {count} {what}" for what, count in changes.items() if count)
        return f"{self.made} videos encoded, {self.found} found encoded{told}, {len(self.skipped)} skipped"


def encode_videos(
    config: Config,
    out: str | Path,
    videos: str | Path | Sequence[str | Path] = (),
    table: str | Path | None = None,
    engine: Engine | None = None,
    *,
    video_column: str | None = None,
    caption_column: str | None = None,
    **options: Any,
) -> Summary:
    """Encode the videos of a folder, or of a table, to the records in `out`; a second call takes up what has changed.

    Args:
        config: its `weights` are loaded, its `video` decides the size of the clips.
        videos: folders, zip or tar files, folders of input records, or patterns such as "part*.zip"; by default the
            table's own folder.
        table: CSV, TSV, JSON or parquet with columns of videos and captions (see `data.sources.read_table`); by
            default each video takes its caption from the file beside it.
        engine: where to encode, such as `encode.engines.OnRay()`; by default in this process.
        video_column, caption_column: names of these columns of the table, by default those in use.
        options: `batch`, `minimum`, `strict` and `shard_size` as `encode_dataset` takes them.
    Raises:
        UserError: if there are no such videos or weights, and as `encode_dataset`.
    """
    places = [videos] if isinstance(videos, (str, Path)) else list(videos)
    if table is None and not places:
        raise UserError("nothing to encode", expected="a table, videos or both")
    found = Videos(expand(map(str, places or [Path(table or ".").parent])))
    rows = found.rows(None if table is None else read_table(table, video_column, caption_column))
    if config.video.sampling == "rate":
        rows = cut(rows, config.video.clips)
    weights = os.path.abspath(config.weights.path)  # workers of an engine may run in other folders
    config = dataclasses.replace(config, weights=dataclasses.replace(config.weights, path=weights))
    with owned(out):
        pass  # else refused before the networks are loaded
    engine = engine or Local((load_vae(config), load_umt5(config)))
    summary = encode_dataset(rows, out, config, engine, **options)
    return dataclasses.replace(summary, left_out=found.left_out)


def encode_dataset(
    rows: Sequence[Row],
    out: str | Path,
    config: Config,
    engine: Engine,
    *,
    batch: int = 4,
    minimum: int = 2,
    strict: bool = False,
    shard_size: int = SHARD_SIZE,
) -> Summary:
    """Encodes videos and captions to the records in `out`, and the prompts that sampling needs.

    Args:
        rows: what to encode (see `data.sources.Videos.rows`). The records depend on the rows and not on the engine.
        config: its `video` decides the size of the clips, `weights.dtype` the type of the stored numbers.
        batch: clips that go through the networks at once.
        minimum: frames that a video must have.
        strict: leave out videos of which FFmpeg tells errors while decoding.
        shard_size: rows in a shard, rounded up to whole batches.

    Raises:
        UserError: if `out` holds anything but records of the same making and mostly of the same table (it is left as it
            is), or if not one of the videos can be encoded.
    """
    shard_size = -(-shard_size // batch) * batch
    meta, prompts = engine.prepare(config)
    with RecordWriter(out, meta) as writer:
        changes = _compare(rows, writer)
        parts = Path(out).absolute() / "parts"
        job = Job(config, meta, parts, batch, minimum, strict)
        again = _in_shards(changes.again, shard_size)
        there = {line.entry.id for line in writer.lines}
        waiting = [row for row in rows if row[0].id not in there and row[0].id not in writer.skipped]
        finished = _finish(again + _in_shards(waiting, shard_size), job, engine)
        made, new = 0, {}
        for part in itertools.islice(finished, len(again)):
            new |= _of_part(parts, part)
            writer.skipped |= part.skipped
        _change(writer, changes, new, engine, config)
        for part in finished:
            writer.take(parts, part.shard, part.skipped)
            made += part.shard.records
        shutil.rmtree(parts, ignore_errors=True)
        _write_skipped(Path(out) / "skipped.csv", writer.skipped)
        found = len(there) - len(changes.again) - len(changes.retold) - len(changes.removed)
        if not made and not there:
            raise UserError(
                f"none of {len(rows)} videos could be encoded", found=next(iter(writer.skipped.values()))
            )
        writer.add_prompts(prompts)
        complaints = {
            line.entry.id: line.facts.messages
            for line in writer.current()
            if line.facts and line.facts.messages
        }
    counts = dict(
        again=len(new), retold=len(changes.retold), removed=len(changes.removed), complaints=complaints
    )
    return Summary(made, found, list(writer.skipped.items()), **counts)


@dataclasses.dataclass(frozen=True)
class _Changes:
    """What has changed of the rows whose records are there: files, what the table says, rows that are gone."""

    again: list[Row]
    retold: dict[str, Entry]
    removed: list[str]


def _compare(rows: Sequence[Row], writer: RecordWriter) -> _Changes:
    """Compares rows with the records that are there; a video that is gone meanwhile keeps its record."""
    by_id = {entry.id: (entry, place) for entry, place in rows}
    changes = _Changes([], {}, [])
    for line in writer.lines:
        row = by_id.get(line.entry.id)
        if row is None:
            changes.removed.append(line.entry.id)
        elif _is_other_video(row, line):
            changes.again.append(row)
        elif row[0] != line.entry:
            changes.retold[line.entry.id] = row[0]
    if 2 * len(changes.removed) > len(writer.lines):
        raise UserError(
            f"{writer.folder} holds the records of another table",
            expected=f"rows for most of its {len(writer.lines)} records",
            found=f"none for {len(changes.removed)}, such as {changes.removed[0]!r}",
            fix="another output folder, or the table of that run",
        )
    return changes


def _is_other_video(row: Row, line: Line) -> bool:
    entry, place = row
    if isinstance(place, UserError):
        return False
    if any(entry.extra.get(name) != line.entry.extra.get(name) for name in ("start", "end")):
        return True
    state = place.state_if_there()
    if line.stamp is None or state is None or state == (line.stamp.size, line.stamp.modified):
        return False
    try:
        return place.digest() != line.stamp.digest
    except UserError:
        return True  # reading it once more says why


def _change(
    writer: RecordWriter,
    changes: _Changes,
    new: dict[str, Callable[[], Record]],
    engine: Engine,
    config: Config,
) -> None:
    """Brings the records that are there up to date."""
    captions = {line.entry.id: line.entry.caption for line in writer.lines}
    mended = [entry for id, entry in changes.retold.items() if entry.caption != captions[id]]
    texts = engine.embed(config, [entry.caption for entry in mended]) if mended else []
    embeddings = {entry.id: text for entry, text in zip(mended, texts, strict=True)}

    def retold(record: Record) -> Record:
        embedding = embeddings.get(record.id, record.text_embedding)
        return dataclasses.replace(record, **vars(changes.retold[record.id]), text_embedding=embedding)

    done: dict[str, Callable[[Record], Record | None]] = dict.fromkeys(changes.retold, retold)
    done |= {
        entry.id: lambda record: new[record.id]() if record.id in new else None for entry, _ in changes.again
    }
    done |= dict.fromkeys(changes.removed, lambda record: None)
    if done:
        writer.rewrite(done)


def _of_part(parts: Path, part: Part) -> dict[str, Callable[[], Record]]:
    """How to get the records of a finished part, by id."""
    if not part.shard.records:
        return {}
    return {
        line.entry.id: functools.partial(read_shard, parts, part.shard, number)
        for number, line in enumerate(read_list(parts, part.shard))
    }


def _in_shards(rows: Sequence[Row], size: int) -> list[list[Row]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _finish(shards: Sequence[list[Row]], job: Job, engine: Engine) -> Iterator[Part]:
    """The parts of all shards in order: those that an interrupted run left, and what the engine makes."""
    make_folder(job.parts)
    left = [find_part(shard, job) for shard in shards]
    todo = [shard for shard, part in zip(shards, left, strict=True) if part is None]
    with contextlib.closing(engine.run(todo, job)) as made:
        for part in left:
            yield part or next(made)
        next(made, None)  # lets the engine finish its progress bar


def _write_skipped(path: Path, skipped: dict[str, str]) -> None:
    with writing(path):
        path.unlink(missing_ok=True)
    if skipped:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("video", "reason"), *skipped.items()])
        write_text(path, table.getvalue())
