"""Arrays of ours back under their original names: the inverse of the engine, for weights that are made here."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .engine import Table

INVERSES = {
    "copy": lambda x: x,
    "linear": lambda x: x.T,
    "conv2d": lambda x: x.transpose(3, 2, 0, 1),
    "conv3d": lambda x: x.transpose(4, 3, 0, 1, 2),
    "squeeze0": lambda x: x[None],
}


def originals(
    table: Table, arrays: Mapping[str, Any], patch_size: tuple[int, int, int] = (1, 2, 2)
) -> Iterator[tuple[str, np.ndarray]]:
    """Original name and tensor, a view where that is possible, for every rule of the table.

    Args:
        arrays: in our layout, by our path; anything with a shape that numpy can turn into an array.
        patch_size: of a transformer, whose patch embedding is a convolution there.
    """
    inverses = INVERSES | {
        "patch": lambda x: x.reshape(*patch_size, -1, x.shape[-1]).transpose(4, 3, 0, 1, 2),
        "flatten": lambda x: x.reshape(-1, 1, 1, 1),
        "frames": lambda x: x.reshape(-1, 1, 1),
    }
    for rule in table.rules:
        frames = rule.transform == "flatten" and rule.source.endswith(".norm.gamma")  # attention of the VAE
        inverse, array = inverses["frames" if frames else rule.transform], arrays[rule.target]
        if "{i}" not in rule.source:
            yield rule.source, inverse(np.asarray(array))
            continue
        for i in range(array.shape[0]):
            yield rule.source.format(i=i), inverse(np.asarray(array)[i])  # mapped anew, if it is on disk


def original(
    table: Table, arrays: Mapping[str, np.ndarray], patch_size: tuple[int, int, int] = (1, 2, 2)
) -> dict[str, np.ndarray]:
    """The whole of `originals`, in memory."""
    return {name: np.ascontiguousarray(x) for name, x in originals(table, arrays, patch_size)}
