"""The videos of a user: a table that says what they show, and the places where their files lie.

A table is a CSV, a parquet file or JSON lines. A place is a folder, a zip file, a tar file, or a folder of input
records; without a table each video takes its caption from a text file beside it (`a.mp4`, `a.txt`). Nothing is
unpacked: a video of an archive is read from it when its turn comes, and no more of it than is needed.

Input records are ArrayRecord shards `videos-00000.array_record`, .... Each record is the bytes of a safetensors file
with the video file as the uint8 tensor `video`, and as metadata the texts id, caption, source and extra (a JSON object).
In place of the file there may be its frames, as the uint8 tensor `frames` [T, H, W, 3] and the text `fps`.
"""

import abc
import collections
import csv
import dataclasses
import functools
import glob
import io
import itertools
import json
import os
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from ditmem_jax.data.records import Entry
from ditmem_jax.data.video import Clip, Video, VideoBytes, VideoFile, VideoStream, read_clip
from ditmem_jax.errors import UserError
from ditmem_jax.models.wan.tokenizer import clean
from ditmem_jax.storage.files import parse_json, read_json, reading, replacing

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
LONGEST = 1 << 20  # bytes of a caption
PACKED = 50  # bytes that one byte of a zip file may stand for, for all of them to be read
INPUT_RECORDS = "videos-*.array_record"


# --- tables -----------------------------------------------------------------------------------------------------


def read_table(path: str | Path) -> list[tuple[Entry, str]]:
    """The rows of a table with columns `video` or `video_path`, and `caption`, and the video of each.

    A column `source` says what each video was cut from, else it stands for itself; other columns become `extra`. The
    id of a row is its video, with #2, #3, ... for further rows of the same video.

    Raises:
        UserError: if the file is no such table.
    """
    readers = {".csv": _csv_rows, ".parquet": _parquet_rows, ".jsonl": _json_rows}
    suffix = Path(path).suffix.lower()
    if suffix not in readers:
        raise UserError(
            f"{path} is no table that we read", expected=f"a file {', '.join(readers)}", found=suffix
        )
    columns, rows = readers[suffix](Path(path))
    video = next((name for name in ("video", "video_path") if name in columns), None)
    if video is None or "caption" not in columns:
        raise UserError(
            f"{path} lacks the column {'caption' if video else 'video'}",
            expected="columns video (or video_path) and caption",
            found=", ".join(columns) or "an empty file",
        )
    if not rows:
        raise UserError(f"{path} has no rows", expected="a row for each video")
    counts = collections.Counter()
    entries = []
    for row in rows:
        known = (video, "caption", "source")
        extra = {name: _text(value) for name, value in row.items() if name not in known}
        name, caption, source = (_text(row.get(column)).strip() for column in known)
        counts[name] += 1
        id = name if counts[name] == 1 else f"{name}#{counts[name]}"
        entries.append((Entry(id, caption, source or name, extra=extra), name))
    return entries


def _csv_rows(path: Path) -> tuple[list[str], list[dict]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}", expected="a CSV file in UTF-8", found=error) from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise UserError(
                f"row {number} of {path} has more values than there are columns",
                found=", ".join(row[None]),
                fix='put captions with commas into "quotation marks"',
            )
    return columns, rows


def _parquet_rows(path: Path) -> tuple[list[str], list[dict]]:
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}", expected="a parquet file", found=error) from error
    columns = {field.name: _values(path, field, table[field.name]) for field in table.schema}
    return list(columns), [
        dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
    ]


def _values(path: Path, field: pyarrow.Field, column: pyarrow.ChunkedArray) -> list[Any]:
    """The values of a column as Python's, which has no such large dates or such time zones as Arrow may hold."""
    try:
        return column.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, LookupError, TypeError, ImportError) as error:
        raise UserError(
            f"the column {field.name} of {path} cannot be read",
            expected="numbers or text",
            found=f"{field.type}: {error}",
            fix="leave that column out",
        ) from error


def _json_rows(path: Path) -> tuple[list[str], list[dict]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}", expected="JSON lines in UTF-8", found=error) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        row = parse_json(line or "{}", f"line {number} of {path}")
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {path} is no JSON object", found=line[:80])
        rows += [row] if row else []
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


# --- places -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place(abc.ABC):
    """Where a video lies: by the name `name` in `path`. Small, for other processes to open it.

    Raises:
        UserError: from `read` and `open`, if it cannot be read.
    """

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"

    @abc.abstractmethod
    def read(self, most: int = -1) -> bytes:
        """All bytes, or the first ones."""

    @abc.abstractmethod
    def open(self) -> VideoFile | Video: ...

    def check(self) -> None:  # noqa: B027  # most places have nothing to compare with
        """Compares the whole video with the checksum of its archive, where that has one."""


class InFolder(Place):
    def read(self, most: int = -1) -> bytes:
        with reading(self.open()), open(self.open(), "rb") as file:
            return file.read(most)

    def open(self) -> Path:
        return Path(self.path, self.name)


class InZip(Place):
    def read(self, most: int = -1) -> bytes:
        return self.open().read(most)

    def open(self) -> VideoStream:
        try:
            archive = _open_zip(self.path)
            file: Any = archive.open(self.name)  # of a class that its stub hides
            return VideoStream(file, archive.getinfo(self.name).file_size, str(self))
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: for want of a password
            raise UserError(f"cannot read {self}", found=error) from error

    def check(self) -> None:
        """Read the file through, which checks its sum; not one that claims to be far larger than packed: no video is."""
        info, stream = _open_zip(self.path).getinfo(self.name), self.open()
        while info.file_size <= PACKED * info.compress_size and stream.read(1 << 20):
            pass


@dataclasses.dataclass(frozen=True)
class InTar(Place):
    start: int
    size: int

    def read(self, most: int = -1) -> bytes:
        return self.open().read(most)

    def open(self) -> VideoStream:
        with reading(Path(self.path)):
            return VideoStream(_Window(self.path, self.start), self.size, str(self))


class _Window(io.FileIO):
    """A file from the byte `start` on."""

    def __init__(self, path: str, start: int):
        super().__init__(path)
        self._start = start

    def tell(self) -> int:
        return super().tell() - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return super().seek(self._start + offset, whence) - self._start


@dataclasses.dataclass(frozen=True)
class InRecords(Place):
    index: int

    def read(self, most: int = -1) -> bytes:
        _, video = _read_input_record(self.path, self.index)
        if isinstance(video, Video):
            raise UserError(f"{self} holds decoded frames", expected="a video file")
        return video if most < 0 else video[:most]

    def open(self) -> VideoFile | Video:
        _, video = _read_input_record(self.path, self.index)
        return video if isinstance(video, Video) else VideoBytes(video, str(self))


Row = tuple[Entry, Place | UserError]
"""A video to encode, and where it lies or why that is not known."""


class Videos:
    """The videos of folders, zip files, tar files and folders of input records.

    Raises:
        UserError: for a place that is missing, of another kind or damaged.
    """

    def __init__(self, places: Sequence[str | Path]):
        self.places = [Path(place).absolute() for place in places]
        self._folders: list[Path] = []
        self._archives: list[list[Place]] = []
        self._records: list[tuple[Entry, Place]] = []
        for path in self.places:
            if path.is_dir() and any(path.glob(INPUT_RECORDS)):
                self._records += _list_input_records(path)
            elif path.is_dir():
                self._folders.append(path)
            elif zipfile.is_zipfile(path):
                self._archives.append(_list_zip(path))
            else:
                self._archives.append(_list_tar(path))
        self._by_last_part: dict[str, list[Place]] = collections.defaultdict(list)
        for place in [*itertools.chain(*self._archives), *(place for _, place in self._records)]:
            self._by_last_part[PurePosixPath(place.name).name].append(place)

    def find(self, video: str) -> Place:
        """The place of the video that a table calls `video`: its path below a folder or in an archive.

        In archives the path may lack parts in front, so that a table need not know how they were packed.

        Raises:
            UserError: if there is no such video, or more than one, or the path leaves the folder.
        """
        name = PurePosixPath(video)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"the path {video} leaves the folder of the videos")
        try:
            found: list[Place] = [
                InFolder(str(path), str(name)) for path in self._folders if (path / name).is_file()
            ]
        except OSError as error:
            raise UserError(f"no video can be called {video[:80]!r}", found=error.strerror) from error
        members = self._by_last_part.get(name.name, [])
        exact = [place for place in members if place.name == str(name)]
        found += exact or [place for place in members if place.name.endswith(f"/{name}")]
        if len(found) != 1:
            raise UserError(
                f"{len(found) or 'no'} videos are called {video}",
                expected=f"one in {', '.join(map(str, self.places))}",
                found=", ".join(map(str, found)) or None,
            )
        return found[0]

    def rows(self, table: Iterable[tuple[Entry, str]] | None = None) -> list[Row]:
        """The videos of a table (see `read_table`); without a table all that there are, captioned by text files beside them.

        Raises:
            UserError: without a table, if there is no video, no caption, or two videos have the same name.
        """
        if table is not None:
            return [(entry, self._find(video)) for entry, video in table]
        rows: list[Row] = list(self._records)
        for places in [*map(_list_folder, self._folders), *self._archives]:
            by_name = {place.name: place for place in places}
            for name in sorted(filter(_is_video, by_name)):
                beside = by_name.get(str(PurePosixPath(name).with_suffix(".txt")))
                caption = _decode_text(beside).strip() if beside else ""
                rows.append((Entry(name, caption, name), by_name[name]))
        self._check(rows)
        return rows

    def _find(self, video: str) -> Place | UserError:
        try:
            return self.find(video)
        except UserError as error:
            return error

    def _check(self, rows: list[Row]) -> None:
        where = ", ".join(map(str, self.places))
        if not rows:
            raise UserError(f"there are no videos in {where}", expected=f"files {', '.join(SUFFIXES)}")
        if not any(entry.caption for entry, _ in rows):
            raise UserError(
                f"no video in {where} has a caption",
                fix="--table, or a text file beside each video: a.txt for a.mp4",
            )
        counts = collections.Counter(entry.id for entry, _ in rows)
        if double := [id for id, count in counts.items() if count > 1]:
            raise UserError(
                f"several videos are called {double[0]}", found=f"{len(double)} such names in {where}"
            )


def read_row(row: Row, options: dict[str, Any]) -> Clip | str:
    """The clip of a row, as `read_clip` makes it with these options, or why there is none."""
    entry, place = row
    try:
        if isinstance(place, UserError):
            raise place
        if not clean(entry.caption):
            raise UserError("the caption is empty")
        clip = read_clip(place.open(), **options)
        place.check()
        return clip
    except UserError as error:
        return error.in_one_line()


def expand(patterns: Iterable[str]) -> list[Path]:
    """The files and folders that paths and patterns such as `parts/*.zip` name.

    Raises:
        UserError: if one names nothing.
    """
    places = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        if not found:
            raise UserError(f"no file or folder {pattern}", expected="the videos", fix="--videos=PLACE")
        places += map(Path, found)
    return places


def write_input_records(
    folder: str | Path, videos: Iterable[tuple[Entry, bytes]], shard_size: int = 64
) -> None:
    """Writes video files as input records, `shard_size` in a shard."""
    videos = iter(videos)
    for number in itertools.count():
        if not (shard := list(itertools.islice(videos, shard_size))):
            break
        with replacing(Path(folder) / f"videos-{number:05d}.array_record", RuntimeError) as temporary:
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            for entry, data in shard:
                metadata = dataclasses.asdict(entry) | {"extra": json.dumps(entry.extra)}
                writer.write(safetensors.numpy.save({"video": np.frombuffer(data, np.uint8)}, metadata))
            writer.close()


def _is_video(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")  # Macs pack ._a.mp4 beside a.mp4


def _decode_text(place: Place) -> str:
    data = place.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise UserError(f"{place} is no caption", expected=f"at most {LONGEST:,} bytes", found="more")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {place}", expected="text in UTF-8", found=error) from error


def _list_folder(folder: Path) -> list[Place]:
    return [
        InFolder(str(folder), path.relative_to(folder).as_posix())
        for path in folder.rglob("*")
        if path.is_file()
    ]


def _list_zip(path: Path) -> list[Place]:
    names = [info.filename for info in _open_zip(str(path)).infolist() if not info.is_dir()]
    _refuse_doubles(path, names)
    return [InZip(str(path), name) for name in names]


def _list_tar(path: Path) -> list[Place]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isreg() and member.sparse is None]
            tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"a damaged header at byte {tar.offset}")
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"cannot read {path}", expected="a folder, or a whole zip or uncompressed tar file", found=error
        ) from error
    names = [str(PurePosixPath(member.name)) for member in members]
    _refuse_doubles(path, names)
    return [
        InTar(str(path), name, member.offset_data, member.size)
        for name, member in zip(names, members, strict=True)
    ]


def _refuse_doubles(path: Path, names: list[str]) -> None:
    if double := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise UserError(f"{path} has several members of the same name", found=", ".join(double[:5]))


@functools.lru_cache(maxsize=256)
def _open_zip(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:  # the last for unknown versions
        raise UserError(f"cannot read {path}", expected="a whole zip file", found=error) from error


def _list_input_records(folder: Path) -> list[tuple[Entry, Place]]:
    state = folder / "videos.json"  # kept by `make tfio-shards`
    try:
        complete = not state.exists() or read_json(state)["complete"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{state} is damaged", found=error, fix="delete the folder, and make tfio-shards once more"
        ) from error
    if not complete:
        raise UserError(
            f"the input records in {folder} are not complete", fix="make tfio-shards once more; it continues"
        )
    rows = []
    for path in sorted(folder.glob(INPUT_RECORDS)):
        for index in range(len(_open_input_records(str(path)))):
            entry, _ = _read_input_record(str(path), index)
            rows.append((entry, InRecords(str(path), entry.source, index)))
    return rows


@functools.lru_cache(maxsize=256)
def _open_input_records(path: str) -> ArrayRecordDataSource:
    try:
        return ArrayRecordDataSource(path)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot read {path}", expected="input records", found=str(error)[:200]) from error


def _read_input_record(path: str, index: int) -> tuple[Entry, bytes | Video]:
    try:
        data = _open_input_records(path)[index]
        tensors = safetensors.numpy.load(data)
        values = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        fps = float(values.pop("fps")) if "frames" in tensors else None
        entry = Entry(**values | {"extra": json.loads(values["extra"])})
        return entry, tensors["video"].tobytes() if fps is None else Video(tensors["frames"], fps)
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        safetensors.SafetensorError,
    ) as error:
        raise UserError(f"record {index} of {path} is damaged", found=str(error)[:200]) from error
