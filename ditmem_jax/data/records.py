"""Encoded videos on disk: safetensors bytes in ArrayRecord shards, for training sets and banks alike.

A folder of records holds

    index.json                  format, what the records have in common, what made them, the finished shards, digests
                                of the lists, of the prompts and of itself, and videos that could not be encoded, by
                                id, with the reason
    records-00000.array_record  the records of a shard, each the bytes of one safetensors file
    records-00000.jsonl         id, caption, source, extra columns, checksum, facts of the video and stamp of its file of
                                each, a JSON object a line
    prompts.safetensors         text embeddings that belong to no video, such as the empty prompt's

A shard in which records have changed is written anew under a further name, records-00000-1.
Every file appears whole, and `index.json` names a shard only once the shard is on the disk. So a writer that
was killed leaves a folder that the next writer continues after the last finished shard.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float

from ditmem_jax.config import build
from ditmem_jax.data.record import (
    DTYPES,
    Entry,
    Record,
    checksum,
    facts_from_json,
    facts_to_json,
    from_bytes,
    from_safetensors,
    to_bytes,
    to_safetensors,
)
from ditmem_jax.data.video import Facts, Stamp
from ditmem_jax.errors import UserError, nearest
from ditmem_jax.storage.digests import SEAL, of_file, sealed, unsealed
from ditmem_jax.storage.files import make_folder, read_json, reading, replacing, write_text, writing
from ditmem_jax.storage.locks import owned

FORMAT = 4
READABLE = (2, 3, FORMAT)  # 2 has no facts of videos, 3 no stamps of their files and less facts
PROMPTS = "prompts.safetensors"
CONTINUES = "free space on the disk, then the same command: it continues after the shards that are finished"


@dataclasses.dataclass(frozen=True)
class Meta:
    """The properties that the records of a folder share: latent shape (T, H, W, C), text width, number type.

    `made_by` is whatever identifies their making, JSON values by name; records of another making do not mix.
    """

    latents: tuple[int, int, int, int]
    text_dim: int
    dtype: Literal["float32", "bfloat16"]
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Shard:
    """The files NAME.array_record and NAME.jsonl of some records.

    `bytes` is the size of the first, which has checksums of its own; `digest` is the SHA-256 of the second, None where
    an earlier version wrote it.
    """

    name: str
    records: int
    bytes: int
    digest: str | None = None


@dataclasses.dataclass(frozen=True)
class _Index:
    """The file index.json. `prompts` is the SHA-256 of prompts.safetensors."""

    format: int
    complete: bool
    meta: Meta
    shards: tuple[Shard, ...]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    prompts: str | None = None


def write_shard(folder: Path, name: str, records: Iterable[Record], meta: Meta) -> Shard:
    """Stores records in a shard, their numbers as `meta.dtype`.

    Raises:
        UserError: if a record does not fit `meta`.
    """
    lines = []
    path = folder / f"{name}.array_record"
    with replacing(path, fix=CONTINUES) as temporary:
        guarded = functools.partial(writing, path, RuntimeError, fix=CONTINUES)  # what the library raises
        with guarded():
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for record in (_cast(record, meta) for record in records):
            with guarded():
                writer.write(to_bytes(record))
            line = dataclasses.asdict(record.entry) | {"checksum": checksum(record.latents)}
            line |= facts_to_json(record)
            line |= {"stamp": dataclasses.asdict(record.stamp)} if record.stamp else {}
            lines.append(json.dumps(line, ensure_ascii=False))
        with guarded():
            writer.close()
        write_text(folder / f"{name}.jsonl", listed := "\n".join(lines) + "\n", fix=CONTINUES)
        size = temporary.stat().st_size
    return Shard(name, len(lines), size, hashlib.sha256(listed.encode()).hexdigest())


def _cast(record: Record, meta: Meta) -> Record:
    found = (record.latents.shape, record.text_embedding.shape[1])
    if found != (meta.latents, meta.text_dim):
        raise UserError(
            f"record {record.id!r} does not fit the others",
            expected=f"latents {list(meta.latents)}, text width {meta.text_dim}",
            found=f"latents {list(found[0])}, text width {found[1]}",
        )
    dtype = DTYPES[meta.dtype]
    arrays = {"latents": record.latents.astype(dtype), "text_embedding": record.text_embedding.astype(dtype)}
    condition = {name: x.astype(dtype) for name, x in record.condition.items()}
    return dataclasses.replace(record, **arrays, condition=condition)


class RecordWriter:
    """Writes records shard by shard, and continues a folder that a killed writer left.

    Use as a context manager: the folder is complete once the block ends without an error. `lines` tell of the records
    of the shards that were finished before. `skipped` tells of the videos that have no record, by id, why not;
    it is empty again when a complete folder is opened, for another attempt.

    Raises:
        UserError: if the folder holds something else, records of another making, or a finished shard that is no
            longer as it was written. Nothing is touched then.
    """

    def __init__(self, folder: str | Path, meta: Meta, shard_size: int = 64):
        self.folder, self.meta, self.shard_size = Path(folder), meta, shard_size
        self._waiting: list[Record] = []
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(owned(folder))
        with contextlib.ExitStack() as failed:
            failed.push(self._lock)
            self._begin()
            failed.pop_all()

    def _begin(self) -> None:
        index = self._found_index()
        begun = index is not None and index.shards and not index.complete
        self.skipped: dict[str, str] = index.skipped if begun else {}
        self._shards: list[Shard] = []
        self.lines: list[Line] = []
        for shard in index.shards if index else ():
            _check_size(self.folder, shard)
            self.lines += read_list(self.folder, shard)
            if shard.digest is None:  # of an earlier version
                digest = of_file(self.folder / f"{shard.name}.jsonl")
                shard = dataclasses.replace(shard, digest=digest)
            self._shards.append(shard)
        path = self.folder / PROMPTS
        self._prompts = index.prompts if index else None
        if self._prompts is None and path.exists():
            self._prompts = of_file(path)
        make_folder(self.folder)
        if index is None:
            self._write_index(complete=False)

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        with self._lock:
            if kind is None:
                self._write_shard()
                if not self._shards:
                    raise UserError(f"no record was written to {self.folder}", expected="at least one")
                self._write_index(complete=True)

    @property
    def entries(self) -> list[Entry]:
        return [line.entry for line in self.lines]

    def current(self) -> "list[Line]":
        """The lines of all finished shards, also of those that were added since."""
        return [line for shard in self._shards for line in read_list(self.folder, shard)]

    def rewrite(self, changes: Mapping[str, Callable[[Record], Record | None]]) -> None:
        """Writes those shards anew in which records of finished shards change, by id; None is in place of no record.

        The others keep their places, but for those after a record that is gone.
        """
        shards, old = [], []
        for shard in self._shards:
            lines = read_list(self.folder, shard)
            if not any(line.entry.id in changes for line in lines):
                shards.append(shard)
                continue
            stem, _, number = shard.name.removeprefix("records-").partition("-")
            name = f"records-{stem}-{int(number or 0) + 1}"
            written = write_shard(self.folder, name, self._changed(shard, lines, changes), self.meta)
            old.append(shard.name)
            shards += [written] if written.records else []
            old += [] if written.records else [name]
        self._shards = shards
        self._write_index(complete=False)
        for name in old:
            for suffix in ("jsonl", "array_record"):
                (self.folder / f"{name}.{suffix}").unlink(missing_ok=True)
        self.lines = self.current()

    def _changed(
        self,
        shard: Shard,
        lines: "list[Line]",
        changes: Mapping[str, Callable[[Record], Record | None]],
    ) -> Iterator[Record]:
        source = _open(self.folder, [shard])
        for number, line in enumerate(lines):
            record = dataclasses.replace(_read(source, number, self.folder), stamp=line.stamp)
            if (record := changes.get(line.entry.id, lambda record: record)(record)) is not None:
                yield record

    def add(self, record: Record) -> None:
        """Stores a record, its numbers as `meta.dtype`. It is safe on the disk when its shard is full."""
        self._waiting.append(_cast(record, self.meta))
        if len(self._waiting) == self.shard_size:
            self._write_shard()

    def take(self, parts: Path, shard: Shard, skipped: dict[str, str]) -> None:
        """Moves in a shard that `write_shard` wrote to the folder `parts`, and notes which videos it lacks and why."""
        if shard.records:
            name = self._next_name()
            for suffix in ("jsonl", "array_record"):
                with writing(path := self.folder / f"{name}.{suffix}", fix=CONTINUES):
                    os.replace(parts / f"{shard.name}.{suffix}", path)
            self._shards.append(dataclasses.replace(shard, name=name))
        self.skipped |= skipped
        self._write_index(complete=False)

    def add_prompts(self, prompts: dict[str, Float[np.ndarray, "L D"]]) -> None:
        """Stores the embeddings, without padding, of texts that belong to no video."""
        names = {f"prompt.{i}": text for i, text in enumerate(prompts)}
        tensors = {name: prompts[text].astype(DTYPES[self.meta.dtype]) for name, text in names.items()}
        data = to_safetensors(tensors, names)
        self._prompts = hashlib.sha256(data).hexdigest()
        self._write_index(complete=False)  # until the end: a reader must not find one without the other
        with replacing(self.folder / PROMPTS, fix=CONTINUES) as temporary:
            temporary.write_bytes(data)

    def _found_index(self) -> _Index | None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file", expected="a folder for the records")
        if not (self.folder / "index.json").exists():
            others = sorted(path.name for path in self.folder.glob("*") if path.suffix != ".tmp")
            if others:
                raise UserError(
                    f"{self.folder} holds something else",
                    expected="records or an empty folder",
                    found=", ".join(others[:5]),
                    fix="another output folder",
                )
            return None
        index = _read_index(self.folder)
        differences = _differences(self.meta.to_json(), index.meta.to_json())
        if differences:
            raise UserError(
                f"{self.folder} holds the records of another run",
                expected="; ".join(f"{name} = {ours}" for name, ours, _ in differences),
                found="; ".join(f"{name} = {theirs}" for name, _, theirs in differences),
                fix="another output folder, or the settings of that run",
            )
        return index

    def _write_shard(self) -> None:
        if self._waiting:
            shard = write_shard(self.folder, self._next_name(), self._waiting, self.meta)
            self._waiting = []
            self._shards.append(shard)
            self._write_index(complete=False)

    def _next_name(self) -> str:
        numbers = [int(shard.name.split("-")[1]) for shard in self._shards]
        return f"records-{max(numbers, default=-1) + 1:05d}"

    def _write_index(self, complete: bool) -> None:
        index = _Index(FORMAT, complete, self.meta, tuple(self._shards), self.skipped, self._prompts)
        text = json.dumps(sealed(dataclasses.asdict(index)), indent=1) + "\n"
        write_text(self.folder / "index.json", text, fix=CONTINUES)


class RecordReader:
    """The records of a folder as a sequence; safe to share between threads and to hand to other processes.

    Raises:
        UserError: if the folder is no complete folder of records; and for an altered record when it is read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        if not index.complete:
            raise UserError(
                f"the records in {self.folder} are not complete",
                found=f"{sum(shard.records for shard in index.shards)} records so far",
                fix="run the command that makes them once more; it continues",
            )
        self.meta, self._shards, self._prompts = index.meta, index.shards, index.prompts
        for shard in self._shards:
            _check_size(self.folder, shard)
        self._source = _open(self.folder, self._shards)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> Record:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = _read(self._source, index, self.folder)
        if record.entry != self.entries[index]:
            raise UserError(
                f"record {index} of {self.folder} is not the one that its list names",
                expected=self.entries[index],
                found=record.entry,
                fix=_anew(self.folder),
            )
        return record

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """The records without their arrays, read from the small lists beside the shards."""
        return [line.entry for line in self._list]

    @functools.cached_property
    def checksums(self) -> list[str]:
        """Of the latents of each record, as they were written."""
        return [line.checksum for line in self._list]

    @functools.cached_property
    def facts(self) -> list[Facts | None]:
        """Of the whole video of each record, where they are known."""
        return [line.facts for line in self._list]

    @functools.cached_property
    def _list(self) -> "list[Line]":
        return [line for shard in self._shards for line in read_list(self.folder, shard)]

    def captions(self) -> list[str]:
        return [entry.caption for entry in self.entries]

    @functools.cached_property
    def prompts(self) -> dict[str, np.ndarray]:
        """Embeddings [L, D], without padding, of texts that belong to no video, by text."""
        path, fix = self.folder / PROMPTS, "run the encoding once more; it writes that file anew"
        try:
            with reading(path, fix):
                data = path.read_bytes()
            found = hashlib.sha256(data).hexdigest()
            if self._prompts not in (None, found):
                raise ValueError(f"sha256 {found}, where {self._prompts} was written")
            tensors, names = from_safetensors(data)
        except ValueError as error:
            raise UserError(f"cannot read {path}", found=error, fix=fix) from error
        return {names[name]: tensor for name, tensor in tensors.items()}

    def prompt(self, text: str) -> np.ndarray:
        """The embedding [L, D] of a text that `prompts` holds."""
        if text not in self.prompts:
            raise UserError(
                f"the embedding of the prompt {text!r} is not in {self.folder}",
                found=nearest(text, map(repr, self.prompts)),
                fix="run the encoding once more with this config; it continues",
            )
        return self.prompts[text]


class _Shard(NamedTuple):
    """A shard as ArrayRecord's data source wants it told, which saves it opening every file to count."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def _open(folder: Path, shards: Iterable[Shard]) -> ArrayRecordDataSource:
    return ArrayRecordDataSource(
        [_Shard(str(folder / f"{s.name}.array_record"), 0, s.records, s.records) for s in shards]
    )


def _read(source: ArrayRecordDataSource, number: int, folder: Path) -> Record:
    try:
        return from_bytes(source[number])
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"record {number} of {folder} is damaged", found=str(error)[:200], fix=_anew(folder)
        ) from error


class Line(NamedTuple):
    """A record's line in the list beside its shard."""

    entry: Entry
    checksum: str
    facts: Facts | None
    stamp: Stamp | None

    @classmethod
    def of(cls, text: str) -> "Line":
        values = json.loads(text)
        checksum, facts = values.pop("checksum"), facts_from_json(values.pop("facts", None))
        stamp = values.pop("stamp", None)
        return cls(Entry(**values), checksum, facts, stamp and Stamp(**stamp))


def _read_index(folder: Path) -> _Index:
    path = folder / "index.json"
    if not path.exists():
        raise UserError(
            f"{folder} is no folder of records",
            expected=path,
            fix=f"ditmem encode --table TABLE --videos VIDEOS --out {folder}",
        )
    values = read_json(path, _anew(folder))
    version = values.get("format") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"{folder} has another format",
            expected=f"format {' or '.join(map(str, READABLE))}",
            found=f"format {version}",
            fix="the version of ditmem_jax that made it, or another folder for records made anew",
        )
    try:
        if SEAL in values:  # which earlier versions did not write
            values = unsealed(values, path, _anew(folder))
        index = build(_Index, values, "index.json")
    except (UserError, TypeError) as error:
        found = error.in_one_line() if isinstance(error, UserError) else error
        raise UserError(f"{path} is damaged", found=found, fix=_anew(folder)) from error
    if index.format not in READABLE:
        raise UserError(f"{path} is damaged", found=f"format {version}", fix=_anew(folder))
    return index


def _check_size(folder: Path, shard: Shard) -> None:
    path = folder / f"{shard.name}.array_record"
    size = path.stat().st_size if path.exists() else "no such file"
    if size != shard.bytes:
        raise UserError(
            f"{path} is not as it was written",
            expected=f"{shard.bytes} bytes",
            found=size,
            fix=_anew(folder),
        )


def _anew(folder: Path) -> str:
    """Advice for a damaged file: a writer continues a folder and never mends it, since banks point to its rows."""
    return f"copy the file once more from where it is whole, or delete {folder} and make its records again"


def read_shard(folder: Path, shard: Shard, number: int) -> Record:
    """A record of a shard, with the stamp of its file."""
    record = _read(_open(folder, [shard]), number, folder)
    return dataclasses.replace(record, stamp=read_list(folder, shard)[number].stamp)


def read_list(folder: Path, shard: Shard) -> list[Line]:
    """The lines of the list beside a shard."""
    path = folder / f"{shard.name}.jsonl"
    with reading(path, _anew(folder)):
        data = path.read_bytes()
    if shard.digest not in (None, found := hashlib.sha256(data).hexdigest()):
        raise UserError(
            f"{path} was altered",
            expected=f"sha256 {shard.digest}",
            found=f"sha256 {found}",
            fix=_anew(folder),
        )
    try:
        lines = [Line.of(line) for line in data.decode().strip().split("\n")]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read {path}", found=str(error)[:200], fix=_anew(folder)) from error
    if len(lines) != shard.records:
        raise UserError(
            f"{path} is damaged", expected=f"{shard.records} lines", found=len(lines), fix=_anew(folder)
        )
    return lines


def _differences(ours: Any, theirs: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(name, ours, theirs) of the leaves in which two JSON values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours.keys() | theirs.keys())
        prefix = f"{name}." if name else ""
        return [d for key in keys for d in _differences(ours.get(key), theirs.get(key), prefix + key)]
    return [] if ours == theirs else [(name, ours, theirs)]
