"""The causal video VAE of Wan 2.1 and 2.2: pixels [B, T, H, W, 3] in [-1, 1] to latents [B, T', H', W', Z] and back.

Time runs in chunks. The first frame is a chunk of its own and becomes the first latent frame; after it, every
`temporal_stride` frames become one more. Each causal convolution keeps the last input frames that its next
chunk needs, so that a video of any length takes two programs: the first chunk and every later one. A cache is
the pytree of those frames, `None` before the first chunk. A chunk may hold any number of latent frames, the
first one too: the results are the same, only memory and speed differ.

Wan 2.2 folds 2 x 2 pixels into channels before anything else, has a wider decoder, and adds to the output of each
level its input, shrunk by averaging or grown by repetition.

Source: Wan 2.1, section "Spatio-temporal variational autoencoder"; tensors of `Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ditmem_jax.config import VAEConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.attention.with_memory import attention

Pixels = Float[Array, "B T H W 3"]
Latents = Float[Array, "B t h w Z"]
Cache = Any  # a pytree of [B, frames, H, W, C] arrays, or None before the first chunk
Chunk = Callable[[Cache, Array], tuple[Cache, Array]]


class CausalConv(nnx.Module):
    """Convolution over time, height and width that sees no later frame. `kernel` is [T, H, W, I, O].

    The time taps are stacked along the channels and handed to one 2D convolution with time folded into the
    batch: XLA's 3D convolutions are 3 to 8 times slower than that on CPUs.
    """

    def __init__(self, inputs: int, outputs: int, size=(3, 3, 3), time_stride: int = 1, *, rngs, dtype):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (*size, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.time_stride, self.dtype = time_stride, dtype

    def blank(self, x: Array) -> Array:
        """The cache of a video that has not begun: black frames."""
        return jnp.zeros((x.shape[0], self.kernel.shape[0] - self.time_stride, *x.shape[2:]), self.dtype)

    def __call__(self, x: Array, cache: Array | None) -> tuple[Array, Array]:
        x = jnp.concatenate([self.blank(x) if cache is None else cache, x.astype(self.dtype)], axis=1)
        frames = x.shape[1]
        taps, height, width, _, outputs = self.kernel.shape
        starts = frames - taps + 1
        views = [x[:, tap : tap + starts : self.time_stride] for tap in range(taps)]
        stacked = jnp.concatenate(views, axis=-1)
        kernel = jnp.moveaxis(self.kernel[...], 0, 2).reshape(height, width, -1, outputs).astype(self.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        y = stacked.reshape(-1, *stacked.shape[2:])
        y = jax.lax.conv_general_dilated(y, kernel, (1, 1), "SAME", dimension_numbers=layout)
        y = y + self.bias[...].astype(self.dtype).reshape(1, 1, 1, -1)
        return y.reshape(*stacked.shape[:-1], outputs), x[:, frames - (taps - self.time_stride) :]


class RMSNorm(nnx.Module):
    """Divides by the root mean square over channels, in float32."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones(dim))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.maximum(jnp.mean(y * y, axis=-1, keepdims=True), 1e-24))
        return (y * self.scale[...].reshape(1, 1, 1, 1, -1)).astype(x.dtype)


class Residual(nnx.Module):
    """Twice norm, SiLU, convolution, next to a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, rngs, dtype):
        kwargs = dict(rngs=rngs, dtype=dtype)
        self.norm1, self.norm2 = RMSNorm(inputs), RMSNorm(outputs)
        self.conv1 = CausalConv(inputs, outputs, **kwargs)
        self.conv2 = CausalConv(outputs, outputs, **kwargs)
        self.shortcut = None if inputs == outputs else nnx.Conv(inputs, outputs, (1, 1, 1), **kwargs)

    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        cache1, cache2 = cache or (None, None)
        y, cache1 = self.conv1(nnx.silu(self.norm1(x)), cache1)
        y, cache2 = self.conv2(nnx.silu(self.norm2(y)), cache2)
        return y + (x if self.shortcut is None else self.shortcut(x)), (cache1, cache2)


class FrameAttention(nnx.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, dim: int, *, rngs, dtype):
        self.norm = RMSNorm(dim)
        self.qkv = nnx.Conv(dim, 3 * dim, (1, 1), rngs=rngs, dtype=dtype)
        self.out = nnx.Conv(dim, dim, (1, 1), kernel_init=nnx.initializers.zeros, rngs=rngs, dtype=dtype)

    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        batch, frames, height, width, dim = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch * frames, height * width, 1, 3 * dim)
        y = attention(*jnp.split(qkv, 3, axis=-1))
        return x + self.out(y.reshape(x.shape)), ()


def _spare_first(x: Array, cache: Cache) -> tuple[Array, Array]:
    """The first frame, if the video begins here, and the others."""
    spared = 1 if cache is None else 0
    return x[:, :spared], x[:, spared:]


class Downsample(nnx.Module):
    """Halves height and width, then (`in_time`) the number of frames, sparing the first."""

    def __init__(self, dim: int, in_time: bool, *, rngs, dtype):
        kwargs = dict(rngs=rngs, dtype=dtype)
        self.conv = nnx.Conv(dim, dim, (3, 3), strides=2, padding=((0, 1), (0, 1)), **kwargs)
        self.time_conv = CausalConv(dim, dim, (3, 1, 1), time_stride=2, **kwargs) if in_time else None

    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        x = self.conv(x)
        if self.time_conv is None:
            return x, ()
        first, rest = _spare_first(x, cache)
        rest, cache = self.time_conv(rest, first if cache is None else cache)
        return jnp.concatenate([first, rest], axis=1), cache


class Upsample(nnx.Module):
    """Doubles (`in_time`) the frames, sparing the first, then height and width."""

    def __init__(self, dim: int, outputs: int, in_time: bool, *, rngs, dtype):
        self.time_conv = CausalConv(dim, 2 * dim, (3, 1, 1), rngs=rngs, dtype=dtype) if in_time else None
        self.conv = nnx.Conv(dim, outputs, (3, 3), rngs=rngs, dtype=dtype)

    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        if self.time_conv is None:
            cache = ()
        else:
            first, rest = _spare_first(x, cache)
            batch, frames, height, width, dim = rest.shape
            rest, cache = self.time_conv(rest, cache)  # never sees the first frame, as released
            rest = jnp.moveaxis(rest.reshape(batch, frames, height, width, 2, dim), 4, 2)
            x = jnp.concatenate([first, rest.reshape(batch, 2 * frames, height, width, dim)], axis=1)
        return self.conv(x.repeat(2, axis=2).repeat(2, axis=3)), cache


class Head(nnx.Module):
    """Norm, SiLU and the last convolution."""

    def __init__(self, inputs: int, outputs: int, *, rngs, dtype):
        self.norm = RMSNorm(inputs)
        self.conv = CausalConv(inputs, outputs, rngs=rngs, dtype=dtype)

    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        return self.conv(nnx.silu(self.norm(x)), cache)


class Chain(nnx.Module):
    """Layers in a row; its cache is the tuple of theirs."""

    def __init__(self, layers: list[nnx.Module]):
        self.layers = nnx.List(layers)

    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        caches = []
        for layer, cached in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            with jax.named_scope(type(layer).__name__):
                x, cached = layer(x, cached)
            caches.append(cached)
        return x, tuple(caches)


@dataclasses.dataclass(frozen=True)
class Average:
    """Shrinks without parameters: cells of `time` x `space` x `space` become channels, averaged to `outputs`."""

    outputs: int
    time: int
    space: int

    def __call__(self, x: Array, begins: bool) -> Array:
        if begins:  # what stands before the first frame is black
            x = jnp.pad(x, ((0, 0), (self.time - 1, 0), (0, 0), (0, 0), (0, 0)))
        batch, frames, height, width, dim = x.shape
        t, h, w = frames // self.time, height // self.space, width // self.space
        x = x.reshape(batch, t, self.time, h, self.space, w, self.space, dim)
        x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # channels, then the place in the cell
        return x.reshape(batch, t, h, w, self.outputs, -1).mean(-1)


@dataclasses.dataclass(frozen=True)
class Duplicate:
    """Grows without parameters: repeated channels are spread over cells of `time` x `space` x `space`."""

    outputs: int
    time: int
    space: int

    def __call__(self, x: Array, begins: bool) -> Array:
        cell = (self.outputs, self.time, self.space, self.space)
        batch, t, h, w, dim = x.shape
        x = x.repeat(math.prod(cell) // dim, axis=-1).reshape(batch, t, h, w, *cell)
        x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.reshape(batch, t * self.time, h * self.space, w * self.space, self.outputs)
        return x[:, self.time - 1 :] if begins else x  # the first frame is spared


class Level(Chain):
    """Layers in a row and, around them, a shortcut without parameters."""

    def __init__(self, layers: list[nnx.Module], shortcut: Average | Duplicate | None):
        super().__init__(layers)
        self.shortcut = shortcut

    def __call__(self, x: Array, cache: Cache) -> tuple[Array, Cache]:
        y, after = super().__call__(x, cache)
        return y if self.shortcut is None else y + self.shortcut(x, begins=cache is None), after


def _middle(dim: int, **kwargs) -> list[nnx.Module]:
    return [Residual(dim, dim, **kwargs), FrameAttention(dim, **kwargs), Residual(dim, dim, **kwargs)]


def _encoder(config: VAEConfig, **kwargs) -> Chain:
    dim = config.dim
    layers = [CausalConv(3 * config.patch_size**2, dim, **kwargs)]
    for level, multiple in enumerate(config.dim_mult):
        inner, outputs = [], multiple * config.dim
        for _ in range(config.num_res_blocks):
            inner.append(Residual(dim, outputs, **kwargs))
            dim = outputs
        last = level == len(config.temporal_downsample)
        in_time = not last and config.temporal_downsample[level]
        if not last:
            inner.append(Downsample(dim, in_time, **kwargs))
        shortcut = Average(dim, time=1 + in_time, space=1 if last else 2)
        layers += [Level(inner, shortcut)] if config.shortcuts else inner
    return Chain([*layers, *_middle(dim, **kwargs), Head(dim, 2 * config.z_dim, **kwargs)])


def _decoder(config: VAEConfig, **kwargs) -> Chain:
    width = config.decoder_dim or config.dim
    dim = config.dim_mult[-1] * width
    layers = [CausalConv(config.z_dim, dim, **kwargs), *_middle(dim, **kwargs)]
    for level, multiple in enumerate(reversed(config.dim_mult)):
        inner, shortcut = [], None
        for _ in range(config.num_res_blocks + 1):
            inner.append(Residual(dim, multiple * width, **kwargs))
            dim = multiple * width
        if level < len(config.temporal_downsample):
            in_time = config.temporal_downsample[-1 - level]
            shortcut = Duplicate(dim, time=1 + in_time, space=2)
            outputs = dim if config.shortcuts else dim // 2
            inner.append(Upsample(dim, outputs, in_time, **kwargs))
            dim = outputs
        layers += [Level(inner, shortcut)] if config.shortcuts else inner
    return Chain([*layers, Head(dim, 3 * config.patch_size**2, **kwargs)])


def _fold(x: Pixels, size: int) -> Array:
    """Squares of `size` x `size` pixels as channels, in the order (colour, column, row)."""
    batch, frames, height, width, colours = x.shape
    x = x.reshape(batch, frames, height // size, size, width // size, size, colours)
    return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(batch, frames, height // size, width // size, -1)


def _unfold(x: Array, size: int) -> Pixels:
    """Inverse of `_fold`."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height, width, channels // size**2, size, size)
    return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(batch, frames, height * size, width * size, -1)


class VAE(nnx.Module):
    """Encoder and decoder, one chunk at a time.

    Latents are normalised to mean 0 and deviation 1 by the statistics in `config`; `normalise` and
    `unnormalise` lead to and from the network's own scale. Computes in `dtype`, answers in float32.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        kwargs = dict(rngs=rngs, dtype=dtype)
        self.config = config
        self.encoder = _encoder(config, **kwargs)
        self.quant = nnx.Conv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), **kwargs)
        self.post_quant = nnx.Conv(config.z_dim, config.z_dim, (1, 1, 1), **kwargs)
        self.decoder = _decoder(config, **kwargs)

    def posterior_chunk(self, cache: Cache, frames: Pixels) -> tuple[Cache, Float[Array, "B t h w Z2"]]:
        """The next frames -> mean and log variance of their latents, 2Z channels on the network's own scale.

        A video begins (`cache` None) with 1 + n * temporal_stride frames and goes on with n * temporal_stride.
        """
        moments, cache = self.encoder(_fold(frames, self.config.patch_size), cache)
        return cache, self.quant(moments).astype(jnp.float32)

    def encode_chunk(self, cache: Cache, frames: Pixels) -> tuple[Cache, Latents]:
        """The next frames, as many as `posterior_chunk` takes -> normalised latents."""
        cache, moments = self.posterior_chunk(cache, frames)
        return cache, self.normalise(moments[..., : self.config.z_dim])

    def decode_chunk(self, cache: Cache, latents: Latents) -> tuple[Cache, Pixels]:
        """The next normalised latents, any number -> pixels, not clamped."""
        frames, cache = self.decoder(self.post_quant(self.unnormalise(latents)), cache)
        return cache, _unfold(frames, self.config.patch_size).astype(jnp.float32)

    def normalise(self, latents: Latents) -> Latents:
        return (latents - self._channels(self.config.mean)) / self._channels(self.config.std)

    def unnormalise(self, latents: Latents) -> Latents:
        return latents * self._channels(self.config.std) + self._channels(self.config.mean)

    def _channels(self, values: tuple[float, ...]) -> Array:
        return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 1, -1)


def encode(vae: VAE, video: Pixels) -> Latents:
    """Videos in [-1, 1] -> normalised latents, by a loop on the host: compiled once for all lengths.

    Raises:
        UserError: if frames are not 1 + n * `temporal_stride` or a side is no multiple of `spatial_stride`.
    """
    vae.config.latent_grid(*video.shape[1:4])
    return _host_loop(encode_program, vae, video, vae.config.temporal_stride)


def decode(vae: VAE, latents: Latents) -> Pixels:
    """Normalised latents -> videos, not clamped, by a loop on the host: compiled once for all lengths."""
    _check_latents(vae, latents)
    return _host_loop(decode_program, vae, latents, 1)


def encode_scan(vae: VAE, video: Pixels, per_chunk: int = 0) -> Latents:
    """`encode` as one traceable, differentiable program.

    Args:
        per_chunk: latent frames per step of the scan over what follows the first frame; fewer need less
            memory. 0 takes the whole video in one step without a scan, whose backward pass is some 30 times
            slower on CPUs.
    """
    vae.config.latent_grid(*video.shape[1:4])
    return _scan(vae.encode_chunk, video, per_chunk * vae.config.temporal_stride)


def decode_scan(vae: VAE, latents: Latents, per_chunk: int = 0) -> Pixels:
    """`decode` as one traceable, differentiable program; `per_chunk` as in `encode_scan`.

    Latents on the network's own scale, as a posterior gives them, go through `vae.normalise` first.
    """
    _check_latents(vae, latents)
    return _scan(vae.decode_chunk, latents, per_chunk)


def posterior(vae: VAE, video: Pixels, per_chunk: int = 0) -> tuple[Latents, Latents]:
    """Mean and log variance of the latents of `video` on the network's own scale, to train the VAE by.

    Traceable and differentiable; `per_chunk` as in `encode_scan`.
    """
    vae.config.latent_grid(*video.shape[1:4])
    moments = _scan(vae.posterior_chunk, video, per_chunk * vae.config.temporal_stride)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, log_variance


def _check_latents(vae: VAE, latents: Array) -> None:
    if latents.ndim != 5 or latents.shape[-1] != vae.config.z_dim or latents.shape[1] == 0:
        raise UserError(
            "these are no latents of this VAE",
            expected=f"[batch, time, height, width, {vae.config.z_dim}] with at least one frame",
            found=list(latents.shape),
            fix="the VAE that made them, or encode the videos again",
        )


def _scan(step: Chunk, x: Array, size: int) -> Array:
    """`step` over frame 0 of `x` and then over `size` frames at a time; 0 for all in one step."""
    if size == 0 or x.shape[1] == 1:
        return step(None, x)[1]
    cache, first = step(None, x[:, :1])
    x = x[:, 1:]
    batch, frames, *rest = x.shape
    if frames % size:
        expected = f"1 + a multiple of {size} frames"
        raise UserError("the chunks do not divide the video", expected=expected, found=1 + frames)
    chunks = jnp.moveaxis(x.reshape(batch, frames // size, size, *rest), 1, 0)
    _, later = jax.lax.scan(step, cache, chunks)
    later = jnp.moveaxis(later, 0, 1)
    return jnp.concatenate([first, later.reshape(batch, -1, *later.shape[3:])], axis=1)


def _host_loop(step: Callable, vae: VAE, x: Array, size: int) -> Array:
    """`step`, a compiled chunk, over frame 0 of `x` and then over `size` frames at a time."""
    graphdef, state = nnx.split(vae)
    cache, first = step(graphdef, state, None, x[:, :1])
    outputs = [first]
    for start in range(1, x.shape[1], size):
        cache, output = step(graphdef, state, cache, x[:, start : start + size])
        outputs.append(output)
    return jnp.concatenate(outputs, axis=1)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def encode_program(graphdef, state, cache: Cache, frames: Array) -> tuple[Cache, Array]:
    """`VAE.encode_chunk`, compiled; the cache is used up."""
    return nnx.merge(graphdef, state).encode_chunk(cache, frames)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_program(graphdef, state, cache: Cache, latents: Array) -> tuple[Cache, Array]:
    """`VAE.decode_chunk`, compiled; the cache is used up."""
    return nnx.merge(graphdef, state).decode_chunk(cache, latents)
