"""The Wan video transformer, with memory rows in every self-attention (Wan 2.1 and 2.2; DiT-Mem section 3.2).

One class for every kind. Text-to-video is the plain one. Image-to-video takes a condition beside the noisy latents
and, in Wan 2.1, CLIP image tokens beside the text. Where clean frames are given among noisy ones (TI2V-5B), they take
the places of the noisy ones, whatever stands there, and each frame has a timestep of its own: 0 for a given one. A
memory has no frame, and its rows are modulated like the noisy ones.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from ditmem_jax.config import DiTConfig
from ditmem_jax.config.networks import TRAIN_STEPS
from ditmem_jax.errors import UserError
from ditmem_jax.models.attention.with_memory import KEPT, attention
from ditmem_jax.models.layers import (
    FeedForward,
    LayerNorm,
    Linear,
    RMSNorm,
    layer_norm,
    rotary_table,
    rotate,
    sinusoidal_embedding,
)
from ditmem_jax.models.placement import gathered
from ditmem_jax.models.quantised import Int8Linear
from ditmem_jax.parallel.mesh import constrain
from ditmem_jax.types import Backend, Compute, Conditioning, LowRank, Memory, Reading, Remat

LinearKind = type[Linear] | type[Int8Linear]
INPUT = "input of a block"
QUERIES = 256  # tokens that tell how much of their attention a memory takes
_policies = jax.checkpoint_policies
_ATTENTION_KEPT = _policies.save_only_these_names(KEPT)
_PRODUCTS_KEPT = _policies.save_from_both_policies(_policies.dots_saveable, _ATTENTION_KEPT)
REMAT: dict[Remat, Callable[[Callable], Callable]] = {
    "none": lambda block: block,
    "products": partial(jax.checkpoint, policy=_PRODUCTS_KEPT),
    "attention": partial(jax.checkpoint, policy=_ATTENTION_KEPT),
    "blocks": jax.checkpoint,
    "offload": partial(
        jax.checkpoint,
        policy=_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}


class Projections(nnx.Module):
    """Query, key, value and output projections, or some of them; RMS norm over the full width of query and key."""

    q: Linear | Int8Linear
    k: Linear | Int8Linear
    v: Linear | Int8Linear
    o: Linear | Int8Linear
    norm_q: RMSNorm
    norm_k: RMSNorm

    def __init__(
        self, config: DiTConfig, names: str = "qkvo", *, linear: LinearKind, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        for name in names:
            setattr(self, name, linear(config.dim, config.dim, rngs=rngs, dtype=dtype, param_dtype=dtype))
            if name in "qk":
                setattr(self, f"norm_{name}", RMSNorm(config.dim, config.eps, dtype=dtype))
        self.num_heads = config.num_heads

    def heads(self, x: Float[Array, "B S D"]) -> Float[Array, "B S N K"]:
        return x.reshape(*x.shape[:2], self.num_heads, -1)

    def query(self, x: Float[Array, "B S D"]) -> Float[Array, "B S N K"]:
        return self.heads(self.norm_q(self.q(x)))

    def key_value(
        self, x: Float[Array, "B S D"], reading: Reading | None = None
    ) -> tuple[Float[Array, "B S N K"], Float[Array, "B S N K"]]:
        """Keys and values; those of memory tokens may have additions of low rank, whose factors are of this block."""
        key, value = self.k(x), self.v(x)
        if reading is not None and reading.key is not None:
            key, value = key + _low_rank(x, reading.key, key), value + _low_rank(x, reading.value, value)
        return self.heads(self.norm_k(key)), self.heads(value)

    def out(self, x: Float[Array, "B S N K"]) -> Float[Array, "B S D"]:
        return self.o(x.reshape(*x.shape[:2], -1))


class ImageEmbedding(nnx.Module):
    """CLIP image tokens to the width of the transformer."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        width, eps = config.image_dim, 1e-5  # not the transformer's own eps
        count = config.image_positions
        self.positions = None if count is None else nnx.Param(jnp.zeros((count, width), dtype))
        self.norm_in = LayerNorm(width, eps, dtype=dtype)
        self.feed_forward = FeedForward(width, width, config.dim, exact=True, rngs=rngs, dtype=dtype)
        self.norm_out = LayerNorm(config.dim, eps, dtype=dtype)

    def __call__(self, image: Float[Array, "B I P"]) -> Float[Array, "B I D"]:
        if self.positions is not None:
            image = image + self.positions[...][None]
        return self.norm_out(self.feed_forward(self.norm_in(image)))


class Block(nnx.Module):
    """Self-attention over video and memory, cross-attention to text and image, feed-forward; modulated by time."""

    def __init__(
        self,
        config: DiTConfig,
        *,
        linear: LinearKind = Linear,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        options = dict(linear=linear, rngs=rngs, dtype=dtype)
        self.self_attention = Projections(config, **options)
        self.cross_attention = Projections(config, **options)
        self.image_attention = None if config.image_dim is None else Projections(config, "kv", **options)
        self.cross_norm = LayerNorm(config.dim, config.eps, dtype=dtype)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, config.dim, **options)
        self.modulation = nnx.Param(
            jax.random.normal(rngs.params(), (6, config.dim), dtype) * config.dim**-0.5
        )
        self.eps = config.eps

    def __call__(
        self,
        x: Float32[Array, "B S D"],
        context: Float[Array, "B L D"],
        image: Float[Array, "B I D"] | None,
        time: Float[Array, "B G 6 D"],
        rotary: Float[Array, "2 S half"],
        memory: Memory | None,
        memory_time: Float[Array, "B 1 6 D"],
        backend: Backend = "xla",
    ) -> Float32[Array, "B S D"]:
        own = self.modulation[...].astype(jnp.float32)[None, None]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = _parts(time + own)

        with jax.named_scope("self_attention"):
            rows = _modulate(layer_norm(x, self.eps), shift, scale)
            query = rotate(self.self_attention.query(rows), rotary)
            key, value = self.self_attention.key_value(rows)
            key = rotate(key, rotary)
            memory_rows = ()
            if memory is not None:
                tokens = layer_norm(memory.tokens.astype(x.dtype), self.eps)
                tokens = _modulate(tokens, *_parts(memory_time + own)[:2])
                memory_rows = *self.self_attention.key_value(tokens, memory.reading), memory.bias
            attended = attention(query, key, value, *memory_rows, backend=backend, ring=True)
            x = x + _gated(self.self_attention.out(attended), gate)
        with jax.named_scope("cross_attention"):
            query = self.cross_attention.query(self.cross_norm(x))
            attended = attention(query, *self.cross_attention.key_value(context), backend=backend)
            if image is not None:  # a softmax of its own, as released
                attended += attention(query, *self.image_attention.key_value(image), backend=backend)
            x = x + self.cross_attention.out(attended).astype(x.dtype)
        with jax.named_scope("feed_forward"):
            rows = _modulate(layer_norm(x, self.eps), ffn_shift, ffn_scale)
            return x + _gated(self.feed_forward(rows), ffn_gate)

    def memory_odds(
        self,
        x: Float32[Array, "B S D"],
        time: Float[Array, "B G 6 D"],
        rotary: Float[Array, "2 S half"],
        memory: Memory,
        memory_time: Float[Array, "B 1 6 D"],
    ) -> Float[Array, "2"]:
        """Odds of attention to the memory's high and low band against that to the video, see `DiT.memory_share`."""
        own, attend = self.modulation[...].astype(jnp.float32)[None, None], self.self_attention
        tokens = _modulate(layer_norm(x, self.eps), *_parts(time + own)[:2])
        every = max(1, x.shape[1] // QUERIES)
        query = rotate(attend.query(tokens), rotary)[:, ::every]
        key = rotate(attend.key_value(tokens)[0], rotary)
        tokens = _modulate(
            layer_norm(memory.tokens.astype(x.dtype), self.eps), *_parts(memory_time + own)[:2]
        )

        def scores(key):
            product = jnp.einsum("BSNK,BJNK->BNSJ", query, key, preferred_element_type=jnp.float32)
            return product * query.shape[-1] ** -0.5

        video = jax.nn.logsumexp(scores(key), axis=-1)
        there = scores(attend.key_value(tokens)[0]) + memory.bias[:, None, None]
        bands = jax.nn.logsumexp(there.reshape(*there.shape[:3], 2, -1), axis=-1)
        share = jnp.exp(bands - jnp.logaddexp(video, jax.nn.logsumexp(bands, axis=-1))[..., None])
        share = share.mean(axis=(0, 1, 2))
        return share / (1 - share.sum())


class DiT(nnx.Module):
    """The transformer: noisy latents, timestep and text (and a memory, and an image) in, velocity out.

    Blocks are stacked along a leading axis and scanned, so that compile time does not grow with depth.

    Args:
        int8: hold the matrices of the blocks, nearly all of the weights, in 8 bits (`quantised.Int8Linear`).
        compute: kernels and rematerialisation, which are no part of the function computed.
        dtype: of weights and matrix products. Norms, angles, timesteps, modulation and the sum of blocks stay float32.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        int8: bool = False,
        compute: Compute = Compute(),
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, rngs=rngs, dtype=dtype, param_dtype=dtype)

        def linear_in_full(inputs: int, outputs: int) -> nnx.Linear:
            """Products in float32 whatever the dtype of the weights, as in Wan's own code for timesteps."""
            full = dict(dtype=jnp.float32, precision="highest")
            return nnx.Linear(inputs, outputs, rngs=rngs, param_dtype=dtype, **full)

        patch = int(np.prod(config.patch_size))
        self.config = config
        self.patch_embedding = linear(config.in_dim * patch, config.dim)
        self.text_embedding = FeedForward(config.text_dim, config.dim, config.dim, rngs=rngs, dtype=dtype)
        self.time_embedding = nnx.List(
            [linear_in_full(config.freq_dim, config.dim), linear_in_full(config.dim, config.dim)]
        )
        self.time_projection = linear_in_full(config.dim, 6 * config.dim)
        self.image_embedding = (
            None if config.image_dim is None else ImageEmbedding(config, rngs=rngs, dtype=dtype)
        )
        kind = Int8Linear if int8 else Linear
        self.blocks = nnx.vmap(lambda rngs: Block(config, linear=kind, rngs=rngs, dtype=dtype))(
            rngs.split(config.num_layers)
        )
        self.head = linear(config.dim, config.out_dim * patch)
        self.head_modulation = nnx.Param(
            jax.random.normal(rngs.params(), (2, config.dim), dtype) * config.dim**-0.5
        )
        self.int8, self.compute, self.dtype = int8, compute, dtype

    def __call__(
        self,
        latents: Float[Array, "B T H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B G"],
        conditioning: Conditioning,
        memory: Memory | None = None,
    ) -> Float[Array, "B T H W C"]:
        """Return the velocity of `latents` at `timestep` (1000 sigma).

        Args:
            timestep: one per sample, or G of them for G equal runs of tokens in the order of (t, h, w): one per
                latent frame, or even one per token. Memory tokens take the highest.
            conditioning: text, and for kinds with a condition `frames` of `config.condition_dim` channels: in Wan a mask
                of 4 channels, 1 where a frame is given, then the latents of the given frames; and, where
                `config.image_dim` says so, CLIP tokens of the given frame. Kinds with `config.clean_frames` may have
                clean frames, which are then at timestep 0.
        Raises:
            UserError: if something is missing, not wanted, or of another size than the configuration says.
        """
        config, compute = self.config, self.compute
        x, context, image, time, modulation, memory_modulation, rotary = self._inputs(
            latents, timestep, conditioning, memory
        )
        if memory is not None:
            memory = memory._replace(tokens=constrain(memory.tokens, "batch", None, None))

        graph, layers = nnx.split(self.blocks)
        others = context, image, modulation, rotary

        def block(x, inputs, memory):
            layer, bias, reading = inputs
            x = checkpoint_name(x, INPUT)
            if self.int8:  # while they are in 8 bits: XLA would send them as what they become
                layer = gathered(layer)
            if memory is not None:
                memory = Memory(memory.tokens, memory.bias if bias is None else bias, reading)
            x = nnx.merge(graph, layer)(x, *others, memory, memory_modulation, compute.backend)
            return constrain(x, "batch", "tokens", None), None

        for start, stop, read in self._spans(memory):
            bias, reading = _per_block(read, timestep.reshape(len(timestep), -1).max(axis=1) / TRAIN_STEPS)
            body = partial(block, memory=read)
            part = layers
            if (
                stop - start < config.num_layers
            ):  # one block after the other, since a slice would be a copy of weights
                part, body = jnp.arange(start, stop), _with_layers(body, layers)
            unroll = stop - start if compute.unroll else 1
            x, _ = jax.lax.scan(REMAT[compute.remat](body), x, (part, bias, reading), unroll=unroll)

        shift, scale = _parts(self.head_modulation[...].astype(jnp.float32)[None, None] + time[:, :, None])
        x = _modulate(layer_norm(x, config.eps), shift, scale)
        return _unpatchify(self.head(x), self._grid(latents), config.patch_size).astype(jnp.float32)

    def _grid(self, latents: Float[Array, "B T H W C"]) -> tuple[int, int, int]:
        return tuple(
            size // patch for size, patch in zip(latents.shape[1:4], self.config.patch_size, strict=True)
        )

    def _inputs(
        self, latents: Array, timestep: Array, conditioning: Conditioning, memory: Memory | None
    ) -> tuple:
        """The inputs of the blocks: tokens, text, image, timesteps, their modulation and that of memory tokens, angles."""
        config = self.config
        text, frames, image = conditioning.text, conditioning.frames, conditioning.image
        _check_inputs(config, latents, memory, conditioning)
        latents = conditioning.fill(latents)
        if timestep.ndim == 1:
            timestep = conditioning.timesteps(timestep)
        rotary = rotary_table(self._grid(latents), config.head_dim)

        if frames is not None:
            latents = jnp.concatenate([latents, frames.astype(latents.dtype)], axis=-1)
        x = self.patch_embedding(_patchify(latents.astype(self.dtype), config.patch_size))
        # The sum that blocks add to stays float32, as in Wan's own code: in bfloat16 three roundings a block pile up.
        x = constrain(x.astype(jnp.float32), "batch", "tokens", None)
        context = constrain(self.text_embedding(text.astype(self.dtype)), "batch", None, None)
        image = None if image is None else self.image_embedding(image.astype(self.dtype))
        timestep = timestep.reshape(len(timestep), -1)
        time, modulation, memory_modulation = self._embed_time(timestep, tokens=x.shape[1])

        modulation, memory_modulation = (
            constrain(x, "batch", None, None, None) for x in (modulation, memory_modulation)
        )
        return x, context, image, time, modulation, memory_modulation, rotary

    def _spans(self, memory: Memory | None) -> list[tuple[int, int, Memory | None]]:
        """Runs of blocks, from the first one on up to that before `stop`, and the memory that they read."""
        layers, reading = self.config.num_layers, self.compute.memory_blocks
        if memory is None or reading is None:
            return [(0, layers, memory)]
        first, last = reading
        spans = [(0, first, None), (first, last + 1, memory), (last + 1, layers, None)]
        return [span for span in spans if span[0] < span[1]]

    def memory_share(
        self,
        latents: Float[Array, "B T H W C"],
        timestep: Float[Array, " B"],
        conditioning: Conditioning,
        memory: Memory,
    ) -> Float[Array, "A 2"]:
        """Return the odds of attention to each band of a memory, against the video's tokens, in the blocks that read it.

        They are those of a memory that is weighed but not read: what the blocks before have made of it is left out.
        Means of up to QUERIES tokens of all samples and heads; arguments as for the whole.
        """
        first, last = self.compute.memory_blocks or (0, self.config.num_layers - 1)
        x, context, image, _, modulation, memory_modulation, rotary = self._inputs(
            latents, timestep, conditioning, memory
        )
        graph, layers = nnx.split(self.blocks)

        def block(x, layer):
            layer = nnx.merge(graph, layer)
            odds = layer.memory_odds(x, modulation, rotary, memory, memory_modulation)
            return layer(
                x, context, image, modulation, rotary, None, memory_modulation, self.compute.backend
            ), odds

        return jax.lax.scan(block, x, layers)[1][first : last + 1]

    def _embed_time(
        self, timestep: Float[Array, "B G"], tokens: int
    ) -> tuple[Float[Array, "B G D"], Float[Array, "B G 6 D"], Float[Array, "B 1 6 D"]]:
        """Embedding of the timesteps, what the blocks make of it, and that of the highest, for memory rows."""
        batch, runs = timestep.shape
        if tokens % runs:
            raise UserError(
                "the timesteps do not fit the latents",
                expected=f"one per sample, or a number for each that divides its {tokens} tokens",
                found=timestep.shape,
            )
        first, second = self.time_embedding
        wave = sinusoidal_embedding(timestep.reshape(-1), self.config.freq_dim)
        time = second(nnx.silu(first(wave)))
        modulation = self.time_projection(nnx.silu(time)).reshape(batch, runs, 6, -1)
        highest = modulation
        if runs > 1:
            index = jnp.argmax(timestep, axis=1)[:, None, None, None]
            highest = jnp.take_along_axis(modulation, index, axis=1)
        return time.reshape(batch, runs, -1), modulation, highest


def _check_inputs(
    config: DiTConfig, latents: Array, memory: Memory | None, conditioning: Conditioning
) -> None:
    """Check that the inputs are those of the configuration, as wide as it says, and no others."""
    _check_width("latents", latents, config.out_dim)
    _check_width("given frames", conditioning.frames, config.condition_dim)
    image = conditioning.image
    _check_width("image tokens", image, config.image_dim or 0)
    if config.image_positions is not None and image.shape[1] != config.image_positions:
        raise UserError(
            "wrong input of the transformer: image tokens",
            expected=f"{config.image_positions}, of a first and a last frame",
            found=image.shape,
        )
    if conditioning.clean is not None:
        _check_width("clean frames", conditioning.clean, config.out_dim if config.clean_frames else 0)
    if memory is not None:
        _check_width("memory rows", memory.tokens, config.dim)


def _check_width(what: str, x: Array | None, width: int) -> None:
    if (0 if x is None else x.shape[-1]) != width:
        raise UserError(
            f"wrong input of the transformer: {what}",
            expected=f"width {width}" if width else "nothing",
            found="nothing" if x is None else x.shape,
        )


def _per_block(
    memory: Memory | None, sigma: Float[Array, " B"]
) -> tuple[Float[Array, "A B M"] | None, Reading | None]:
    """The bias of memory tokens at noise level `sigma`, and the additions of low rank, of each block that reads them."""
    if memory is None or memory.reading is None:
        return None, None
    reading, bias = memory.reading, None
    if reading.gate is not None:
        knots = reading.gate.shape[-1]
        place = sigma.astype(jnp.float32)[:, None] * (knots - 1)
        near = jnp.maximum(
            1 - jnp.abs(place - jnp.arange(knots, dtype=jnp.float32)[None]), 0
        )  # linear between knots
        gate = jnp.einsum("AZK,BK->ABZ", reading.gate, near, precision="highest")
        bias = memory.bias[None] + jnp.repeat(gate, memory.bias.shape[1] // 2, axis=2)
    return bias, reading._replace(gate=None)


def _with_layers(block: Callable, layers: nnx.State) -> Callable:
    """A block that takes its number in place of its weights."""

    def numbered(x, inputs):
        number, *others = inputs
        layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, keepdims=False), layers)
        return block(x, (layer, *others))

    return numbered


def _low_rank(
    x: Float[Array, "B S D"], factors: LowRank, like: Float[Array, "B S D"]
) -> Float[Array, "B S D"]:
    down, up = factors
    return (x.astype(jnp.float32) @ down @ up).astype(like.dtype)


def _parts(modulation: Float[Array, "B G N D"]) -> list[Float[Array, "B G D"]]:
    """Shift, scale and gate, as many as there are along the third axis."""
    return [modulation[:, :, i] for i in range(modulation.shape[2])]


def _modulate(x: Float[Array, "B S D"], shift: Float[Array, "B G D"], scale: Float[Array, "B G D"]):
    """Scaled and shifted, each of the G runs of rows by its own."""
    runs = _runs(x, shift.shape[1])
    return (runs * (1 + scale[:, :, None]) + shift[:, :, None]).reshape(x.shape).astype(x.dtype)


def _gated(x: Float[Array, "B S D"], gate: Float[Array, "B G D"]) -> Float32[Array, "B S D"]:
    return (_runs(x, gate.shape[1]) * gate[:, :, None]).reshape(x.shape)


def _runs(x: Float[Array, "B S D"], count: int) -> Float[Array, "B G R D"]:
    """The rows in `count` equal runs, float32."""
    return x.astype(jnp.float32).reshape(x.shape[0], count, -1, x.shape[-1])


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
