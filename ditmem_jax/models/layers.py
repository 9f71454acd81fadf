"""Norms, rotary and sinusoidal embeddings, feed-forward: the parts that the networks share.

Norms, angles and modulation are computed in float32 whatever the dtype of the weights: bfloat16 has 8 bits,
which is too few for a position of 32,760 or a variance.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def layer_norm(x: Float[Array, "*batch D"], eps: float) -> Float[Array, "*batch D"]:
    """Layer norm without parameters; float32 in and out of the arithmetic, the input's dtype outside."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return normed.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias."""

    def __init__(self, dim: int, eps: float, *, dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        shape = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = (p[...].astype(x.dtype).reshape(shape) for p in (self.scale, self.bias))
        return layer_norm(x, self.eps) * scale + bias


class RMSNorm(nnx.Module):
    """Root-mean-square norm with scale, over the last axis."""

    def __init__(self, dim: int, eps: float, *, dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))


class Linear(nnx.Linear):
    """A linear layer that may have a low-rank adapter (`adapters.attach`), which adds to its output."""

    lora: nnx.Module | None = None

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        y = super().__call__(x)
        return y if self.lora is None else y + self.lora(x.astype(y.dtype))


class FeedForward(nnx.Module):
    """Two linear layers around a GELU, which is approximated by a tanh unless it is to be `exact`.

    Args:
        linear: the kind of layer.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        out: int,
        *,
        exact: bool = False,
        linear: Callable[..., nnx.Module] = nnx.Linear,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        self.up = linear(dim, hidden, rngs=rngs, dtype=dtype, param_dtype=dtype)
        self.down = linear(hidden, out, rngs=rngs, dtype=dtype, param_dtype=dtype)
        self.exact = exact

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        return self.down(nnx.gelu(self.up(x), approximate=not self.exact))


def sinusoidal_embedding(position: Float[Array, " B"], dim: int) -> Float[Array, "B dim"]:
    """cos and sin of `position` at dim/2 frequencies from 1 down to 1/10000; frequencies from float64."""
    half = dim // 2
    frequency = jnp.asarray(10000.0 ** (-np.arange(half) / half), jnp.float32)
    angle = position.astype(jnp.float32)[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def rotary_table(
    grid: tuple[int, int, int], head_dim: int, theta: float = 10000.0
) -> Float[Array, "2 S half"]:
    """Cosines and sines of the 3D rotary embedding for the tokens of a grid (T, H, W); half is `head_dim` / 2.

    The head splits into parts for T, H and W of sizes d - 2 (d // 3), d // 3, d // 3, with d // 3 rounded down
    to an even number (Wan: 44, 42, 42 of 128). Angles are float64 on the host. A program holds one table an axis and
    lays them out when it runs: all tokens of a clip of 720p would be constants of 77 MB.
    """
    side = head_dim // 6 * 2
    parts = []
    for axis, size in enumerate((head_dim - 2 * side, side, side)):
        frequency = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
        angle = np.arange(grid[axis], dtype=np.float64)[:, None] * frequency
        shape = [2, 1, 1, 1, size // 2]
        shape[axis + 1] = grid[axis]
        table = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32).reshape(shape)
        parts.append(jnp.broadcast_to(jnp.asarray(table), (2, *grid, size // 2)))
    return jnp.concatenate(parts, axis=-1).reshape(2, -1, head_dim // 2)


def rotate(x: Float[Array, "B S N K"], table: Float[Array, "2 S half"]) -> Float[Array, "B S N K"]:
    """Rotate interleaved pairs of features by the angles of a `rotary_table`."""
    cos, sin = table[:, None, :, None, :]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return (
        jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape).astype(x.dtype)
    )
