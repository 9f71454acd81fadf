"""Norms, rotary and sinusoidal embeddings, feed-forward: the parts that the networks share.

Norms, angles and modulation are computed in float32 whatever the dtype of the weights: bfloat16 has 8 bits,
which is too few for a position of 32,760 or a variance.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8


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
        return layer_norm(x, self.eps) * self.scale[...].reshape(shape) + self.bias[...].reshape(shape)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with scale, over the last axis."""

    def __init__(self, dim: int, eps: float, *, dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))


class Int8Linear(nnx.Module):
    """A frozen linear layer whose matrix is held in 8 bits, with one factor per output (see `to_int8`).

    The factors multiply the product instead of the matrix, which is the same and leaves bfloat16 nothing to round:
    it holds every 8-bit integer. By hand for that: qwix multiplies the matrix, in the precision of the factors, and
    its layers hold a matrix and its factors in one variable, where ours have paths of their own on disk and on a mesh.
    """

    def __init__(
        self, inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        del rngs
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs), jnp.int8))
        self.scale = nnx.Param(jnp.ones((outputs,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        kernel = self.kernel[...].astype(self.dtype)
        product = jnp.matmul(x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        shape = (1,) * (x.ndim - 1) + (-1,)
        bias = self.bias[...].astype(jnp.float32).reshape(shape)
        return (product * self.scale[...].reshape(shape) + bias).astype(self.dtype)


def to_int8(
    kernel: Float[np.ndarray, "*layers D E"],
) -> tuple[Int8[np.ndarray, "*layers D E"], Float[np.ndarray, "*layers E"]]:
    """A matrix in 8 bits and the factor of each output, in float32: the largest weight of an output becomes 127."""
    if kernel.ndim > 2:  # layer by layer, so that no copy of all of them exists
        layers = [to_int8(layer) for layer in kernel]
        return tuple(np.stack(parts) for parts in zip(*layers, strict=True))
    kernel = np.asarray(kernel, np.float32)
    scale = np.maximum(np.abs(kernel).max(0), np.finfo(np.float32).tiny) / np.float32(127)
    return np.rint(kernel / scale).astype(np.int8), scale


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
        linear: type[nnx.Linear] | type[Int8Linear] = nnx.Linear,
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


def rotary_angles(grid: tuple[int, int, int], head_dim: int, theta: float = 10000.0) -> np.ndarray:
    """Angles of the 3D rotary embedding, `[T*H*W, head_dim / 2]`, computed in float64 on the host.

    The head splits into parts for T, H and W of sizes d - 2 (d // 3), d // 3, d // 3, with d // 3 rounded down
    to an even number (Wan: 44, 42, 42 of 128).
    """
    side = head_dim // 6 * 2
    sizes = (head_dim - 2 * side, side, side)
    parts = []
    for axis, (length, size) in enumerate(zip(grid, sizes, strict=True)):
        frequency = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
        angle = np.arange(length, dtype=np.float64)[:, None] * frequency
        shape = [1, 1, 1, size // 2]
        shape[axis] = length
        parts.append(np.broadcast_to(angle.reshape(shape), (*grid, size // 2)))
    return np.concatenate(parts, axis=-1).reshape(-1, head_dim // 2)


def rotate(x: Float[Array, "B S N K"], angles: np.ndarray) -> Float[Array, "B S N K"]:
    """Rotates interleaved pairs of features by `angles [S, K/2]`."""
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[None, :, None, :] for f in (np.cos, np.sin))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return (
        jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape).astype(x.dtype)
    )
