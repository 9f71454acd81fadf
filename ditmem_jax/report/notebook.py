"""What a notebook shows beside its results: clips that play, and what each cell took. Needs IPython, as notebooks do."""

import os
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ditmem_jax.report.films import animation


def show(*clips: UInt8[np.ndarray, "T H W 3"], fps: int | float = 16, titles: Sequence[str] = ()) -> Any:
    """Return clips side by side as a picture that plays; `titles`, from left to right, are printed above it."""
    from IPython.display import Image

    if titles:
        print(" | ".join(titles))
    return Image(animation(clips, fps), width=200 * len(clips))


def tell_costs() -> None:
    """Print after each cell from now on its seconds, those of CPUs among them (which other work on the machine does not
    change), and the most memory that this process or one that it began has had."""
    from IPython import get_ipython

    began = [0.0, 0.0]

    def clocks() -> tuple[float, float]:
        return time.perf_counter(), sum(
            os.times()[:4]
        )  # user and system, of this process and those that have ended

    def begin(_: Any) -> None:
        began[:] = clocks()

    def end(_: Any) -> None:
        seconds, of_cpus = (now - then for now, then in zip(clocks(), began, strict=True))
        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        most = max(resource.getrusage(kind).ru_maxrss for kind in kinds) / unit
        print(f"[{seconds:.0f} s, CPUs {of_cpus:.0f} s; memory so far at most {most:.1f} GiB]")

    begin(None)
    events = get_ipython().events
    events.register("pre_run_cell", begin)
    events.register("post_run_cell", end)
