"""The Wan text-to-video transformer, with memory rows in every self-attention (Wan 2.1; DiT-Mem section 3.2)."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ditmem_jax.config import DiTConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.attention import attention
from ditmem_jax.models.layers import (
    FeedForward,
    LayerNorm,
    RMSNorm,
    layer_norm,
    rotary_angles,
    rotate,
    sinusoidal_embedding,
)
from ditmem_jax.types import Memory

Remat = Literal["none", "products", "blocks"]
REMAT: dict[Remat, Callable[[Callable], Callable]] = {
    "none": lambda block: block,
    "products": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
    "blocks": jax.checkpoint,
}


class Projections(nnx.Module):
    """Query, key, value and output projections with RMS norm over the full width of query and key."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nnx.Linear(config.dim, config.dim, rngs=rngs, dtype=dtype, param_dtype=dtype))
        self.norm_q = RMSNorm(config.dim, config.eps, dtype=dtype)
        self.norm_k = RMSNorm(config.dim, config.eps, dtype=dtype)
        self.num_heads = config.num_heads

    def heads(self, x: Float[Array, "B S D"]) -> Float[Array, "B S N K"]:
        return x.reshape(*x.shape[:2], self.num_heads, -1)

    def query(self, x: Float[Array, "B S D"]) -> Float[Array, "B S N K"]:
        return self.heads(self.norm_q(self.q(x)))

    def key_value(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S N K"], Float[Array, "B S N K"]]:
        return self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))

    def out(self, x: Float[Array, "B S N K"]) -> Float[Array, "B S D"]:
        return self.o(x.reshape(*x.shape[:2], -1))


class Block(nnx.Module):
    """Self-attention over video and memory, cross-attention to the text, feed-forward; modulated by time."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.self_attention = Projections(config, rngs=rngs, dtype=dtype)
        self.cross_attention = Projections(config, rngs=rngs, dtype=dtype)
        self.cross_norm = LayerNorm(config.dim, config.eps, dtype=dtype)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, config.dim, rngs=rngs, dtype=dtype)
        self.modulation = nnx.Param(
            jax.random.normal(rngs.params(), (6, config.dim), dtype) * config.dim**-0.5
        )
        self.eps = config.eps

    def __call__(
        self,
        x: Float[Array, "B S D"],
        context: Float[Array, "B L D"],
        time: Float[Array, "B 6 D"],
        angles: np.ndarray,
        memory: Memory | None,
    ) -> Float[Array, "B S D"]:
        time = time + self.modulation[...].astype(jnp.float32)[None]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (time[:, i : i + 1] for i in range(6))

        with jax.named_scope("self_attention"):
            rows = _modulate(layer_norm(x, self.eps), shift, scale)
            query = rotate(self.self_attention.query(rows), angles)
            key, value = self.self_attention.key_value(rows)
            key = rotate(key, angles)
            if memory is None:
                attended = attention(query, key, value)
            else:
                memory_rows = _modulate(layer_norm(memory.tokens.astype(x.dtype), self.eps), shift, scale)
                attended = attention(
                    query, key, value, *self.self_attention.key_value(memory_rows), memory.bias
                )
            x = x + _gated(self.self_attention.out(attended), gate)
        with jax.named_scope("cross_attention"):
            query = self.cross_attention.query(self.cross_norm(x))
            x = x + self.cross_attention.out(attention(query, *self.cross_attention.key_value(context)))
        with jax.named_scope("feed_forward"):
            return x + _gated(
                self.feed_forward(_modulate(layer_norm(x, self.eps), ffn_shift, ffn_scale)), ffn_gate
            )


class DiT(nnx.Module):
    """The transformer: noisy latents, timestep and text (and a memory) in, velocity out.

    Blocks are stacked along a leading axis and scanned, so that compile time does not grow with depth.

    Args:
        dtype: of weights and matrix products. Norms, angles and modulation stay float32.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, rngs=rngs, dtype=dtype, param_dtype=dtype)

        patch = int(np.prod(config.patch_size))
        self.config = config
        self.patch_embedding = linear(config.in_dim * patch, config.dim)
        self.text_embedding = FeedForward(config.text_dim, config.dim, config.dim, rngs=rngs, dtype=dtype)
        self.time_embedding = nnx.List([linear(config.freq_dim, config.dim), linear(config.dim, config.dim)])
        self.time_projection = linear(config.dim, 6 * config.dim)
        self.blocks = nnx.vmap(lambda rngs: Block(config, rngs=rngs, dtype=dtype), in_axes=0, out_axes=0)(
            rngs.split(config.num_layers)
        )
        self.head = linear(config.dim, config.out_dim * patch)
        self.head_modulation = nnx.Param(
            jax.random.normal(rngs.params(), (2, config.dim), dtype) * config.dim**-0.5
        )
        self.dtype = dtype

    def __call__(
        self,
        latents: Float[Array, "B T H W C"],
        timestep: Float[Array, " B"],
        context: Float[Array, "B L E"],
        memory: Memory | None = None,
        *,
        remat: Remat = "none",
        unroll: bool = False,
    ) -> Float[Array, "B T H W C"]:
        """Velocity of `latents` at `timestep` (1000 sigma) given text embeddings (zero past their length).

        Args:
            remat: what the backward pass finds kept. "none" computes nothing again; "products" keeps matrix
                products only, which saves half of the memory and on CPUs even time; "blocks" keeps the
                inputs of blocks only.
            unroll: lay the blocks out instead of scanning them (for counting operations).
        """
        config = self.config
        if latents.shape[-1] != config.in_dim:
            raise UserError(
                "latents do not fit the transformer",
                expected=f"{config.in_dim} channels",
                found=latents.shape,
            )
        if memory is not None and memory.tokens.shape[-1] != config.dim:
            raise UserError(
                "memory does not fit the transformer",
                expected=f"width {config.dim}",
                found=memory.tokens.shape,
            )
        grid = tuple(size // patch for size, patch in zip(latents.shape[1:4], config.patch_size, strict=True))
        angles = rotary_angles(grid, config.head_dim)

        x = self.patch_embedding(_patchify(latents.astype(self.dtype), config.patch_size))
        context = self.text_embedding(context.astype(self.dtype))
        first, second = self.time_embedding
        time = second(nnx.silu(first(sinusoidal_embedding(timestep, config.freq_dim).astype(self.dtype))))
        modulation = self.time_projection(nnx.silu(time)).astype(jnp.float32).reshape(-1, 6, config.dim)

        graph, layers = nnx.split(self.blocks)

        def block(x, layer):
            return nnx.merge(graph, layer)(x, context, modulation, angles, memory), None

        x, _ = jax.lax.scan(REMAT[remat](block), x, layers, unroll=config.num_layers if unroll else 1)

        shift_scale = self.head_modulation[...].astype(jnp.float32)[None] + time.astype(jnp.float32)[:, None]
        x = _modulate(layer_norm(x, config.eps), shift_scale[:, :1], shift_scale[:, 1:])
        return _unpatchify(self.head(x), grid, config.patch_size).astype(jnp.float32)


def _modulate(x: Float[Array, "B S D"], shift: Float[Array, "B 1 D"], scale: Float[Array, "B 1 D"]):
    return (x.astype(jnp.float32) * (1 + scale) + shift).astype(x.dtype)


def _gated(x: Float[Array, "B S D"], gate: Float[Array, "B 1 D"]):
    return (x.astype(jnp.float32) * gate).astype(x.dtype)


def _patchify(x: Float[Array, "B T H W C"], patch: tuple[int, int, int]) -> Float[Array, "B S P"]:
    """Cuts the grid into patches; features of a patch in the order (t, h, w, channel)."""
    batch, *grid, channels = x.shape
    (t, h, w), (pt, ph, pw) = (size // p for size, p in zip(grid, patch, strict=True)), patch
    x = x.reshape(batch, t, pt, h, ph, w, pw, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch, t * h * w, -1)


def _unpatchify(x: Float[Array, "B S P"], grid: tuple[int, int, int], patch: tuple[int, int, int]):
    """Inverse of `_patchify` for a grid of (t, h, w) patches."""
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(x.shape[0], t * pt, h * ph, w * pw, -1)
