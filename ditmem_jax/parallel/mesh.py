"""Devices as a mesh, and which axis of an activation is divided over which axis of the mesh.

One jitted program runs on any mesh, a single device included. Networks are written for whole arrays and know names
of axes only: what they `constrain` is divided by the mesh of `jax.set_mesh`, and is as it was outside of one.

| divided | over |
|---|---|
| batches | `data`, `fsdp` |
| tokens of a clip | `context` |
| heads | `tensor` |
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from ditmem_jax.config import Config, MeshConfig
from ditmem_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
# Axis of an activation -> mesh axes.
ACTIVATIONS = {"batch": BATCH_AXES, "tokens": ("context",), None: ()}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all `devices` (by default every device of the process group).

    Raises:
        UserError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    product = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if len(devices) % given or (-1 not in sizes and len(devices) != given):
        raise UserError(
            "the mesh does not fit the devices",
            expected=f"sizes whose product {'divides' if -1 in sizes else 'is'} {len(devices)}, the number of devices",
            found=f"{product}: {given}",
            fix="mesh.data=-1 takes the devices that the other axes leave",
        )
    sizes = tuple(len(devices) // given if size == -1 else size for size in sizes)
    # Not jax.make_mesh, which splits an axis of the torus on some chips only.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Divides the leading axis of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shard(mesh: Mesh, x: np.ndarray, *names: str | None) -> jax.Array:
    """Put an array that every process has on the devices, with the sharding that `constrain` would give it."""
    sharding = NamedSharding(mesh, partition_spec(x.shape, [ACTIVATIONS[name] for name in names], mesh))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " b"]:
    """The rows of a batch that devices of this process hold, ascending."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def all_gather_to_host(arrays: Any, mesh: Mesh) -> Any:
    """Return the arrays of a pytree as NumPy arrays, in full, in every process. All processes must call it.

    What lies on devices of this process alone, or in full on one of them, is copied; only the rest is gathered, by
    a program that is compiled once for each mesh and structure of `arrays`.
    """
    if not all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(arrays)):
        arrays = _gather(mesh)(arrays)
    return jax.device_get(arrays)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    """The jitted identity that replicates arrays over `mesh`; one function, so that jit finds its programs again."""
    return jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))


def batch_parts(mesh: Mesh) -> int:
    """In how many parts a batch is divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its axes divided as ACTIVATIONS says of `names`, on the mesh of `jax.set_mesh`.

    Outside of a mesh it is `x`. An axis that its mesh axes do not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = partition_spec(x.shape, [ACTIVATIONS[name] for name in names], mesh)
    return jax.lax.with_sharding_constraint(x, spec)


def partition_spec(
    shape: Sequence[int], wanted: Sequence[tuple[str, ...]], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Each axis over as many of its wanted mesh axes, from the first on, as divide it."""
    spec = []
    for size, axes in zip(shape, wanted, strict=True):
        axes = [axis for axis in axes if mesh.shape[axis] > 1]
        while size % math.prod(mesh.shape[axis] for axis in axes):
            axes.pop()
        spec.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)


def check_mesh(config: Config, mesh: Mesh, batch_size: int | None = None) -> None:
    """Raises UserError if a batch, the tokens of a clip or the heads do not divide over their axes of the mesh.

    Args:
        batch_size: None where a batch that does not divide is computed by all devices alike.
    """
    parts = batch_parts(mesh)
    if batch_size is not None and batch_size % parts:
        raise UserError(
            "data.batch_size does not divide over the mesh",
            expected=f"a multiple of data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} = {parts}",
            found=batch_size,
            fix=f"use {math.ceil(batch_size / parts) * parts}",
        )
    grid = config.token_grid
    for what, total, shown, axis in (
        ("tokens of a clip", math.prod(grid), " x ".join(map(str, grid)) + " = ", "context"),
        ("heads of the transformer", config.dit.num_heads, "", "tensor"),
    ):
        if total % (size := mesh.shape[axis]):
            fits = [n for n in range(1, mesh.size + 1) if total % n == 0 and mesh.size % n == 0]
            raise UserError(
                f"the {what} do not divide over mesh.{axis}",
                expected=f"a divisor of {shown}{total}",
                found=f"{total} / {size} = {total / size:.2f}",
                fix=f"of {mesh.size} devices, give {axis} {', '.join(map(str, fits))}",
            )


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A pytree of shapes and dtypes with the sharding of each, from which programs compile without any array."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )
