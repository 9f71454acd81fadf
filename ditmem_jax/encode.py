"""`python -m ditmem_jax.encode --table captions.csv --videos DIR --out RECORDS`: videos to records.

Every row of the table (CSV, parquet or JSON lines) becomes a record of VAE latents and its caption's embedding (see
`data.records`), with the video's number of frames and frame rate, which a bank takes over. The videos lie in a folder,
in zip or tar files, which are not unpacked, or in input records; without a table each takes its caption from the text
file beside it (see `data.sources`):

    python -m ditmem_jax.encode --table OpenVid-1M.csv --videos 'OpenVid_part*.zip' --out records --engine ray

`--engine ray` uses all cores of this machine, or with `--address` a Ray cluster, and makes the same records.

Running the same command again continues an interrupted run: it makes the shards that are missing. On complete
records it takes up rows that were added to the table, and tries the videos once more that could not be encoded. Those
are listed with the reason in `skipped.csv` beside the records. Records that were damaged meanwhile are refused.
"""

import contextlib
import csv
import dataclasses
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from ditmem_jax import cli
from ditmem_jax.checkpoint import load_umt5, load_vae
from ditmem_jax.config import Config
from ditmem_jax.data.files import write_text
from ditmem_jax.data.records import RecordWriter
from ditmem_jax.data.sources import Row, Videos, expand, read_table
from ditmem_jax.encoder import Job, Part, find_part
from ditmem_jax.engines import Engine, Local, OnRay
from ditmem_jax.errors import UserError

SHARD_SIZE = 64  # rows at least; a multiple of the batch


@dataclasses.dataclass(frozen=True)
class Summary:
    """How many records were made now, how many were there before, and the rows (id, reason) left out."""

    made: int
    found: int
    skipped: list[tuple[str, str]]

    def __str__(self) -> str:
        return f"{self.made} videos encoded, {self.found} found encoded, {len(self.skipped)} skipped"


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
    job.parts.mkdir(exist_ok=True)
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
    path.unlink(missing_ok=True)
    if skipped:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("video", "reason"), *skipped.items()])
        write_text(path, table.getvalue())


def _rows() -> list[Row]:
    """What --table and --videos name."""
    if TABLE.value is None:
        if not VIDEOS.value:
            raise UserError("nothing to encode", expected="--table, --videos or both", fix="see --help")
        return Videos(expand(VIDEOS.value)).rows()
    table = read_table(TABLE.value)
    return Videos(expand(VIDEOS.value or [str(Path(TABLE.value).parent)])).rows(table)


def _engine(config: Config) -> Engine:
    if cluster := CLUSTER():
        return OnRay(*cluster)
    return Local((load_vae(config), load_umt5(config)))


def main() -> None:
    config = cli.load_config(CONFIG)
    if RESIZE.value:
        config = dataclasses.replace(config, video=dataclasses.replace(config.video, resize=RESIZE.value))
    weights = os.path.abspath(config.weights.path)  # workers may run in other folders
    config = dataclasses.replace(config, weights=dataclasses.replace(config.weights, path=weights))
    rows = _rows()
    summary = encode_dataset(
        rows, OUT.value, config, _engine(config), batch=BATCH.value, minimum=MINIMUM.value
    )
    print(f"{summary}: {OUT.value}")
    if summary.skipped:
        reasons = Path(OUT.value) / "skipped.csv"
        print(f"the reasons are in {reasons}")
        if STRICT.value:
            raise UserError(
                f"{len(summary.skipped)} videos were skipped", expected="none, since --strict was given"
            )


if __name__ == "__main__":
    CONFIG = cli.define_config("configs/tiny.py")
    TABLE = flags.DEFINE_string(
        "table", None, "CSV, parquet or JSON lines with columns video (or video_path) and caption."
    )
    flags.DEFINE_alias("csv", "table")
    VIDEOS = flags.DEFINE_multi_string(
        "videos",
        [],
        "Folder, zip or tar file, folder of input records, or a pattern such as 'part*.zip'; may be repeated. "
        "By default the table's own folder.",
    )
    OUT = flags.DEFINE_string("out", None, "Folder for the records.", required=True)
    STRICT = flags.DEFINE_bool("strict", False, "Fail if any video was skipped.")
    RESIZE = flags.DEFINE_enum("resize", None, ["stretch", "crop"], "Overrides config.video.resize.")
    BATCH = flags.DEFINE_integer("batch", 4, "Clips that are encoded at once.", lower_bound=1)
    MINIMUM = flags.DEFINE_integer("min_frames", 2, "Frames that a video must have.", lower_bound=1)
    CLUSTER = cli.define_cluster("encodes")
    cli.run(main)
