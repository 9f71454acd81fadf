"""What a number that is kept was measured at: the commit, and digests of the files that it depends on."""

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commit() -> str | None:
    """The commit that this checkout is at; None outside of one. Whether it was altered since, the digests tell."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def digest(files: Iterable[Path]) -> str:
    """Of the files' contents, in this order."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def folder_digests(*folders: str, suffix: str = ".py") -> dict[str, str]:
    """Digests of all files with this suffix in each of the folders, which are named from the root of the checkout."""
    return {folder: digest(sorted((ROOT / folder).rglob(f"*{suffix}"))) for folder in folders}


def processor() -> str:
    """The name of the CPU, and how many of its cores can be used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()
