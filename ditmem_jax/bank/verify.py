"""Faults of a bank: in its table, and in the records that it points to."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ditmem_jax.bank.table import Table, digests_of, to_matrix
from ditmem_jax.data.record import checksum
from ditmem_jax.data.records import RecordReader
from ditmem_jax.errors import UserError
from ditmem_jax.progress import track


def check(table: Table, deep: bool = False) -> list[str]:
    """Every fault as a line: ids that are there twice, rows altered, vectors not of length 1, records gone or altered.

    Args:
        deep: reads the latents of all records; otherwise their checksums are taken from the lists beside them.
    """
    return [*_rows(table), *_records(table, deep)]


def _rows(table: Table) -> Iterator[str]:
    ids = pc.value_counts(table.rows(columns=["id"])["id"])
    for item in ids.filter(pc.greater(ids.field("counts"), 1)):
        yield f"{item['values'].as_py()!r} is there {item['counts'].as_py()} times"
    count = 0
    for part in table.blocks([*table.columns, "vector"]):
        listed = part["digest"].to_pylist() if "digest" in part.schema.names else [None] * len(part)
        for name, found, digest in zip(
            part["id"], digests_of(part.drop_columns("_rowid")), listed, strict=True
        ):
            if digest not in (found, None) or (digest is None and table.digests):
                yield f"{name.as_py()!r} was altered: its digest is {found}, {digest} was written"
        norms = np.linalg.norm(to_matrix(part["vector"]).astype(np.float64), axis=1)
        for row in np.flatnonzero(~((np.abs(norms - 1) < 1e-4) | (norms == 0))):
            yield f"{part['id'][row].as_py()!r} has a vector of length {norms[row]:.4f}"
        count += len(part)
    if count != len(table):
        yield f"the table counts {len(table)} rows, but {count} can be read"


def _records(table: Table, deep: bool) -> Iterator[str]:
    rows = table.rows("records IS NOT NULL", ["id", "records", "row", "checksum"])
    for folder in pc.unique(rows["records"]).to_pylist():
        part = rows.filter(pc.equal(rows["records"], folder))
        try:
            yield from _folder(part, RecordReader(folder), deep)
        except UserError as error:
            yield f"{len(part)} videos have no record any more: {error.in_one_line()}"


def _folder(part: pa.Table, reader: RecordReader, deep: bool) -> Iterator[str]:
    listed = reader.checksums
    for row in track(part.to_pylist(), f"records of {reader.folder}", disable=not deep):
        place = f"record {row['row']} of {reader.folder}"
        if row["row"] >= len(listed):
            yield f"{row['id']!r}: {place} is gone"
        elif listed[row["row"]] != row["checksum"]:
            yield f"{row['id']!r}: {place} has another checksum"
        elif deep:
            try:
                if checksum(reader[row["row"]].latents) != row["checksum"]:
                    yield f"{row['id']!r}: the latents of {place} are altered"
            except UserError as error:
                yield f"{row['id']!r}: {error.in_one_line()}"
