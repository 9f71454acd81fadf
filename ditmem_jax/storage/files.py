"""Files that are either whole or absent, the error for those that cannot be read, and where caches lie."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from ditmem_jax.errors import UserError


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises a UserError that names `path` when the block, which reads it, fails."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}", found=error) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes the place of `path` once the block has succeeded.

    The content is on the disk before the name changes, so `path` never holds half a file, even after a crash, and of
    two processes that replace it at once one wins. What a kill leaves is removed by the folder's next owner (`locks`).
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole UTF-8 text file, or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_folder(name: str) -> Path:
    """Return the user's own folder for what can be made again: `name` under XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ditmem_jax", name)
