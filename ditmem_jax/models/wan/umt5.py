"""The UMT5 text encoder: token numbers to one embedding per token.

A T5 v1.1 encoder (Raffel et al. 2020; Shazeer 2020 for the gated feed-forward), with two peculiarities: scores
are not scaled, since the initialisation of the query projection takes care of it, and every block has a table
of relative positions of its own (UMT5, Chung et al. 2023). Tensors of `models_t5_umt5-xxl-enc-bf16.pth`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ditmem_jax.config import UMT5Config
from ditmem_jax.errors import UserError
from ditmem_jax.models.layers import RMSNorm

EPS = 1e-6


def _linear(inputs: int, outputs: int, std: float, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(
        inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs, dtype=dtype, param_dtype=dtype
    )


def _embed(rows: int, features: int, std: float, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Embed:
    init = nnx.initializers.normal(std)
    return nnx.Embed(rows, features, embedding_init=init, rngs=rngs, dtype=dtype, param_dtype=dtype)


class SelfAttention(nnx.Module):
    """Attention without scaling; `bias` is added to the scores, softmax in float32."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DTypeLike):
        dim, width = config.dim, config.dim_attn
        head = width // config.num_heads
        self.q = _linear(dim, width, (dim * head) ** -0.5, rngs, dtype)
        self.k = _linear(dim, width, dim**-0.5, rngs, dtype)
        self.v = _linear(dim, width, dim**-0.5, rngs, dtype)
        self.o = _linear(width, dim, width**-0.5, rngs, dtype)
        self.num_heads = config.num_heads

    def __call__(self, x: Float[Array, "B L D"], bias: Float[Array, "B N L L"]) -> Float[Array, "B L D"]:
        query, key, value = (f(x).reshape(*x.shape[:2], self.num_heads, -1) for f in (self.q, self.k, self.v))
        scores = jnp.einsum("BLNK,BJNK->BNLJ", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias, axis=-1).astype(x.dtype)
        return self.o(jnp.einsum("BNLJ,BJNK->BLNK", weights, value).reshape(*x.shape[:2], -1))


class GatedFeedForward(nnx.Module):
    """fc2(gelu(gate(x)) * fc1(x))."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DTypeLike):
        dim, hidden = config.dim, config.dim_ffn
        self.gate = _linear(dim, hidden, dim**-0.5, rngs, dtype)
        self.fc1 = _linear(dim, hidden, dim**-0.5, rngs, dtype)
        self.fc2 = _linear(hidden, dim, hidden**-0.5, rngs, dtype)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.fc2(nnx.gelu(self.gate(x), approximate=True) * self.fc1(x))


class Block(nnx.Module):
    """Self-attention and feed-forward, each behind a norm, around a residual stream."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.norm1 = RMSNorm(config.dim, EPS, dtype=dtype)
        self.attention = SelfAttention(config, rngs=rngs, dtype=dtype)
        self.norm2 = RMSNorm(config.dim, EPS, dtype=dtype)
        self.feed_forward = GatedFeedForward(config, rngs=rngs, dtype=dtype)
        std = (2 * config.num_buckets * config.num_heads) ** -0.5
        self.positions = _embed(config.num_buckets, config.num_heads, std, rngs, dtype)

    def __call__(
        self, x: Float[Array, "B L D"], buckets: Int[np.ndarray, "L L"], mask_bias: Float[Array, "B 1 1 L"]
    ) -> Float[Array, "B L D"]:
        position_bias = self.positions(jnp.asarray(buckets)).astype(jnp.float32).transpose(2, 0, 1)[None]
        with jax.named_scope("attention"):
            x = x + self.attention(self.norm1(x), position_bias + mask_bias)
        with jax.named_scope("feed_forward"):
            return x + self.feed_forward(self.norm2(x))


class UMT5(nnx.Module):
    """The encoder. Blocks are stacked along a leading axis and scanned.

    Args:
        dtype: of weights and matrix products. Norms and softmax are computed in float32.
    """

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        if config.dim_attn % config.num_heads:
            raise UserError(
                "text.dim_attn must divide into text.num_heads",
                expected=f"a multiple of {config.num_heads}",
                found=config.dim_attn,
            )
        self.config = config
        self.token_embedding = _embed(config.vocab, config.dim, 1.0, rngs, dtype)
        self.blocks = nnx.vmap(lambda rngs: Block(config, rngs=rngs, dtype=dtype), in_axes=0, out_axes=0)(
            rngs.split(config.num_layers)
        )
        self.norm = RMSNorm(config.dim, EPS, dtype=dtype)

    def __call__(self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embeddings of the tokens `ids`; rows where `mask` is False are zero and no other sees them."""
        buckets = position_buckets(ids.shape[1], self.config.num_buckets, self.config.max_dist)
        unseen = jnp.finfo(jnp.float32).min  # not -inf, which would give NaN for a prompt without tokens
        mask_bias = jnp.where(mask, 0.0, unseen)[:, None, None, :]
        graph, layers = nnx.split(self.blocks)

        def block(x, layer):
            return nnx.merge(graph, layer)(x, buckets, mask_bias), None

        x, _ = jax.lax.scan(block, self.token_embedding(ids), layers)
        return jnp.where(mask[..., None], self.norm(x), 0)


def position_buckets(length: int, num_buckets: int, max_dist: int) -> Int[np.ndarray, "L L"]:
    """Row of the position table for each (query, key): T5's bidirectional buckets.

    Half of the buckets are for keys after the query. Of each half, one half is for single distances, the rest
    for ranges that grow with the logarithm up to `max_dist`. Computed on the host in float32 as the released
    program does: where a distance lies on a boundary, another rounding would choose another bucket.
    """
    half = num_buckets // 2
    single = half // 2
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(relative)
    ranges = np.log(np.maximum(distance, 1).astype(np.float32) / single) / np.float32(
        np.log(max_dist / single)
    )
    far = np.minimum(single + (ranges * (half - single)).astype(np.int32), half - 1)
    return np.where(distance < single, distance, far).astype(np.int32) + half * (relative > 0)
