"""The places where video files lie: folders, zip and tar files, parquet files, and folders of input records.

Nothing is unpacked, but for compressed tar files, into a temporary file: a video of an archive is read from it when its
turn comes, and no more of it than is needed.

Input records are ArrayRecord shards `videos-00000.array_record`, .... Each record is the bytes of a safetensors file
with the video file as the uint8 tensor `video`, and as metadata the texts id, caption, source and extra (a JSON object).
In place of the file there may be its frames, as the uint8 tensor `frames` [T, H, W, 3] and the text `fps`.
"""

import abc
import atexit
import bz2
import collections
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from ditmem_jax.data import tables
from ditmem_jax.data.record import Entry, to_safetensors
from ditmem_jax.data.video import Part, Stamp, Video, VideoBytes, VideoFile, VideoStream
from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import read_json, reading, replacing

INPUT_RECORDS = "videos-*.array_record"
BOMB = 50  # bytes that one byte of a zip file may stand for, for all of them to be read
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


@dataclasses.dataclass(frozen=True)
class Place(abc.ABC):
    """Where a video lies: by the name `name` in `path`. Small, for other processes to open it.

    Attributes:
        part: the part of it that is meant.
    Raises:
        UserError: from `read`, `open` and what tells of its bytes, if it cannot be read.
    """

    path: str
    name: str

    part: Part = dataclasses.field(default=Part(), kw_only=True)

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"

    @abc.abstractmethod
    def read(self, most: int = -1) -> bytes:
        """All bytes, or the first ones."""

    @abc.abstractmethod
    def open(self) -> VideoFile | Video: ...

    def state(self) -> tuple[int, int]:
        """Bytes and time of change of the file, of one of many what tells it has changed without reading it."""
        with reading(Path(self.path)):
            status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns

    def state_if_there(self) -> tuple[int, int] | None:
        try:
            return self.state()
        except UserError:
            return None

    def digest(self) -> str:
        """Of the bytes, which are compared with the checksum of their archive where that has one."""
        return _digest([self.read()])

    def stamp(self) -> Stamp:
        return Stamp(*self.state(), self.digest())


def _digest(blocks: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _blocks(file: io.RawIOBase | io.BufferedIOBase) -> Iterator[bytes]:
    return iter(functools.partial(file.read, 1 << 20), b"")


class InFolder(Place):
    def read(self, most: int = -1) -> bytes:
        with reading(self.open()), open(self.open(), "rb") as file:
            return file.read(most)

    def open(self) -> Path:
        return Path(self.path, self.name)

    def state(self) -> tuple[int, int]:
        with reading(self.open()):
            status = os.stat(self.open())
        return status.st_size, status.st_mtime_ns

    def digest(self) -> str:
        with reading(self.open()), open(self.open(), "rb") as file:
            return _digest(_blocks(file))


class InZip(Place):
    def read(self, most: int = -1) -> bytes:
        return self.open().read(most)

    def open(self) -> VideoStream:
        try:
            file: Any = _open_zip(self.path).open(self.name)  # of a class that its stub hides
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: for want of a password
            raise UserError(f"cannot read {self}", found=error) from error
        return VideoStream(file, self._info.file_size, str(self))

    def state(self) -> tuple[int, int]:
        return self._info.file_size, self._info.CRC

    def digest(self) -> str:
        """Of the bytes; of a file that claims to be far larger than packed, which no video is, of its checksum."""
        info = self._info
        if info.file_size > BOMB * info.compress_size:
            return _digest([f"{info.file_size} {info.CRC}".encode()])
        return _digest(_blocks(self.open()))

    @property
    def _info(self) -> zipfile.ZipInfo:
        try:
            return _open_zip(self.path).getinfo(self.name)
        except KeyError as error:
            raise UserError(f"cannot read {self}", found=error) from error


@dataclasses.dataclass(frozen=True)
class InTar(Place):
    start: int
    size: int
    modified: int

    def read(self, most: int = -1) -> bytes:
        return self.open().read(most)

    def open(self) -> VideoStream:
        with reading(Path(self.path)):
            return VideoStream(_Window(_plain_tar(self.path), self.start), self.size, str(self))

    def state(self) -> tuple[int, int]:
        return self.size, self.modified

    def digest(self) -> str:
        return _digest(_blocks(self.open()))


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

    def digest(self) -> str:
        return _digest([_open_input_records(self.path)[self.index]])


@dataclasses.dataclass(frozen=True)
class InParquet(Place):
    """A file in a column of a parquet file, in row `number` from 1."""

    column: str
    number: int

    def read(self, most: int = -1) -> bytes:
        try:
            data = tables.embedded_file(self.path, self.column, self.number)
        except (OSError, IndexError, pyarrow.ArrowException) as error:
            raise UserError(f"cannot read {self}", found=error) from error
        if not data:
            raise UserError(
                f"row {self.number} of {self.path} holds no video", found=f"no bytes in {self.column}"
            )
        return data if most < 0 else data[:most]

    def open(self) -> VideoBytes:
        return VideoBytes(self.read(), str(self))


# --- folders and archives ---------------------------------------------------------------------------------------


def list_folder(folder: Path) -> list[Place]:
    """Every file below a folder, also below linked folders; each is entered once, by its own name rather than a link."""
    places, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort(key=lambda name: (os.path.islink(os.path.join(root, name)), name))
        names = (Path(root, file) for file in files)
        places += [InFolder(str(folder), p.relative_to(folder).as_posix()) for p in names if p.is_file()]
    return places


def list_archive(path: Path) -> list[Place]:
    """The files of a zip or tar file.

    Raises:
        UserError: for another file, a damaged one, or one with two files of the same name.
    """
    return _list_zip(path) if zipfile.is_zipfile(path) else _list_tar(path)


def _list_zip(path: Path) -> list[Place]:
    names = [info.filename for info in _open_zip(str(path)).infolist() if not info.is_dir()]
    _refuse_doubles(path, names)
    return [InZip(str(path), name) for name in names]


def _list_tar(path: Path) -> list[Place]:
    try:
        with tarfile.open(_plain_tar(str(path)), "r:") as tar:
            members = [member for member in tar if member.isreg() and member.sparse is None]
            tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"a damaged header at byte {tar.offset}")
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        expected = "a folder, or a whole zip or tar file"
        raise UserError(f"cannot read {path}", expected=expected, found=error) from error
    names = [str(PurePosixPath(member.name)) for member in members]
    _refuse_doubles(path, names)
    return [
        InTar(str(path), name, member.offset_data, member.size, int(member.mtime))
        for name, member in zip(names, members, strict=True)
    ]


_unpacking = threading.Lock()


def _plain_tar(path: str) -> str:
    """The tar file itself, or a temporary file of this process where it is compressed."""
    with open(path, "rb") as file:
        start = file.read(5)
    opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
    if opener is None:
        return path
    with _unpacking:  # one of many threads does it
        return _unpacked(path, _version(path), opener)


@functools.lru_cache(maxsize=256)
def _unpacked(path: str, version: tuple[int, int, int], opener: Any) -> str:
    folder = tempfile.mkdtemp(prefix="ditmem-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    plain = Path(folder, "plain.tar")
    print(f"note: {path} is compressed, and unpacked to {plain} for this run", file=sys.stderr)
    with opener(path, "rb") as source, open(plain, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    return str(plain)


def _refuse_doubles(path: Path, names: list[str]) -> None:
    if double := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise UserError(f"{path} has several members of the same name", found=", ".join(double[:5]))


def _open_zip(path: str) -> zipfile.ZipFile:
    try:
        return _zip(path, _version(path))
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:  # the last for unknown versions
        raise UserError(f"cannot read {path}", expected="a whole zip file", found=error) from error


@functools.lru_cache(maxsize=256)
def _zip(path: str, version: tuple[int, int, int]) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _version(path: str) -> tuple[int, int, int]:
    """What tells that a file has been replaced since it was opened."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


# --- input records ----------------------------------------------------------------------------------------------


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
                writer.write(to_safetensors({"video": np.frombuffer(data, np.uint8)}, metadata))
            writer.close()


def list_input_records(folder: Path) -> list[tuple[Entry, Place]]:
    """The videos of a folder of input records, by what these tell of them; UserError if it is not complete."""
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


def _open_input_records(path: str) -> ArrayRecordDataSource:
    try:
        return _records(path, _version(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot read {path}", expected="input records", found=str(error)[:200]) from error


@functools.lru_cache(maxsize=256)
def _records(path: str, version: tuple[int, int, int]) -> ArrayRecordDataSource:
    return ArrayRecordDataSource(path)


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
