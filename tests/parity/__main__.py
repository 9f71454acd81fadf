"""`python -m tests.parity FILE...`: golden files against this implementation, one line per quantity."""

import argparse
import sys
from pathlib import Path

import jax

from ditmem_jax.errors import UserError
from tests.parity import dit, flow, memory, pipeline, solvers, umt5, vae
from tests.parity.golden import Check, GoldenFile

MODULES = (dit, flow, memory, pipeline, solvers, umt5, vae)
WIDTH = {"file": 18, "quantity": 56}  # with the numbers beside them, a line has at most 100 columns


def compare(path: str | Path) -> tuple[str, list[Check]]:
    """The kind of a golden file, told from its tensors, and its checks, computed in full float32.

    Raises:
        UserError: for a file that cannot be read, is of no known kind, or lacks what its kind needs.
    """
    golden = GoldenFile.read(path)
    for module in MODULES:
        kind = module.recognise(golden)
        if kind is not None:
            with jax.default_matmul_precision("highest"):
                return kind, module.KINDS[kind](golden)
    raise UserError(
        f"{path} is no golden file of a known kind",
        expected=f"the tensors of one of: {', '.join(sorted(kind for module in MODULES for kind in module.KINDS))}",
        found=", ".join(sorted({name.split("/")[0] for name in golden.tensors})[:8]) or "no tensors",
    )


def line(file: str, quantity: str, *rest: str) -> str:
    """One line of the table; names that are too long lose their middle."""
    names = [
        _shorten(name, width).ljust(width)
        for name, width in zip((file, quantity), WIDTH.values(), strict=True)
    ]
    return "  ".join([*names, *(text.rjust(7) for text in rest[:2]), *rest[2:]])


def _shorten(text: str, width: int) -> str:
    keep = width - 1
    return text if len(text) <= width else f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="golden files, for example tests/golden/*.safetensors"
    )
    failed = total = 0
    print(line("file", "quantity", "error", "limit", "verdict"))
    for path in parser.parse_args().files:
        try:
            kind, checks = compare(path)
        except (UserError, KeyError) as error:
            print(f"FAIL {path} lacks {error}" if isinstance(error, KeyError) else f"FAIL {error}")
            failed += 1
            continue
        print(f"{path} ({kind})")
        for check in checks:
            verdict = "ok" if check.ok else "FAIL"
            print(
                line(Path(path).stem, check.name, f"{check.error:.1e}", f"{check.limit:.0e}", verdict),
                flush=True,
            )
        total += len(checks)
        failed += sum(not check.ok for check in checks)
    print(f"{total} quantities compared, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
