"""One owner for each folder that is written to."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from ditmem_jax.errors import UserError


@contextlib.contextmanager
def owned(folder: str | Path) -> Iterator[None]:
    """Hold `folder`, which need not exist yet, for the block: nobody else who asks gets it meanwhile.

    The lock is the operating system's, on a hidden file beside the folder, so that of a process that died is free.
    What a killed owner left half written in the folder (`files.replacing`) is removed.

    Raises:
        UserError: if another process holds it, which is named, or the lock cannot be written.
    """
    folder = Path(folder).absolute()
    path = folder.with_name(f".{folder.name}.lock")
    lock = filelock.FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(
            f"{folder} is in use",
            found=_owner(path),
            fix="wait until it has ended, or another folder",
        ) from error
    except OSError as error:
        raise UserError(f"cannot write {path}", found=error, fix="a folder that can be written") from error
    try:
        owner = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        path.write_text(json.dumps(owner), encoding="utf-8")
        for left in folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield
    finally:
        if (
            os.name == "posix"
        ):  # under the lock; who waits with the file open sees that it has no name any more
            path.unlink(missing_ok=True)
        lock.release()


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['process']} on {owner['host']} holds it since {owner['since']}"
    except (OSError, ValueError, KeyError):  # it is just being written
        return "another process holds it"
