"""Compiled programs: the cache that keeps them from run to run, compiling on all processes, and where time goes."""

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ditmem_jax.parallel.processes import barrier


def enable_cache(folder: str | None) -> None:
    """Keep compiled programs from run to run.

    Args:
        folder: where; "off" keeps none; None is that of JAX_COMPILATION_CACHE_DIR or, without that, `ditmem_jax/xla` in
            the user's folder of caches.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder)
    elif jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]  # made at import
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", str(Path(caches, "ditmem_jax", "xla")))


def keep_freed_memory() -> None:
    """Keeps glibc from giving freed memory back to the kernel; elsewhere it does nothing.

    On CPUs XLA allocates all that a step needs anew each time: for a small network hundreds of megabytes that the
    kernel would hand out zeroed, page by page. Kept, gradients of the tiny transformer over 64 clips took 0.20 s
    instead of 0.27 s on two cores. With large networks it costs more than it saves: arrays of gigabytes leave gaps
    that nothing fits, and the process grew to twice its size.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1)):
            mallopt(option, value)


def memory_in_use() -> int:
    """Bytes of memory in use: of this process's first device, or, where that has none of its own, the process's peak."""
    stats = jax.local_devices()[0].memory_stats() or {}
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return stats.get("bytes_in_use", kilobytes if sys.platform == "darwin" else 1024 * kilobytes)


def compile_for(function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """Compile a jitted function for arguments, or their layouts, on all processes before any goes on."""
    program = function.lower(*arguments).compile()
    barrier()
    return program


class Phases:
    """Seconds from when it is made to the first step, by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, name: str) -> None:
        """End the current phase and record its duration under `name`."""
        now = time.perf_counter()
        self.seconds[name], self._since = now - self._since, now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s: {parts}"
