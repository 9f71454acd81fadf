"""Files that are either whole or absent, JSON, the errors for what cannot be read or written, and where caches lie."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ditmem_jax.errors import UserError

ROOM = "free space on the disk, or a place that can be written"


@contextlib.contextmanager
def reading(path: Path, fix: str | None = None) -> Iterator[None]:
    """Raises a UserError that names `path` when the block, which reads it, fails."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}", found=error, fix=fix) from error


@contextlib.contextmanager
def writing(path: Path, *kinds: type[Exception], fix: str = ROOM) -> Iterator[None]:
    """Raises a UserError that names `path` and says what is still there when the block, which writes it, fails.

    Args:
        kinds: what a library raises for a disk that is full or fails, beside OSError.
    """
    try:
        yield
    except (OSError, *kinds) as error:
        still = f"{path.name} is as it was before" if os.path.lexists(path) else f"there is no {path.name}"
        reason = str(error).strip().splitlines() or [repr(error)]
        raise UserError(f"cannot write {path}", found=f"{reason[0]}; {still}", fix=fix) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there yet; UserError if that cannot be."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def replacing(path: Path, *kinds: type[Exception], fix: str = ROOM) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes the place of `path` once the block has succeeded.

    The content is on the disk before the name changes, so `path` never holds half a file, even after a crash, and of
    two processes that replace it at once one wins. What a kill leaves is removed by the next owner (`locks`).

    Args:
        kinds, fix: as for `writing`. What the block reads from elsewhere, it reads with `reading`.
    Raises:
        UserError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with writing(path, *kinds, fix=fix):
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # the error of the block is the one to tell
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, fix: str = ROOM) -> None:
    """Writes a whole UTF-8 text file, or nothing; UserError if it cannot be written."""
    with replacing(path, fix=fix) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, fix: str | None = None) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: if it cannot be read or is damaged; `fix` says what to do about that.
    """
    try:
        with reading(path, fix):
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged", expected="JSON in UTF-8", found=error, fix=fix) from error
    return parse_json(text, path, fix)


def parse_json(text: str, name: object, fix: str | None = None) -> Any:
    """The value of a JSON text; UserError with the `name` of what holds it if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged", expected="JSON", found=str(error)[:200], fix=fix) from error


def cache_folder(name: str) -> Path:
    """Return the user's own folder for what can be made again: `name` under XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ditmem_jax", name)
