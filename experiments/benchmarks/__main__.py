"""Times and memory of this library beside PyTorch's, as ratios from one run.

    python -m experiments.benchmarks pytorch            # a training and a denoising step against diffusers
    python -m experiments.benchmarks memory             # what a memory costs, here and concatenated
    python -m experiments.benchmarks encoder            # the memory encoder alone
    python -m experiments.benchmarks vae                # VAE encode and decode
    python -m experiments.benchmarks growth             # with tokens, blocks and reference videos
    python -m experiments.benchmarks pytorch --small --tokens=500 --out=small.json    # sizes for a test

Every measurement is a process of its own, and the two sides take turns, so that both see the machine alike. Needs the
extra `parity`. Results go to `results.json` beside this file, where those of other
commands, precisions, remat policies and devices stay, and all of them to the tables in its README.
"""

import json
import os
import statistics
import subprocess
from collections import ChainMap
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from ditmem_jax.config import flags as cli
from ditmem_jax.errors import UserError
from ditmem_jax.progress import make_progress
from ditmem_jax.storage.files import write_text
from experiments.benchmarks.case import GRIDS, Case
from experiments.benchmarks.child import arguments

RESULTS = Path(__file__).with_name("results.json")
README = Path(__file__).with_name("README.md")
SIDES = ("ours", "torch", "torch.compile")


def plans(
    tokens: Sequence[int], layers: int, dtype: str, remat: str, small: bool
) -> dict[str, list[tuple[str, Case]]]:
    """The operations and cases of each command."""

    def case(**sizes) -> Case:
        return Case(**dict(tokens=tokens[0], layers=layers, dtype=dtype, remat=remat, small=small) | sizes)

    return {
        "pytorch": [(name, case(tokens=n)) for n in tokens for name in ("train", "denoise")],
        "memory": [(name, case(tokens=n)) for n in tokens for name in ("denoise without memory", "denoise")],
        "encoder": [("encoder", case())],
        "vae": [(f"vae {way}", case(tokens=500)) for way in ("encode", "decode")],
        "growth": [
            ("train", case(**sizes))
            for sizes in (
                *({"tokens": n} for n in (500, 2_000, 4_000, 8_000)),
                *({"layers": n} for n in (1, 2, 8)),
                *({"videos": n} for n in (1, 10)),
            )
        ],
    }


def measure(side: str, operation: str, repeats: int, case: Case) -> dict:
    """The result of one process; see `child`."""
    done = subprocess.run(arguments(side, operation, repeats, case), capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        return {"failed": reason[0]}
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    plan: list[tuple[str, Case]], sides: Sequence[str], rounds: int, repeats: int
) -> Iterator[tuple[dict, dict]]:
    """One row per operation and case, of medians over all rounds; and what it was measured on."""
    with make_progress() as progress:
        bar = progress.add_task("measuring", total=len(plan) * rounds * len(sides))
        for operation, case in plan:
            found: dict[str, list[dict]] = {side: [] for side in sides}
            for _ in range(rounds):
                for side in sides:
                    progress.update(bar, description=f"{operation}, {case.tokens} tokens, {side}")
                    found[side].append(measure(side, operation, repeats, case))
                    progress.advance(bar)
            machines = (result.get("machine", {}) for results in found.values() for result in results)
            yield _row(operation, case, found), dict(ChainMap(*machines))


def _row(operation: str, case: Case, found: dict[str, list[dict]]) -> dict:
    row = dict(operation=operation, tokens=case.tokens, layers=case.layers, videos=case.videos)
    row |= dict(dtype=case.dtype, remat=case.remat)
    for side, rounds in found.items():
        if failed := [result["failed"] for result in rounds if "failed" in result]:
            row[side] = {"failed": failed[0]}
            continue
        seconds = statistics.median(second for result in rounds for second in result["seconds"])
        row[side] = {
            "seconds": seconds,
            "peak_gb": statistics.median(result["peak"] for result in rounds) / 1e9,
            "first_call": statistics.median(result["first"] for result in rounds),
        }
        if operation in case.flops:
            row[side]["gflops"] = case.flops[operation] / seconds / 1e9
    return row


def show(rows: list[dict], sides: Sequence[str]) -> Table:
    """The rows as a table for a terminal; ratios above 1 are in favour of the first side."""
    table = Table(box=None, header_style="bold")
    for name in ("operation", "tokens", "blocks", "videos"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for side in sides:
        table.add_column(f"{side}\ns", justify="right")
    for peer in sides[1:]:
        table.add_column(f"{peer}\n/ {sides[0]}", justify="right")
    for side in sides:
        table.add_column(f"{side}\nGB", justify="right")
    for row in rows:
        cells = [row["operation"], *_sizes(row)]
        cells += [_number(row[side], "seconds") for side in sides]
        table.add_row(*cells, *_ratios(row, sides), *(_number(row[side], "peak_gb") for side in sides))
    return table


def _sizes(row: dict) -> list[str]:
    return (
        [""] * 3 if row["operation"] == "matmul" else [f"{row[n]:,}" for n in ("tokens", "layers", "videos")]
    )


def _number(result: dict, name: str) -> str:
    return f"{result[name]:.3g}" if name in result else "failed"


def write_table(results: dict) -> None:
    """Puts all results into the README of this folder; "of peak" is the share of the matrix product's rate."""
    parts = []
    for name, found in results.items():
        product, *_ = rows = found["rows"]
        sides = [side for side in SIDES if side in product]
        header = [
            "operation",
            "tokens",
            "blocks",
            "videos",
            *(f"{side}, s" for side in sides),
            *(f"{peer} / {sides[0]}" for peer in sides[1:]),
        ]
        header += [f"{side}, GB" for side in sides] + [f"{side}, of peak" for side in sides]
        lines = [f"**{name}**\n", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for row in rows:
            cells = [row["operation"], *_sizes(row)]
            cells += [_number(row[side], "seconds") for side in sides] + _ratios(row, sides)
            cells += [_number(row[side], "peak_gb") for side in sides]
            cells += [_share(row[side], product[side]) for side in sides]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        parts.append("\n".join(lines))
    before, rest = README.read_text().split("<!-- table -->\n", 1)
    after = rest.split("<!-- end -->", 1)[1]
    write_text(README, f"{before}<!-- table -->\n" + "\n\n".join(parts) + f"\n<!-- end -->{after}")


def _ratios(row: dict, sides: Sequence[str]) -> list[str]:
    """How many times the seconds of the first side each other one takes."""
    first, *others = (row[side].get("seconds") for side in sides)
    return [f"{other / first:.2f}" if first and other else "-" for other in others]


def _share(result: dict, product: dict) -> str:
    return f"{result['gflops'] / product['gflops']:.0%}" if "gflops" in result and "gflops" in product else ""


def main(command: str) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would look for its machine in the cloud
    sides, known = SIDES_FLAG.value, {str(tokens): tokens for tokens in GRIDS}
    for name, given, possible in (("sides", sides, SIDES), ("tokens", TOKENS.value, known)):
        if wrong := [each for each in given if each not in possible]:
            raise UserError(f"--{name} cannot be {wrong[0]!r}", expected=f"some of {', '.join(possible)}")
    if SMALL.value and OUT.value is None:
        raise UserError(
            "--small says nothing about speed", fix="--out=FILE, not into the results that are kept"
        )
    every = plans(
        [known[tokens] for tokens in TOKENS.value], LAYERS.value, DTYPE.value, REMAT.value, SMALL.value
    )
    if command not in every:
        raise UserError(f"unknown benchmark {command!r}", expected=f"one of: {', '.join(every)}")
    peak = [] if SMALL.value else [("matmul", Case(dtype=DTYPE.value))]
    path = RESULTS if OUT.value is None else Path(OUT.value)
    results = json.loads(path.read_text()) if path.exists() else {}
    rows, machine, name = [], {}, ""
    for row, measured_on in compare(peak + every[command], sides, ROUNDS.value, REPEATS.value):
        rows.append(row)
        machine = measured_on | machine
        name = f"{command}, {DTYPE.value}, remat {REMAT.value}, {machine.get('device', 'no device')}"
        results[f"{name}, unfinished"] = {"machine": machine, "rows": rows}
        write_text(path, json.dumps(results, indent=1) + "\n")
    results[name] = results.pop(f"{name}, unfinished")
    write_text(path, json.dumps(results, indent=1) + "\n")
    Console().print(show(rows, sides))
    for row in rows:
        for side in sides:
            if "failed" in row[side]:
                print(f"{row['operation']}, {side}: {row[side]['failed']}")
    if path == RESULTS:
        write_table(results)


if __name__ == "__main__":
    TOKENS = flags.DEFINE_list("tokens", ["2000", "8000"], "Video tokens of the clips.")
    LAYERS = flags.DEFINE_integer("layers", 4, "Blocks of the transformer.", lower_bound=1)
    DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the networks.")
    REMAT = flags.DEFINE_string(
        "remat",
        "attention",
        "run.remat of our training step. PyTorch's keeps everything, or with 'blocks' recomputes blocks as well.",
    )
    ROUNDS = flags.DEFINE_integer("rounds", 3, "How often the sides take turns.", lower_bound=1)
    REPEATS = flags.DEFINE_integer("repeats", 2, "Calls that a process times.", lower_bound=1)
    SMALL = flags.DEFINE_bool("small", False, "Tiny networks, for a test.")
    SIDES_FLAG = flags.DEFINE_list("sides", list(SIDES[:2]), "ours, torch, torch.compile.")
    OUT = flags.DEFINE_string("out", None, "File for the results, instead of those that are kept.")
    cli.run(main, "COMMAND")
