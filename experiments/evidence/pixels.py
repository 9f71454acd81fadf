"""Rendering and measuring clips on all cores; it imports no framework, which every process would have to."""

import functools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from ditmem_jax.worlds.laws import PHENOMENA, World
from ditmem_jax.worlds.measure import LAWLESS_PX, measure
from ditmem_jax.worlds.simulate import Clip, sample_clip


@functools.cache
def _pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork of a program that runs XLA may hang
    return ProcessPoolExecutor(os.cpu_count(), mp_context=context)


def on_all_cores(function: Callable, tasks: list) -> list:
    """`list(map(function, tasks))`, by processes that stay for the next call."""
    return list(_pool().map(function, tasks, chunksize=max(1, len(tasks) // (4 * os.cpu_count()))))


def render(task: tuple[int, str, World, int]) -> list[Clip]:
    """Clips of one planet, so many of every phenomenon; what they show depends on planet and split only."""
    stream, split, world, count = task
    rng = np.random.default_rng([stream, *world.name.encode(), len(split)])
    return [sample_clip(rng, world, phenomenon) for phenomenon in PHENOMENA for _ in range(count)]


def tell(task: tuple[np.ndarray, str]) -> dict[str, float]:
    """The constants that a clip tells; none of a clip that does not follow its law."""
    video, phenomenon = task
    found = measure(video, phenomenon)
    if found.residual_px > LAWLESS_PX:
        return {}
    return {name: value for name, value in found.constants.items() if found.sigma[name] < np.inf}


def tell_all(videos: np.ndarray, phenomena: Sequence[str]) -> list[dict[str, Any]]:
    """`tell` of every clip."""
    return on_all_cores(tell, list(zip(videos, phenomena, strict=True)))
