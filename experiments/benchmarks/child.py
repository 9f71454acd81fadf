"""One measurement in a process of its own, so that its peak memory is its own: prints one line of JSON."""

import dataclasses
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

from experiments.benchmarks.case import Case


def main(side: str, operation: str, repeats: int, case: Case) -> None:
    begun = time.perf_counter()
    run = _preparer(side)(operation, case)
    prepared = time.perf_counter()
    run()
    first = time.perf_counter()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(
        json.dumps(
            dict(
                seconds=seconds,
                prepare=prepared - begun,
                first=first - prepared,
                peak=_peak_bytes(side),
                machine=_machine(side),
            )
        )
    )


def _preparer(side: str):
    if side == "ours":
        from experiments.benchmarks.ours import prepare

        return prepare
    from experiments.benchmarks.peer import prepare

    return lambda operation, case: prepare(operation, case, compiled=side == "torch.compile")


def _peak_bytes(side: str) -> int:
    """The most memory that was in use: of the accelerator where there is one, else of the process."""
    if side == "ours":
        import jax

        statistics = jax.devices()[0].memory_stats()
        if statistics:
            return statistics["peak_bytes_in_use"]
    else:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _machine(side: str) -> dict[str, str | int]:
    """The machine that the numbers were measured on."""
    if side == "ours":
        import jax

        accelerator = jax.devices()[0].device_kind if jax.default_backend() != "cpu" else None
        library = {"jax": jax.__version__}
    else:
        import torch

        accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        library = {"torch": torch.__version__}
    device = accelerator or platform.processor() or platform.machine()
    if not accelerator and (info := Path("/proc/cpuinfo")).exists():
        device = next(
            line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line
        )
    return dict(device=device, cores=os.cpu_count() or 0, python=platform.python_version()) | library


def arguments(side: str, operation: str, repeats: int, case: Case) -> list[str]:
    """The command line of this program."""
    given = dict(side=side, operation=operation, repeats=repeats, case=dataclasses.asdict(case))
    return [sys.executable, "-m", "experiments.benchmarks.child", json.dumps(given)]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(given["side"], given["operation"], given["repeats"], Case(**given["case"]))
