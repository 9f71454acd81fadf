"""Attention of one device's part: samples, heads and tokens divided over the mesh, keys going round a ring.

Every device of the axis `context` has a part of the tokens. It attends with its own queries to the keys it holds and
sends those on to the next device meanwhile, until each has seen all. Outputs are merged by their log-sum-exp.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from ditmem_jax.errors import UserError
from ditmem_jax.models.attention.kernels import Kernel
from ditmem_jax.parallel.mesh import BATCH_AXES

AXIS = "context"


class Layout(NamedTuple):
    """How the mesh of `jax.set_mesh` divides the arrays of one attention.

    Samples and heads that their axes of the mesh do not divide stay whole: every device computes them then.
    """

    mesh: AbstractMesh
    batch: tuple[str, ...] | None
    heads: str | None
    ring: bool  # keys are divided as queries are

    @property
    def query(self) -> PartitionSpec:
        return PartitionSpec(self.batch, AXIS, self.heads)

    @property
    def key(self) -> PartitionSpec:
        return self.query if self.ring else PartitionSpec(self.batch, None, self.heads)

    @property
    def rows(self) -> tuple[PartitionSpec, ...]:
        """Of a memory's keys, values and biases."""
        whole = PartitionSpec(self.batch, None, self.heads)
        return whole, whole, PartitionSpec(self.batch)

    @property
    def lse(self) -> PartitionSpec:
        return PartitionSpec(self.batch, self.heads, AXIS)


def layout_for(query: Float[Array, "B S N K"], ring: bool) -> Layout | None:
    """The layout on the mesh in force; None without one, and on a single device.

    Raises:
        UserError: for tokens that do not divide over the ring.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    samples, tokens, heads = query.shape[:3]
    if tokens % mesh.shape[AXIS]:
        raise UserError(
            f"the tokens of a clip do not divide over mesh.{AXIS}",
            expected=f"a multiple of {mesh.shape[AXIS]}",
            found=f"{tokens} tokens",
            fix=f"a mesh.{AXIS} that divides {tokens}",
        )
    parts = 1
    for axis in BATCH_AXES:
        parts *= mesh.shape[axis]
    return Layout(
        mesh,
        BATCH_AXES if samples % parts == 0 else None,
        "tensor" if heads % mesh.shape["tensor"] == 0 else None,
        ring and mesh.shape[AXIS] > 1,
    )


def per_query(x: Float[Array, "B N S"]) -> Float[Array, "B S N 1"]:
    return x.transpose(0, 2, 1)[..., None]


def forward(
    kernel: Kernel,
    query: Float[Array, "B S N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
) -> tuple[Float[Array, "B S N K"], Float[Array, "B N S"]]:
    """Output (float32) and log-sum-exp of this device's queries over the keys of the whole ring."""

    def step(carry, _):
        keys, out, lse = carry
        following = _send(keys)
        part, part_lse = kernel.forward(query, *keys)
        above = jnp.logaddexp(lse, part_lse)
        out = out * per_query(jnp.exp(lse - above))
        out += part.astype(jnp.float32) * per_query(jnp.exp(part_lse - above))
        return (following, out, above), None

    samples, tokens, heads, _ = query.shape
    nothing = jnp.zeros(query.shape, jnp.float32), jnp.full((samples, heads, tokens), -jnp.inf)
    carry, _ = jax.lax.scan(step, ((key, value), *nothing), length=jax.lax.axis_size(AXIS))
    return carry[1:]


def backward(
    kernel: Kernel,
    query: Float[Array, "B S N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    out: Float[Array, "B S N K"],
    lse: Float[Array, "B N S"],
    grad: Float[Array, "B S N K"],
) -> tuple[Float[Array, "B S N K"], Float[Array, "B S N K"], Float[Array, "B S N K"]]:
    """Gradients (float32) of this device's queries, keys and values, for `out` and `lse` over all keys.

    Those of keys follow the keys one step behind, so that they too are on the way while the next are computed.
    """

    def step(carry, _):
        keys, sums, query_sum = carry
        following, sums = _send(keys), _send(sums)
        query_grad, *grads = kernel.backward(query, *keys, out, lse, grad)[:3]
        sums = tuple(x + y.astype(jnp.float32) for x, y in zip(sums, grads, strict=True))
        return (following, sums, query_sum + query_grad.astype(jnp.float32)), None

    zeros = jnp.zeros(query.shape, jnp.float32)
    start = (key, value), (zeros, zeros), zeros
    (_, sums, query_sum), _ = jax.lax.scan(step, start, length=jax.lax.axis_size(AXIS))
    return query_sum, *_send(sums)  # the last step home


def _send(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """From every device to the next of the ring."""
    size = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(arrays, AXIS, [(i, (i + 1) % size) for i in range(size)])
