"""`python -m tests.bank.kills [COUNT]`: SIGKILLs at random moments while a bank changes; none may lose a commit.

A child adds and removes rows, and says what it is about to do and what it has done. After each kill the table must
open, have no fault, and hold what was acknowledged; what was begun and not acknowledged is there as a whole or not.
"""

import random
import subprocess
import sys
import tempfile
import time

from ditmem_jax.bank.table import Table
from ditmem_jax.bank.verify import check
from tests.bank.test_table import EMBEDDER, create, ids, rows, vectors

ROWS = 300  # of an add


def change(path: str, first: int) -> None:
    """Adds a group of rows, and removes the one of two turns ago, for ever."""
    table, there = Table.open(path), []
    for number in range(first, sys.maxsize):
        group = [f"{number}-{i}" for i in range(ROWS)]
        print("add", number, flush=True)
        table.add(rows(*group), EMBEDDER, vectors(ROWS, number))
        print("done", flush=True)
        there.append(number)
        if len(there) > 2:
            print("remove", there[0], flush=True)
            table.remove([f"{there[0]}-{i}" for i in range(ROWS)])
            print("done", flush=True)
            there.pop(0)


def groups(table: Table) -> set[int]:
    """The groups in the table, none of them in part."""
    found = ids(table)
    numbers = {int(id.split("-")[0]) for id in found if id != "first"}
    assert len(found) == 1 + ROWS * len(numbers) and "first" in found, "a part of a commit"
    return numbers


def kill(path: str, acknowledged: set[int], seconds: float) -> set[int]:
    """Kills a child after so many seconds of work, checks the bank, and returns the groups that it holds."""
    command = [sys.executable, "-m", "tests.bank.kills", path, str(max(acknowledged, default=0) + 1)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = [child.stdout.readline()]  # its imports are over
    time.sleep(seconds)
    child.kill()
    lines = [line.split() for line in [*lines, *child.stdout] if line.endswith("\n")]
    child.wait()
    expected, pending = set(acknowledged), None
    for line in lines:
        if line == ["done"]:
            expected, pending = expected ^ {pending}, None
        else:
            pending = int(line[1])
    table = Table.open(path)
    assert check(table) == []
    found = groups(table)
    assert found in (expected, expected ^ {pending}), (found, expected, pending)
    return found


def run(path: str, count: int, seed: int = 0) -> int:
    """`count` kills in a row, at moments drawn from the seed; tells how many versions the bank has then."""
    create(path, "first")
    held: set[int] = set()
    generator = random.Random(seed)
    for _ in range(count):
        held = kill(path, held, generator.uniform(0, 1))
    return Table.open(path).version


if __name__ == "__main__":
    if len(sys.argv) == 3:
        change(sys.argv[1], int(sys.argv[2]))
    count = int(sys.argv[1]) if len(sys.argv) == 2 else 50
    with tempfile.TemporaryDirectory() as folder:
        print(f"{count} kills, {run(folder + '/bank', count)} versions, nothing lost")
