"""TFRecord files or tables of mp4 files, from wherever tensorflow-io reaches, to input records.

    make tfio-shards IN='gs://bucket/part-*.tfrecord' OUT=videos
    make tfio-shards IN=http://server/captions.csv OUT=videos MODE=decode
    .venv-tfio/bin/python -m convert.tfio --in part.tfrecord --out videos --caption text

`ditmem encode --videos videos --out records` reads them in the main environment. The same command
again continues after the last finished shard, and tries once more what is listed in skipped.csv.
"""

import collections
import contextlib
import csv
import io
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import app, flags

from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import write_text

from . import decode, shards, sources
from .shards import Record
from .sources import Names, Row

IN = flags.DEFINE_multi_string(
    "in", None, "TFRecord file or table (.csv), at any address, or a pattern; may be repeated.", required=True
)
OUT = flags.DEFINE_string("out", None, "Folder for the records, on this machine.", required=True)
MODE = flags.DEFINE_enum("mode", "pass", ["pass", "decode"], "Keep the mp4 bytes, or decode them to frames.")
VIDEO = flags.DEFINE_string("video", "video", "Feature of mp4 bytes; in tables the column of paths.")
CAPTION = flags.DEFINE_string("caption", "caption", "Feature or column of captions.")
ID = flags.DEFINE_string("id", None, "Feature or column of unique names; by default the place of the row.")
SOURCE = flags.DEFINE_string("source", None, "Feature or column that tells what a clip was cut from.")
VIDEOS = flags.DEFINE_string("videos", None, "Where a table's paths start; by default where the table is.")
SIZE = flags.DEFINE_integer("shard_size", 64, "Records in a shard.", lower_bound=1)
STRICT = flags.DEFINE_bool("strict", False, "Fail if any video was skipped.")
DEBUG = flags.DEFINE_bool("debug", False, "Show the Python traceback of an error.")

TOLD = 5  # reasons that are printed; all are in skipped.csv


class Work:
    """Turns rows into records, and counts what became of them."""

    def __init__(self, mode: str, done: set[str]):
        self.mode, self.done = mode, done
        self.found = self.made = 0
        self.skipped: list[tuple[str, str]] = []
        self.left_out: collections.Counter[str] = collections.Counter()

    def records(self, rows: Iterable[Row]) -> Iterator[Record]:
        """The records of the rows that are not done yet, in order, some being made while one is in use."""
        for row, record in _ahead(self._missing(rows), self._make, ahead=2 * (os.cpu_count() or 1)):
            try:
                yield record.result()
            except UserError as error:
                self._skip(row, "; ".join(" ".join(line.split()) for line in str(error).split("\n")))
            else:
                self.made += 1
                self.left_out.update(row.left_out)

    def _missing(self, rows: Iterable[Row]) -> Iterator[Row]:
        seen = set()
        for row in rows:
            if row.id in seen:
                raise UserError(
                    f"several videos are called {row.id}", fix="another feature or column for --id"
                )
            seen.add(row.id)
            if row.id in self.done:
                self.found += 1
            else:
                yield row

    def _make(self, row: Row) -> Record:
        data, caption = row.read()
        metadata = dict(id=row.id, caption=caption, source=row.source, extra=json.dumps(row.extra))
        if self.mode == "decode":
            frames, fps = decode.decode(data)
            return metadata | {"fps": str(fps)}, {"frames": frames}
        decode.examine(data)
        return metadata, {"video": np.frombuffer(data, np.uint8)}

    def _skip(self, row: Row, why: str) -> None:
        self.skipped.append((row.id, why))
        if len(self.skipped) <= TOLD:
            print(f"skipped {row.id}: {why}", flush=True)


def main() -> None:
    if "://" in OUT.value:
        raise UserError("--out is no folder of this machine", found=OUT.value)
    names = Names(VIDEO.value, CAPTION.value, ID.value, SOURCE.value)
    inputs = [path for pattern in IN.value for path in sources.expand(pattern)]
    out, made_by = Path(OUT.value), {"mode": MODE.value, "names": vars(names)}
    work = Work(MODE.value, shards.open_folder(out, made_by))
    try:
        for path, count in shards.write(out, work.records(_rows(inputs, names)), SIZE.value):
            size = path.stat().st_size / 1e6
            print(f"{path}: {count} videos, {size:.1f} MB; skipped so far: {len(work.skipped)}", flush=True)
    finally:
        _write_skipped(out / "skipped.csv", work.skipped)
    for name, count in work.left_out.items():
        print(f"not in the records, since it is neither text nor numbers: {name} of {count} videos")
    total = f"{work.made} videos written, {work.found} found written, {len(work.skipped)} skipped"
    if not work.made and not work.found:
        raise UserError(f"{total}: {out}", found=work.skipped[0][1] if work.skipped else "no rows")
    shards.mark(out, made_by, complete=True)
    print(f"{total}: {out}")
    if work.skipped:
        print(f"the reasons are in {out / 'skipped.csv'}")
        if STRICT.value:
            raise UserError(
                f"{len(work.skipped)} videos were skipped", expected="none, since --strict was given"
            )


def _rows(inputs: list[str], names: Names) -> Iterator[Row]:
    for number, path in enumerate(inputs, start=1):
        print(f"reading {path} ({number} of {len(inputs)})", flush=True)
        yield from sources.rows(path, names, VIDEOS.value)


def _ahead(
    rows: Iterable[Row], make: Callable[[Row], Record], ahead: int
) -> Iterator[tuple[Row, Future[Record]]]:
    waiting, failure = collections.deque(), None
    with ThreadPoolExecutor() as pool:
        try:
            for row in rows:
                waiting.append((row, pool.submit(make, row)))
                if len(waiting) > ahead:
                    yield waiting.popleft()
        except UserError as error:
            failure = error
        yield from waiting  # before a file that cannot be read stops the run
    if failure:
        raise failure


def _write_skipped(path: Path, skipped: list[tuple[str, str]]) -> None:
    path.unlink(missing_ok=True)
    if skipped:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("video", "reason"), *skipped])
        write_text(path, table.getvalue())


def _guarded(arguments: list[str]) -> int:
    """The exit status of `main`, after its error in a few lines."""
    try:
        if len(arguments) > 1:
            raise UserError(f"unexpected argument {arguments[1]!r}", fix="flags start with --; see --help")
        main()
        return 0
    except UserError as error:
        if DEBUG.value:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # see sources
    status = _guarded(arguments)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(status)  # at an ordinary exit the S3 client inside of tensorflow-io ends with an abort


if __name__ == "__main__":
    app.run(_run)
