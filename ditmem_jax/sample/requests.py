"""Requests for clips: prompts with their seeds and memories, one by one or in a file."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ditmem_jax.errors import UserError, nearest
from ditmem_jax.storage.files import reading


class Request(NamedTuple):
    """A clip that is asked for; what is None is as for all clips of a call.

    Attributes:
        prompt: what it shows.
        seed: of its noise.
        memory: "auto" for what the bank finds for the prompt, "none", or ids of its videos.
        strength: weight of the memory.
    """

    prompt: str
    seed: int | None = None
    memory: Literal["auto", "none"] | tuple[str, ...] | None = None
    strength: float | None = None


def read_requests(path: str | Path) -> list[Request]:
    """Read the requests of a file.

    A text file has a prompt a line; CSV (.csv) a header with "prompt" and any other field of `Request`, ids of a memory
    as ID,ID; JSON lines (.jsonl) an object a line with the same fields. Empty lines and values are left out.

    Raises:
        UserError: for a file that cannot be read, has no prompt or an unknown field, and for a value that does not fit,
            with its line.
    """
    path = Path(path)
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text", expected="prompts in UTF-8", found=error) from error
    rows = {".csv": _csv_rows, ".jsonl": _json_rows}.get(path.suffix.lower(), _text_rows)(text, path)
    if found := [_request(row, f"{path}, line {line}") for line, row in rows]:
        return found
    raise UserError(f"{path} has no prompt", expected="a prompt a line", found="nothing")


def _text_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    del path
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}, line {reader.line_num}: as many values as the header has names are needed",
                    expected=reader.fieldnames,
                    fix='values with a comma in quotes: "a ball, a wall"',
                )
            if any(row.values()):
                yield reader.line_num, {name: value for name, value in row.items() if value}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: no CSV", found=error) from error


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: no JSON", found=error) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}", expected='an object such as {"prompt": "..."}', found=line[:80]
            )
        yield number, row


def _request(row: dict[str, Any], where: str) -> Request:
    """The request of a row, whose values are of the right types or texts of them."""
    if unknown := [name for name in row if name not in Request._fields]:
        raise UserError(
            f"{where}: unknown field {unknown[0]!r}",
            expected=f"one of: {nearest(unknown[0], Request._fields)}",
        )
    if not isinstance(prompt := row.get("prompt"), str) or not prompt.strip():
        raise UserError(f"{where}: the prompt is missing or empty", expected="what the clip shows, in words")
    seed, strength = (
        _number(row.get(name), kind, f"{where}: {name}")
        for name, kind in (("seed", int), ("strength", float))
    )
    return Request(prompt, seed, _memory(row.get("memory"), f"{where}: memory"), strength)


def _number(value: Any, kind: type, where: str) -> Any:
    if value is None:
        return None
    try:
        number = kind(value)
        if isinstance(value, bool) or number != float(value) or not 0 <= number < float("inf"):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            where, expected=f"{'a whole' if kind is int else 'a'} number, 0 or more", found=repr(value)
        ) from error
    return number


def _memory(value: Any, where: str) -> Literal["auto", "none"] | tuple[str, ...] | None:
    """As the command line takes it, or a list of ids."""
    if value in (None, "auto", "none"):
        return value
    ids: Sequence[Any] = [id.strip() for id in value.split(",")] if isinstance(value, str) else value
    if not isinstance(ids, list) or not ids or not all(isinstance(id, str) and id for id in ids):
        raise UserError(where, expected="auto, none, or ids of videos", found=repr(value))
    return tuple(ids)
