"""Arrays of ours back under their original names: the inverse of the engine, for weights that are made here."""

import numpy as np

from convert.engine import Table

INVERSES = {
    "copy": lambda x: x,
    "linear": lambda x: x.T,
    "conv2d": lambda x: x.transpose(3, 2, 0, 1),
    "conv3d": lambda x: x.transpose(4, 3, 0, 1, 2),
    "squeeze0": lambda x: x[None],
}


def original(
    table: Table, arrays: dict[str, np.ndarray], patch_size: tuple[int, int, int] = (1, 2, 2)
) -> dict[str, np.ndarray]:
    """Original name -> tensor, for every rule of the table whose target is among `arrays`.

    Args:
        patch_size: of a transformer, whose patch embedding is a convolution there.
    """
    inverses = INVERSES | {
        "patch": lambda x: x.reshape(*patch_size, -1, x.shape[-1]).transpose(4, 3, 0, 1, 2),
        "flatten": lambda x: x.reshape(-1, 1, 1, 1),
    }
    tensors = {}
    for rule in table.rules:
        inverse, x = inverses[rule.transform], arrays[rule.target]
        layers = enumerate(x) if "{i}" in rule.source else [(0, x)]
        tensors |= {rule.source.format(i=i): np.ascontiguousarray(inverse(layer)) for i, layer in layers}
    return tensors
