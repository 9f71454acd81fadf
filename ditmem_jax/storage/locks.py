"""One owner for each folder, or file, that is written to."""

import contextlib
import errno
import glob
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import make_folder, writing


@contextlib.contextmanager
def owned(folder: str | Path, wait: int | float = 0) -> Iterator[None]:
    """Hold `folder`, or a file, which need not exist yet, for the block: nobody else who asks gets it meanwhile.

    The lock is the operating system's, on a hidden file beside it, so that of a process that died is free. What a
    killed owner left half written in the folder, or of the file (`files.replacing`), is removed.

    Args:
        wait: seconds until another owner's end.
    Raises:
        UserError: if another process holds it, which is named, or it cannot be written to.
    """
    folder = Path(folder).absolute()
    path = folder.with_name(f".{folder.name}.lock")
    lock = filelock.FileLock(path)
    make_folder(path.parent)
    with contextlib.ExitStack() as held:
        with writing(folder):
            try:
                lock.acquire(timeout=wait, poll_interval=0.1)
            except filelock.Timeout as error:
                raise UserError(
                    f"{folder} is in use",
                    found=_owner(path),
                    fix="wait until it has ended, or another folder",
                ) from error
            held.callback(_release, lock, path)
            owner = {
                "host": socket.gethostname(),
                "process": os.getpid(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
            path.write_text(json.dumps(owner), encoding="utf-8")
            if folder.exists() and not os.access(folder, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
            halves = f".{glob.escape(folder.name)}.{'[0-9a-f]' * 12}.tmp"  # of the file itself
            for left in [*folder.glob(".*.tmp"), *folder.parent.glob(halves)]:
                left.unlink(missing_ok=True)
        yield


def _release(lock: filelock.BaseFileLock, path: Path) -> None:
    if os.name == "posix":  # under the lock; who waits with the file open sees that it has no name any more
        path.unlink(missing_ok=True)
    lock.release()


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['process']} on {owner['host']} holds it since {owner['since']}"
    except (OSError, ValueError, KeyError):  # it is just being written
        return "another process holds it"
