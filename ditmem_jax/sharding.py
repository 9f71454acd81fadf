"""Devices as a mesh, and which axis of which array is divided over which axis of the mesh.

Networks know nothing of this: they are written for whole arrays, and one jitted program runs on any mesh, a
single device included. Batches are divided over `data` and `fsdp`, weights over `fsdp` and `tensor`.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ditmem_jax.config import MeshConfig
from ditmem_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")

# Pattern in an array's dotted path -> mesh axes of its LAST axes; the first match wins. Axes before those, such
# as the leading one of stacked layers, are not divided.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"\b(q|k|v|up|gate|fc1)\.kernel$", ("fsdp", "tensor")),
    (r"\b(o|down|fc2)\.kernel$", ("tensor", "fsdp")),
    (r"\b(q|k|v|up)\.bias$", ("tensor",)),
    (r"\btoken_embedding\.embedding$", ("fsdp", None)),
    (r"\bkernel$", ("fsdp",)),
    (r"", ()),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all `devices` (by default every device of the process group).

    Raises:
        UserError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    product = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if min(sizes) < -1 or 0 in sizes or sizes.count(-1) > 1:
        raise UserError("impossible mesh", expected="positive sizes, at most one of them -1", found=product)
    if len(devices) % given or (-1 not in sizes and len(devices) != given):
        raise UserError(
            "the mesh does not fit the devices",
            expected=f"sizes whose product {'divides' if -1 in sizes else 'is'} {len(devices)}, the number of devices",
            found=f"{product}: {given}",
            fix="mesh.data=-1 takes the devices that the other axes leave",
        )
    sizes = tuple(len(devices) // given if size == -1 else size for size in sizes)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Divides the leading axis of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        raise UserError(
            "data.batch_size does not divide over the mesh",
            expected=f"a multiple of data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} = {parts}",
            found=batch_size,
            fix=f"use {math.ceil(batch_size / parts) * parts}",
        )


def array_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the array at dotted `path` lives.

    An axis that its mesh axis does not divide stays whole: that costs memory on some small array, never
    correctness.
    """
    last = next(axes for pattern, axes in RULES if re.search(pattern, path))[-len(shape) :] if shape else ()
    axes = (None,) * (len(shape) - len(last)) + last
    divided = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*divided))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """`array_sharding` of every array in a pytree, such as parameters and the state of their optimiser."""

    def leaf(path, x):
        return array_sharding(jax.tree_util.keystr(path, simple=True, separator="."), x.shape, mesh)

    return jax.tree_util.tree_map_with_path(leaf, tree)
