"""Low-rank adapters (LoRA, Hu et al. 2021): y = x W + (alpha / rank) x A B, with W frozen and A, B trained.

`attach` gives a network's structure the places for A and B, at paths of their own beside those of W:

    blocks.self_attention.q.kernel    [layers, D, E]      the frozen matrix, in float32, bfloat16 or 8 bits
    blocks.self_attention.q.lora.a    [layers, D, rank]   float32, like all that trains
    blocks.self_attention.q.lora.b    [layers, rank, E]

so an adapted network is `structure.merge(arrays | adapters)`: the arrays of the frozen network stay as they are. The
scan over blocks slices A and B like the block's weights, and x A B is computed by itself, so that no matrix W + A B
exists in training, and an update too small for W's own dtype is not lost. `merge` adds A B to W once, for sampling
without the extra products and for files that other programs read. Equal to peft's `LoraConfig` without dropout.

    structure, frozen = split(load_dit(config))
    structure, shapes = attach(structure, config.adapter)
    adapters = init(shapes, jax.random.key(0))
    dit = structure.merge(frozen | adapters)   # computes exactly what the frozen network does, until B is trained
"""

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from ditmem_jax.config import AdapterConfig
from ditmem_jax.errors import UserError, nearest
from ditmem_jax.models.layers import Linear
from ditmem_jax.models.quantised import Int8Linear, from_int8, to_int8
from ditmem_jax.models.state import Arrays, Structure, split

NAME = "lora"  # of the part of a linear layer, in paths


class LowRank(nnx.Module):
    """x A B times a factor, computed in the dtype of `x`; parameters are float32."""

    def __init__(self, a: Array | jax.ShapeDtypeStruct, b: Array | jax.ShapeDtypeStruct, scale: float):
        self.a, self.b = nnx.Param(a), nnx.Param(b)
        self.scale = scale

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        return (x @ self.a[...].astype(x.dtype)) @ self.b[...].astype(x.dtype) * self.scale


def attach(structure: Structure, config: AdapterConfig) -> tuple[Structure, dict[str, jax.ShapeDtypeStruct]]:
    """The structure with adapters in the linear layers that `config.targets` names, and their shapes by path.

    Raises:
        UserError: for a target that names no linear layer of the blocks.
    """
    network = nnx.merge(structure.graph, structure.state)
    layers = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(network)
        if isinstance(module, Linear | Int8Linear)
    }
    for target in config.targets:
        if not any(re.search(target, path) for path in layers):
            raise UserError(
                f"adapter.targets: no linear layer is called {target!r}",
                expected=f"regular expressions for some of: {', '.join(sorted(layers))}",
            )
    for path, layer in layers.items():
        if any(re.search(target, path) for target in config.targets):
            *stack, inputs, outputs = layer.kernel.get_value().shape
            a, b = (
                jax.ShapeDtypeStruct((*stack, *matrix), jnp.float32)
                for matrix in ((inputs, config.rank), (config.rank, outputs))
            )
            layer.lora = LowRank(a, b, config.scale)
    structure, shapes = split(network)
    return structure, {path: x for path, x in shapes.items() if f".{NAME}." in path}


def init(shapes: dict[str, jax.ShapeDtypeStruct], key: Key[Array, ""]) -> Arrays:
    """New adapters, which change nothing: A uniform within 1 / sqrt(inputs) as in peft, B zero."""
    keys = jax.random.split(key, len(shapes))
    return {
        path: jax.random.uniform(key, x.shape, x.dtype, -1, 1) * x.shape[-2] ** -0.5
        if path.endswith(".a")
        else jnp.zeros(x.shape, x.dtype)
        for key, (path, x) in zip(keys, sorted(shapes.items()), strict=True)
    }


def merge(arrays: Arrays, adapters: Arrays, config: AdapterConfig) -> Arrays:
    """The arrays of a frozen network with W + (alpha / rank) A B in place of each adapted W.

    The sum is float32 and is rounded to the dtype in which W is held, so that the result fits the same network and
    takes no more memory. In 8 bits that is a second rounding, which bits of W that B = 0 leaves alone survive.

    Args:
        arrays: by path; those that are adapted are gathered to this host, layer by layer merged, and put back.
    Raises:
        UserError: for an adapter of a matrix that is not there, or of another size.
    """
    merged = dict(arrays)
    for layer in adapted_layers(adapters):
        kernel, scale = f"{layer}.kernel", f"{layer}.scale"
        if kernel not in arrays:
            raise UserError(
                f"an adapter has no matrix to be merged into: {kernel}",
                expected=nearest(kernel, (path for path in arrays if path.endswith("kernel"))),
            )
        if arrays[kernel].dtype == jnp.int8:
            full = np.asarray(from_int8(jnp.asarray(arrays[kernel]), jnp.asarray(arrays[scale])))
            new = dict(
                zip((kernel, scale), to_int8(merge_matrix(layer, full, adapters, config)), strict=True)
            )
        else:
            new = {kernel: merge_matrix(layer, np.asarray(arrays[kernel]), adapters, config)}
        for path, x in new.items():
            old = arrays[path]
            merged[path] = jax.device_put(x, old.sharding) if isinstance(old, jax.Array) else x
    return merged


def merge_matrix(
    layer: str, kernel: Float[np.ndarray, "*layers D E"], adapters: Arrays, config: AdapterConfig
) -> Float[np.ndarray, "*layers D E"]:
    """`merge` for the matrix, or stacked matrices, of one linear layer, in their own dtype."""
    a, b = (np.asarray(adapters[f"{layer}.{NAME}.{part}"], np.float32) for part in "ab")
    if a.shape != (*kernel.shape[:-1], config.rank) or b.shape != (
        *a.shape[:-2],
        config.rank,
        kernel.shape[-1],
    ):
        raise UserError(
            f"the adapter of {layer} does not fit",
            expected=f"rank {config.rank}, a matrix of {list(kernel.shape)}",
            found=f"A {list(a.shape)}, B {list(b.shape)}",
        )

    def add(kernel: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if kernel.ndim > 2:  # layer by layer, so that there is no copy of all of them in float32
            return np.stack([add(*one) for one in zip(kernel, a, b, strict=True)])
        change = np.float32(config.scale) * (a @ b)
        # Where nothing is added W stays as it is to the bit: -0 + 0 would be 0.
        return np.where(change == 0, kernel, (kernel.astype(np.float32) + change).astype(kernel.dtype))

    return add(kernel, a, b)


def adapted_layers(paths: Iterable[str]) -> list[str]:
    """Paths of the linear layers to which adapters of these paths belong."""
    return sorted({path.rsplit(f".{NAME}.", 1)[0] for path in paths})
