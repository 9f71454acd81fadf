"""Rows of a bank, from folders of records or from a table and vectors of the user's, and summaries of them."""

import dataclasses
import datetime
import decimal
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from ditmem_jax.bank.table import FIXED, cast
from ditmem_jax.data import tables
from ditmem_jax.data.record import Entry
from ditmem_jax.data.records import RecordReader
from ditmem_jax.data.video import Facts
from ditmem_jax.errors import UserError

TAKEN = {"vector", "records", "row", "checksum", "digest"}  # columns that no table of the user's can fill
TEXTS = ("id", "caption", "source")
FACTS = ("duration", "frames", "fps")
ABSENT = (
    "nan",
    "na",
    "n/a",
    "null",
    "none",
)  # absent values among numbers, as numpy, polars, R and others write them


def rows_of_records(folders: Sequence[str | Path]) -> pa.Table:
    """A row for each record of the folders; columns of `extra` become columns of numbers where all are numbers.

    What `extra` does not tell of duration, frames and fps is known from the videos.

    Raises:
        UserError: for a folder that is not of records.
    """
    readers = [RecordReader(folder) for folder in folders]
    listed = [line for reader in readers for line in zip(reader.entries, reader.facts, strict=True)]
    columns = columns_of([_complete(entry, facts) for entry, facts in listed])
    columns["records"] = [str(reader.folder.resolve()) for reader in readers for _ in range(len(reader))]
    columns["row"] = pa.array([row for reader in readers for row in range(len(reader))], pa.int32())
    columns["checksum"] = [checksum for reader in readers for checksum in reader.checksums]
    return pa.table(columns)


def _complete(entry: Entry, facts: Facts | None) -> Entry:
    """The entry with those facts of its video that its table does not tell."""
    known = {name: getattr(facts, name, None) for name in FACTS}
    missing = {
        name: str(value)
        for name, value in known.items()
        if value is not None and not entry.extra.get(name, "").strip()
    }
    return dataclasses.replace(entry, extra=entry.extra | missing)


def columns_of(entries: Sequence[Entry]) -> dict[str, Any]:
    """The columns of a bank that entries of records tell."""
    names = sorted({name for entry in entries for name in entry.extra})
    columns = {name: [getattr(entry, name) for entry in entries] for name in TEXTS}
    users = further({name: [entry.extra.get(name, "") for entry in entries] for name in names}, taken=TEXTS)
    return columns | users


def read_rows(path: str | Path, strict: bool = False) -> pa.Table:
    """The rows of a table (see `data.tables`) with a column `id`; `caption` and `source` may be left out.

    Rows that cannot be read are left out, and named on stderr with their number.

    Args:
        strict: refuses a table with such rows.
    Raises:
        UserError: if the file cannot be read, has no such column, or a column of lists.
    """
    given = tables.read(path)
    if given.problems and strict:
        raise given.problems[0][1]
    for _, problem in given.problems:
        print(f"note: left out: {problem.in_one_line()}", file=sys.stderr)
    listed = [row for _, row in given.rows]
    columns = {name: [_absent(row.get(name)) for row in listed] for name in given.columns}
    try:
        typed = given.path.suffix.lower() in TYPED
        table = pa.table(columns if typed else further(columns, TEXTS))
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(f"cannot read the table {path}", found=error) from error
    if "id" not in table.schema.names:
        raise UserError(f"{path} lacks the column id", found=", ".join(table.schema.names) or "no rows")
    for name in ("caption", "source"):
        if name not in table.schema.names:
            table = table.append_column(name, pa.array([""] * len(table), pa.string()))
    table = table.rename_columns(_free(table.schema.names))
    return pa.table({field.name: _plain(path, field, table[field.name]) for field in table.schema})


def read_vectors(path: str | Path) -> Float[np.ndarray, "N D"]:
    """Map the vectors of a .npy file into memory.

    Raises:
        UserError: for another file, or one that holds anything but a matrix of floats.
    """
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}", expected="a .npy file", found=error) from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise UserError(
            f"{path} holds no vectors",
            expected="floats [N, D]",
            found=f"{vectors.dtype} {list(vectors.shape)}",
        )
    return vectors


def summary(rows: pa.Table) -> list[dict[str, Any]]:
    """Return for each column with values its type, the count of values and of different ones, and their range."""
    lines = []
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        if column.null_count < len(column):
            low, high = pc.min_max(column).values()
            lines.append(
                {
                    "column": name,
                    "type": str(column.type),
                    "there": len(column) - column.null_count,
                    "different": pc.count_distinct(column).as_py(),
                    "least": low.as_py(),
                    "most": high.as_py(),
                }
            )
    return lines


TYPED = (".parquet", ".json", ".jsonl", ".ndjson")  # tables whose values have types


def _absent(value: Any) -> Any:
    """The value as a bank takes it up: None for NaN, dates and times as text, decimals as numbers."""
    if value is None or value != value:
        return None
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta)):
        return tables.text(value)
    return float(value) if isinstance(value, decimal.Decimal) else value


def further(
    columns: Mapping[str, Iterable[str]], texts: Sequence[str] = (), taken: Sequence[str] = ()
) -> dict[str, pa.Array]:
    """Columns of text as the bank keeps them: numbers where every value is one or absent, except for `texts`.

    Values such as 007 are texts.

    Args:
        taken: further names that these columns cannot have.
    """
    return {
        free: _numbers(pa.array(values, pa.string()), name in texts)
        for free, (name, values) in zip(_free(columns, taken), columns.items(), strict=True)
    }


def _free(names: Iterable[str], taken: Sequence[str] = ()) -> list[str]:
    """The names themselves, or where the bank or Lance cannot have them, names like them.

    Raises:
        UserError: if two columns come to the same name.
    """

    def free(name: str) -> str:
        plain = re.sub(r"[.`]", "_", name) or "unnamed"
        return f"{plain}_" if plain in {*TAKEN, *taken} or plain.startswith("_row") else plain

    names = list(names)
    renamed = [free(name) for name in names]
    if double := [name for name, count in Counter(renamed).items() if count > 1]:
        alike = [name for name in names if free(name) == double[0]]
        raise UserError(
            f"{len(alike)} columns would be called {double[0]} in a bank", found=", ".join(map(repr, alike))
        )
    return renamed


def _numbers(column: pa.Array, text: bool) -> pa.Array:
    trimmed = pc.utf8_trim_whitespace(column)
    blank = pc.is_in(pc.utf8_lower(trimmed), pa.array(["", *ABSENT]))
    if pc.all(pc.equal(trimmed, "")).as_py():
        return column if text else pa.nulls(len(column), pa.string())
    if pc.all(blank).as_py():
        return column
    trimmed = pc.if_else(blank, pa.scalar(None, pa.string()), trimmed)
    codes = pc.any(pc.match_substring_regex(trimmed, "^0[0-9]")).as_py()  # 007 is a name
    if text or codes:
        return column
    try:
        return trimmed.cast(pa.float64())  # never integers: the next table may say 8.5 where this one says 8
    except pa.ArrowInvalid:
        return column


def _plain(path: Path, field: pa.Field, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column in the type that the bank gives it."""
    for fixed in FIXED:
        if fixed.name == field.name:
            return cast(column, fixed)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_floating(kind):
        return column.cast(pa.float64())
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return column.cast(pa.int64() if pa.types.is_integer(kind) else kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return column.cast(pa.string())
    raise UserError(
        f"the column {field.name} of {path} cannot go into a bank",
        expected="numbers or text",
        found=str(kind),
    )
