"""CLIP's image encoder as Wan 2.1 reads it: pictures to tokens of the last block but one.

A vision transformer whose tokens are normed before the first block (Radford et al. 2021), of the size ViT-H/14 that
OpenCLIP trained beside XLM-RoBERTa. Wan takes the tokens before the last block, so neither that block nor what follows
it is kept. Tensors of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ditmem_jax.config import CLIPConfig
from ditmem_jax.models.attention.with_memory import attention
from ditmem_jax.models.layers import FeedForward, LayerNorm

# Of the pictures that CLIP was trained on, from 0 to 1.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class SelfAttention(nnx.Module):
    """Attention of all tokens to all."""

    q: nnx.Linear
    k: nnx.Linear
    v: nnx.Linear
    o: nnx.Linear

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        for name in "qkvo":
            layer = nnx.Linear(config.dim, config.dim, rngs=rngs, dtype=dtype, param_dtype=dtype)
            setattr(self, name, layer)
        self.num_heads = config.num_heads

    def __call__(self, x: Float[Array, "B I P"]) -> Float[Array, "B I P"]:
        shape = (*x.shape[:2], self.num_heads, -1)
        query, key, value = (part(x).reshape(shape) for part in (self.q, self.k, self.v))
        return self.o(attention(query, key, value).reshape(x.shape))


class Block(nnx.Module):
    """Self-attention and feed-forward, each behind a norm, around a residual stream."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        dim, options = config.dim, dict(rngs=rngs, dtype=dtype)
        self.norm1, self.norm2 = (LayerNorm(dim, config.eps, dtype=dtype) for _ in range(2))
        self.attention = SelfAttention(config, **options)
        self.feed_forward = FeedForward(dim, config.ffn_dim, dim, exact=True, **options)

    def __call__(self, x: Float[Array, "B I P"]) -> Float[Array, "B I P"]:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class CLIPVision(nnx.Module):
    """The image encoder. Blocks are stacked along a leading axis and scanned.

    Args:
        dtype: of weights and matrix products. Norms and softmax are computed in float32.
    """

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        options = dict(rngs=rngs, dtype=dtype, param_dtype=dtype)
        init = nnx.initializers.normal(config.dim**-0.5)
        self.config, self.dtype = config, dtype
        self.patch_embedding = nnx.Linear(3 * config.patch_size**2, config.dim, use_bias=False, **options)
        self.class_token = nnx.Param(init(rngs.params(), (config.dim,), dtype))
        self.positions = nnx.Param(init(rngs.params(), (config.tokens, config.dim), dtype))
        self.norm = LayerNorm(config.dim, config.eps, dtype=dtype)
        self.blocks = nnx.vmap(lambda rngs: Block(config, rngs=rngs, dtype=dtype))(
            rngs.split(config.num_layers)
        )

    def __call__(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B I P"]:
        """Return the tokens of pictures in [-1, 1], `config.image_size` pixels on each side."""
        mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (MEAN, STD))
        batch, patch = len(pixels), self.config.patch_size
        cells = self.config.image_size // patch
        x = ((pixels + 1) / 2 - mean) / std
        x = x.reshape(batch, cells, patch, cells, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_embedding(x.reshape(batch, cells**2, -1).astype(self.dtype))
        first = jnp.broadcast_to(self.class_token[...][None, None], (batch, 1, self.config.dim))
        x = self.norm(jnp.concatenate([first, x], axis=1) + self.positions[...][None])
        graph, layers = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, layer: (nnx.merge(graph, layer)(x), None), x, layers)[0]


@nnx.jit
def image_tokens(clip: CLIPVision, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B I P"]:
    """`clip(pixels)`, compiled."""
    return clip(pixels)
