"""Tables of users, row by row: CSV, TSV, JSON lines, JSON arrays and parquet.

A row that cannot be read is a problem of its own, with its number and the cause; the rows after it are read. Values
come as the file has them: texts of CSV, values of JSON, numbers, dates and decimals of parquet.
"""

import csv
import dataclasses
import datetime
import decimal
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ditmem_jax.errors import UserError

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a table by number, from 1, each by the names of its columns, and why others could not be read.

    Attributes:
        embedded: columns of whole files, whose bytes are not read: of each row there is what else is known, or None.
    """

    path: Path
    columns: list[str]
    rows: list[tuple[int, dict[str, Any]]]
    problems: list[tuple[int, UserError]]
    embedded: tuple[str, ...] = ()


def read(path: str | Path) -> Rows:
    """Read a table by the suffix of its file.

    Raises:
        UserError: for a file that cannot be read, is of another kind, has two columns of one name, or has no row.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        found = path.suffix.lower()
        raise UserError(
            f"{path} is no table that we read", expected=f"a file {', '.join(READERS)}", found=found
        )
    table = READERS[path.suffix.lower()](path)
    if double := [name for name, count in Counter(table.columns).items() if count > 1]:
        raise UserError(
            f"{path} has several columns {double[0]}",
            found=", ".join(table.columns),
            fix="other names for them",
        )
    if table.problems and not any(row for _, row in table.rows):
        raise table.problems[0][1]
    return table


def text(value: Any) -> str:
    """A value of a table as text: absent values and NaN are empty, dates as in ISO 8601, decimals digit by digit."""
    if value is None or value != value:
        return ""
    if isinstance(value, (str, decimal.Decimal, datetime.timedelta)):
        return str(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False, default=text)


def _text_of(path: Path, what: str) -> str:
    """The file as text; bytes that are no UTF-8 stay in it as single surrogates."""
    try:
        data = path.read_bytes()
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return data.decode("utf-16")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}", expected=what, found=error) from error
    return data.decode("utf-8-sig", "surrogateescape")


def _is_utf_8(text: str) -> bool:
    return not any("\udc80" <= letter <= "\udcff" for letter in text) if not text.isascii() else True


# --- CSV --------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, separator: str = ",") -> Rows:
    found = _csv_rows(_text_of(path, "a CSV file in UTF-8"), separator)
    columns = next(found, [])
    if isinstance(columns, str):
        raise UserError(f"cannot read the header of {path}", expected="names of columns", found=columns)
    columns = [name.strip() for name in columns]
    others = [
        name for sign, name in SEPARATORS.items() if columns and sign != separator and sign in columns[0]
    ]
    if len(columns) == 1 and others:
        fix = "the suffix .tsv" if others[0] == "tabs" else "save it once more, separated by commas"
        raise UserError(
            f"the columns of {path} are separated by {others[0]}",
            expected="commas, or tabs in a .tsv",
            found=columns[0],
            fix=fix,
        )
    rows, problems = [], []
    for number, values in enumerate(found, start=1):
        what, details = f"row {number} of {path}", {}
        if isinstance(values, str):
            what, details = (
                f"{what} is no CSV",
                {"found": values, "fix": 'quotation marks doubled within "..."'},
            )
        elif not all(map(_is_utf_8, values)):
            bad = next(value for value in values if not _is_utf_8(value))
            what, details = f"{what} is not UTF-8", {"found": ascii(bad[:80]), "fix": "save it as UTF-8"}
        elif len(values) > len(columns):
            what = f"{what} has more values than there are columns"
            more = ", ".join(values[len(columns) :])
            details = {"found": more, "fix": 'put captions with commas into "quotation marks"'}
        else:
            rows.append((number, dict(itertools.zip_longest(columns, values, fillvalue=""))))
            continue
        problems.append((number, UserError(what, **details)))
    return Rows(path, columns, rows, problems)


def _csv_rows(text: str, separator: str) -> Iterator[list[str] | str]:
    """The values of each row but blank ones, or the error; what follows a bad row begins at the next line."""
    lines, start = io.StringIO(text, newline="").readlines(), 0
    while start < len(lines):
        reader, done = csv.reader(_from(lines, start), delimiter=separator, strict=True), 0
        try:
            for values in reader:
                done = reader.line_num
                if values:
                    yield values
            return
        except csv.Error as error:
            yield str(error)
        start += done + 1


def _from(lines: Sequence[str], start: int) -> Iterator[str]:
    return (lines[number] for number in range(start, len(lines)))


# --- JSON -------------------------------------------------------------------------------------------------------


def _read_json_lines(path: Path) -> Rows:
    text = _text_of(path, "JSON in UTF-8")
    if text.lstrip().startswith("["):
        return _read_json(path)
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = _json_row(line, f"line {number} of {path}")
            (problems if isinstance(row, UserError) else rows).append((number, row))
    return Rows(path, _columns(rows), rows, problems)


def _read_json(path: Path) -> Rows:
    text = _text_of(path, "JSON in UTF-8")
    try:
        values = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and text.strip().count("\n"):
            return _read_json_lines(path)
        raise UserError(f"cannot read {path}", expected="a JSON array of objects", found=error) from error
    lists = [values]
    if isinstance(values, _Pairs):  # one row, or rows under some name beside other values
        lists = [
            value for _, value in values if value and isinstance(value, list) and isinstance(value[0], _Pairs)
        ]
        if not lists:
            return _read_json_lines(path)
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise UserError(f"{path} is no table", expected="a JSON array of objects", found=text[:80])
    rows, problems = [], []
    for number, value in enumerate(lists[0], start=1):
        row = _plain_row(value, f"row {number} of {path}")
        (problems if isinstance(row, UserError) else rows).append((number, row))
    return Rows(path, _columns(rows), rows, problems)


class _Pairs(list):
    """The names and values of a JSON object, of which two may have one name."""


def _json_row(line: str, what: str) -> dict[str, Any] | UserError:
    if not _is_utf_8(line):
        return UserError(f"{what} is not UTF-8", found=ascii(line[:80]))
    try:
        return _plain_row(json.loads(line, object_pairs_hook=_Pairs), what)
    except (ValueError, RecursionError) as error:
        return UserError(f"{what} is damaged", expected="JSON", found=error)


def _plain_row(value: Any, what: str) -> dict[str, Any] | UserError:
    if not isinstance(value, _Pairs):
        return UserError(f"{what} is no JSON object", found=json.dumps(value, ensure_ascii=False)[:80])
    if double := [name for name, count in Counter(name for name, _ in value).items() if count > 1]:
        return UserError(f"{what} has several values of {double[0]}")
    return {name: _plain(item) for name, item in value}


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {name: _plain(item) for name, item in value}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _columns(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(name for _, row in rows for name in row))


# --- parquet ----------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Rows:
    try:
        schema = pq.read_schema(path)
        embedded = tuple(field.name for field in schema if _holds_files(field.type))
        wanted = [
            leaf
            for field in schema
            for leaf in (
                [f"{field.name}.{part.name}" for part in field.type if not _is_binary(part.type)]
                if field.name in embedded and pa.types.is_struct(field.type)
                else [field.name] * (field.name not in embedded)
            )
        ]
        if len(set(schema.names)) < len(schema.names):
            return Rows(path, schema.names, [], [])
        table = pq.ParquetFile(path).read(columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}", expected="a parquet file", found=error) from error
    columns = {field.name: _values(path, field, table[field.name]) for field in table.schema}
    columns |= {name: [None] * len(table) for name in embedded if name not in columns}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Rows(path, schema.names, list(enumerate(rows, start=1)), [], embedded)


def _values(path: Path, field: pa.Field, column: pa.ChunkedArray) -> list[Any]:
    """The values of a column as Python's, which has no such large dates or such time zones as Arrow may hold."""
    try:
        return column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError, LookupError, TypeError, ImportError) as error:
        raise UserError(
            f"the column {field.name} of {path} cannot be read",
            expected="numbers or text",
            found=f"{field.type}: {error}",
            fix="leave that column out",
        ) from error


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_files(kind: pa.DataType) -> bool:
    """Columns of bytes, alone or beside a path as Hugging Face's datasets write them."""
    return _is_binary(kind) or (pa.types.is_struct(kind) and any(_is_binary(part.type) for part in kind))


def embedded_file(path: str, column: str, number: int) -> bytes | None:
    """The bytes in a column of a parquet file's row `number`, from 1; only its row group is read."""
    start = 1
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if number < start + count:
            value = file.read_row_group(group, columns=[column]).column(0)[number - start].as_py()
            return (
                next((v for v in value.values() if isinstance(v, bytes)), None)
                if isinstance(value, dict)
                else value
            )
        start += count
    raise IndexError(number)


READERS = {
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".tab": lambda path: _read_csv(path, "\t"),
    ".parquet": _read_parquet,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
}
