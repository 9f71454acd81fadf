"""Where the arrays of networks live on a mesh, told by their dotted paths.

Weights, and the state of their optimiser, are divided over `fsdp` and `context` (gathered block by block before use)
and over `tensor`. One table of patterns serves all networks.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ditmem_jax.parallel.mesh import partition_spec

# Axis of a weight -> mesh axes: devices that share a clip need not each hold the weights.
WEIGHTS = {"fsdp": ("fsdp", "context"), "tensor": ("tensor",), None: ()}

# Pattern in an array's dotted path -> names in WEIGHTS of its LAST axes; the first match wins. Axes before those, such
# as the leading one of stacked layers, are not divided.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"^vae\.", ()),  # small, and gathered anew for each of many chunks
    (r"\b(q|k|v|up|gate|fc1)\.(kernel|scale)$", ("fsdp", "tensor")),
    (r"\b(o|down|fc2)\.(kernel|scale)$", ("tensor", "fsdp")),
    (r"\b(q|k|v|up)\.bias$", ("tensor",)),
    # Adapters: A is divided like the inputs of its matrix, B like the outputs.
    (r"\b(q|k|v|up)\.lora\.a$", ("fsdp", None)),
    (r"\b(q|k|v|up)\.lora\.b$", (None, "tensor")),
    (r"\b(o|down)\.lora\.a$", ("tensor", None)),
    (r"\b(o|down)\.lora\.b$", (None, "fsdp")),
    (r"\btoken_embedding\.embedding$", ("fsdp", None)),
    (r"\bkernel$", ("fsdp",)),
    (r"", ()),
)


def place_on(mesh: Mesh, prefix: str) -> Callable[[str, np.ndarray], jax.Array]:
    """The function that puts the weights of the network `prefix` on the mesh, each where its path tells."""

    def place(path: str, array: np.ndarray) -> jax.Array:
        sharding = sharding_for(f"{prefix}.{path}", array.shape, mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return place


def sharding_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the array at dotted `path` lives.

    An axis that its mesh axis does not divide stays whole: that costs memory on some small array, never
    correctness.
    """
    return NamedSharding(
        mesh, partition_spec(shape, [WEIGHTS[name] for name in _weight_axes(path, len(shape))], mesh)
    )


def _weight_axes(path: str, axes: int) -> tuple[str | None, ...]:
    """Names in WEIGHTS of the axes of the array at dotted `path`."""
    last = next(names for pattern, names in RULES if re.search(pattern, path))[-axes:] if axes else ()
    return (None,) * (axes - len(last)) + last


def gathered(layer: nnx.State) -> nnx.State:
    """The weights of one layer, divided over `tensor` only, on the mesh of `jax.set_mesh`; else as they are."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return layer

    def leaf(path, x):
        path = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")  # of a Param
        wanted = [WEIGHTS[name] if name == "tensor" else () for name in _weight_axes(path, x.ndim)]
        return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, wanted, mesh))

    return jax.tree_util.tree_map_with_path(leaf, layer)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """`sharding_for` of every array in a pytree, such as parameters and the state of their optimiser."""

    def leaf(path, x):
        return sharding_for(jax.tree_util.keystr(path, simple=True, separator="."), x.shape, mesh)

    return jax.tree_util.tree_map_with_path(leaf, tree)
