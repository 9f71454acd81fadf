"""Frozen linear layers whose matrices are held in 8 bits."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8

GROUP = 32  # inputs that share a factor in 8 bits: the largest of fewer weights is nearer to the others


class Int8Linear(nnx.Module):
    """A frozen linear layer whose matrix is held in 8 bits, with a factor per output and group of inputs (`to_int8`).

    Before the product it is multiplied out to `dtype`. Not a layer of qwix, which holds a matrix and its factors in one
    variable: on a mesh ours have paths of their own. May have an adapter, like `layers.Linear`.
    """

    lora: nnx.Module | None = None

    def __init__(
        self, inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        del rngs
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs), jnp.int8))
        self.scale = nnx.Param(jnp.ones((inputs // _group(inputs), outputs), jnp.bfloat16))
        self.bias = nnx.Param(jnp.zeros((outputs,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        kernel = from_int8(self.kernel[...], self.scale[...]).astype(self.dtype)
        bias = self.bias[...].astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        x = x.astype(self.dtype)
        y = x @ kernel + bias
        return y if self.lora is None else y + self.lora(x)


def _group(inputs: int) -> int:
    """The largest power of two up to GROUP that divides them."""
    return math.gcd(inputs, GROUP)


def to_int8(
    kernel: Float[np.ndarray, "*layers D E"],
) -> tuple[Int8[np.ndarray, "*layers D E"], Float[np.ndarray, "*layers G E"]]:
    """A matrix in 8 bits and its factors: the largest weight of a group and output becomes 127.

    Factors are rounded to bfloat16 first and the weights divided by what is left, so that this adds no error, but a
    grid up to 0.4 % coarser. The largest weight still rounds to 127, as 127 (1 + 2^-8) < 127.5.
    """
    if kernel.ndim > 2:  # layer by layer, so that no copy of all of them exists
        layers = [to_int8(layer) for layer in kernel]
        return tuple(np.stack(parts) for parts in zip(*layers, strict=True))
    groups = np.asarray(kernel, np.float32).reshape(-1, _group(len(kernel)), kernel.shape[1])
    scale = np.maximum(np.abs(groups).max(1) / np.float32(127), np.finfo(np.float32).tiny).astype(
        jnp.bfloat16
    )
    return np.rint(groups / scale[:, None].astype(np.float32)).astype(np.int8).reshape(kernel.shape), scale


def from_int8(
    kernel: Int8[Array, "*layers D E"], scale: Float[Array, "*layers G E"]
) -> Float32[Array, "*layers D E"]:
    """The matrix that 8 bits and their factors stand for."""
    scale = jnp.repeat(scale.astype(jnp.float32), _group(kernel.shape[-2]), axis=-2)
    return kernel.astype(jnp.float32) * scale
