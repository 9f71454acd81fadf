"""Reference videos as a sequence of records, wherever they lie; each is checked to be the one that was meant."""

import collections
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Float32

from ditmem_jax.data.record import Entry, Record, checksum
from ditmem_jax.data.records import RecordReader
from ditmem_jax.errors import UserError, nearest


class Pointer(NamedTuple):
    """Where a record is: the folder, its number there, and the checksum of its latents."""

    records: str
    row: int
    checksum: str


class References:
    """The records behind pointers; safe to share between threads and to hand to other processes.

    Attributes:
        folder: names the folders in messages.
        meta: what all the records have in common.
    Raises:
        UserError: for a folder that is gone or of other latents than the first, and for a record that is gone or
            not the one that was meant: by the lists of its folder at once, by its latents when it is read.
    """

    def __init__(self, pointers: Sequence[Pointer]):
        self.pointers = list(pointers)
        self._readers = {folder: RecordReader(folder) for folder in sorted({p.records for p in pointers})}
        self.folder = ", ".join(self._readers)
        self.meta = next(iter(self._readers.values())).meta
        for folder, reader in self._readers.items():
            if (found := (reader.meta.latents, reader.meta.dtype)) != (self.meta.latents, self.meta.dtype):
                raise UserError(
                    f"the reference videos in {folder} do not fit the others",
                    expected=f"latents {list(self.meta.latents)} in {self.meta.dtype}",
                    found=f"latents {list(found[0])} in {found[1]}",
                    fix="encode all with one config",
                )
        for pointer in self.pointers:
            listed = self._readers[pointer.records].checksums
            self._require(pointer, listed[pointer.row] if pointer.row < len(listed) else "no such record")

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> "References":
        """Those of rows of a bank.

        Raises:
            UserError: also for a row without a record.
        """
        rows = list(rows)
        for row in rows:
            if row["records"] is None:
                raise UserError(
                    f"the video {row['id']!r} has no record, only a vector", fix="a bank of records"
                )
        return cls([Pointer(row["records"], row["row"], row["checksum"]) for row in rows])

    def __len__(self) -> int:
        return len(self.pointers)

    @property
    def entries(self) -> list[Entry]:
        """The records without their arrays."""
        return [self._readers[pointer.records].entries[pointer.row] for pointer in self.pointers]

    def __getitem__(self, index: SupportsIndex) -> Record:
        pointer = self.pointers[operator.index(index)]
        record = self._readers[pointer.records][pointer.row]
        self._require(pointer, checksum(record.latents))
        return record

    def latents(self) -> Float32[np.ndarray, "R T H W C"]:
        """Return the latents of all, in float32; raises UserError for a record that is gone or altered."""
        return np.stack([record.latents.astype(np.float32) for record in self])

    def _require(self, pointer: Pointer, found: str) -> None:
        if found != pointer.checksum:
            raise UserError(
                f"record {pointer.row} of {pointer.records} is not the reference video that was meant",
                expected=f"latents of checksum {pointer.checksum}",
                found=found,
                fix="the records as they were, or build the bank again",
            )


def majority_source(references: Sequence[Entry], column: str) -> str:
    """The source of most of the references of a sample; of equally many, that of the better match.

    Args:
        references: best first.
        column: "source", or another column of the records.
    Raises:
        UserError: for records without that column.
    """
    names = []
    for entry in references:
        columns = {"source": entry.source} | entry.extra
        if column not in columns:
            raise UserError(
                f"the reference video {entry.id!r} has no column {column!r} that names its source",
                expected=f"one of: {nearest(column, columns)}",
                fix="another memory.column, or records with that column",
            )
        names.append(columns[column])
    return collections.Counter(names).most_common(1)[0][0]
