"""The DiT-Mem memory encoder: latents of reference videos in, memory rows out (DiT-Mem section 3.1).

Two branches of one structure, one with a high-pass and one with a low-pass filter, turn each video into rows of
the transformer's width; one self-attention then mixes the rows of all videos of a band.

The released scheme pools T' time steps of the convolutions to P tokens, usually P > T', so most tokens of a
video are equal by construction. Equal tokens stay equal through the self-attention, and attention over n equal
keys is attention over one key whose logit is raised by log n (see `attention`). So each distinct token is
computed once and carries that bias, here as in the transformer: exact, at 1 / 100 of the rows for one time step.

Nothing here depends on the order of the videos, except which row of the output belongs to which.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ditmem_jax.config import MemoryConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.attention.with_memory import attention
from ditmem_jax.models.filters import Band, Buffer, Grid, RadialFilter, ReleasedFilter
from ditmem_jax.models.layers import RMSNorm
from ditmem_jax.types import Memory, Reading

KNOTS = 11  # noise levels 0, 0.1 ... 1 at which a gate has values
ABSENT = -1e30  # inside the encoder; finite, so that a sample without any video gives no NaN


class Conv3d(nnx.Module):
    """A convolution over T, H and W, padded by half the kernel.

    The taps in time are stacked along the channels and handed to one 2D convolution with time folded into the
    batch, because XLA's 3D convolutions are 2 to 8 times slower than that on CPUs, and few channels waste a TPU.
    Frames that are no larger than the kernel are slow as images, too: there all taps are stacked.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (kernel, kernel, kernel, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: Float[Array, "N T H W C"]) -> Float[Array, "N t h w E"]:
        kernel = self.kernel[...].astype(self.dtype)
        size, half, outputs = kernel.shape[0], kernel.shape[0] // 2, kernel.shape[-1]
        small = x.shape[2] * x.shape[3] <= size**2
        x = _stack_taps(x.astype(self.dtype), 1, size, self.stride)
        if small:
            for axis in (2, 3):
                x = _stack_taps(x, axis, size, self.stride)
            y = x @ kernel.transpose(2, 1, 0, 3, 4).reshape(-1, outputs)
        else:
            y = jax.lax.conv_general_dilated(
                x.reshape(-1, *x.shape[2:]),
                kernel.transpose(1, 2, 0, 3, 4).reshape(size, size, -1, outputs),
                (self.stride, self.stride),
                [(half, half), (half, half)],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            y = y.reshape(*x.shape[:2], *y.shape[1:])
        return y.astype(jnp.float32) + self.bias[...][None, None, None, None]


def _stack_taps(x: Array, axis: int, size: int, stride: int) -> Array:
    """The inputs of each output of a convolution along `axis`, tap after tap along the channels."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (size // 2, size // 2)
    x = jnp.pad(x, pad)
    last = (x.shape[axis] - size) // stride * stride + 1
    taps = [jax.lax.slice_in_dim(x, tap, tap + last, stride, axis) for tap in range(size)]
    return jnp.concatenate(taps, axis=-1)


class BatchNorm(nnx.Module):
    """Batch norm over the videos that are present, with the conventions of the checkpoints.

    The biased variance normalises, the unbiased one enters the running variance. Under one jit over a sharded
    batch the statistics are those of the whole batch. Without any video the running statistics stay.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.mean = nnx.BatchStat(jnp.zeros((channels,)))
        self.var = nnx.BatchStat(jnp.ones((channels,)))
        self.momentum, self.eps = momentum, eps

    def __call__(
        self, x: Float[Array, "N T H W C"], present: Bool[Array, " N"], *, training: bool
    ) -> Float[Array, "N T H W C"]:
        mean, var = self.mean[...], self.var[...]
        if training:
            count = (present.sum() * math.prod(x.shape[1:4])).astype(jnp.float32)
            weight = present.astype(jnp.float32).reshape(-1, 1, 1, 1, 1) / jnp.maximum(count, 1)
            mean = (x * weight).sum((0, 1, 2, 3))
            var = (jnp.square(x - mean.reshape(1, 1, 1, 1, -1)) * weight).sum((0, 1, 2, 3))
            step = jnp.where(count > 0, self.momentum, 0.0)
            self.mean[...] += step * (mean - self.mean[...])
            self.var[...] += step * (var * count / jnp.maximum(count - 1, 1) - self.var[...])
        scale = self.scale[...] * jax.lax.rsqrt(var + self.eps)
        shift = self.bias[...] - mean * scale
        return x * scale.reshape(1, 1, 1, 1, -1) + shift.reshape(1, 1, 1, 1, -1)


class Stage(nnx.Module):
    """Convolution, frequency filter with dropout and residual, norm, max pool, ReLU.

    ReLU stands after the pool, where it is cheaper, and the result is the same as before it.
    """

    def __init__(
        self,
        config: MemoryConfig,
        index: int,
        band: Band,
        filter_grid: Grid,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        channels, kernel, stride, self.pool = config.stages[index]
        inputs = config.stages[index - 1][0] if index else config.in_dim
        self.conv = Conv3d(inputs, channels, kernel, stride, rngs=rngs, dtype=dtype)
        if config.filter == "released":
            self.filter = ReleasedFilter(band, channels, filter_grid, rngs=rngs)
        else:
            self.filter = RadialFilter(band)
        if config.norm == "batch":
            self.norm = BatchNorm(channels)
        else:
            groups = math.gcd(32, channels)
            self.norm = nnx.GroupNorm(channels, groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "N T H W C"],
        present: Bool[Array, " N"],
        *,
        training: bool,
        rngs: nnx.Rngs | None,
    ) -> Float[Array, "N t h w E"]:
        x = self.conv(x)
        x = x + self.dropout(self.filter(x), deterministic=not training, rngs=rngs)
        x = self.norm(x, present, training=training) if isinstance(self.norm, BatchNorm) else self.norm(x)
        return nnx.relu(_max_pool(x, self.pool))


def _max_pool(x: Float[Array, "N T H W C"], size: int) -> Float[Array, "N t h w C"]:
    """Largest value of each block of size^3 cells; cells that fill no block are left out.

    The largest is picked by its place. The gradient of a plain max compares values with the maximum, and XLA may
    compute those values once more in another fusion, rounded otherwise: then none is equal, and on CPUs a quarter
    of the gradient was seen to vanish.
    """
    if size == 1:
        return x
    frames, height, width = (n // size for n in x.shape[1:4])
    x = x[:, : frames * size, : height * size, : width * size]
    x = x.reshape(-1, frames, size, height, size, width, size, x.shape[-1]).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    blocks = x.reshape(-1, frames, height, width, size**3, x.shape[-1])
    place = jnp.argmax(jax.lax.stop_gradient(blocks), axis=4)
    return (blocks * jax.nn.one_hot(place, size**3, axis=4, dtype=x.dtype)).sum(4)


def adaptive_bins(length: int, bins: int) -> Float[np.ndarray, "bins length"]:
    """An adaptive average pool as a matrix: bin i runs from floor(i n / b) to ceil((i + 1) n / b)."""
    matrix = np.zeros((bins, length), np.float32)
    for i in range(bins):
        start, stop = i * length // bins, -(-(i + 1) * length // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def distinct_bins(length: int, bins: int) -> tuple[Float[np.ndarray, "rows length"], np.ndarray]:
    """The distinct rows of `adaptive_bins`, in order, and how often each stands there."""
    matrix = adaptive_bins(length, bins)
    first = np.concatenate([[True], (matrix[1:] != matrix[:-1]).any(axis=1)])  # equal bins are neighbours
    return matrix[first], np.bincount(np.cumsum(first) - 1)


def _adaptive_pool(x: Float[Array, "N T H W C"], grid: Grid) -> Float[Array, "N t h w C"]:
    for axis, (length, bins) in enumerate(zip(x.shape[1:4], grid, strict=True), start=1):
        if length != bins:
            x = jnp.moveaxis(jnp.tensordot(x, adaptive_bins(length, bins), (axis, 1)), -1, axis)
    return x


class Branch(nnx.Module):
    """Latents of single videos to the rows of one band."""

    def __init__(
        self, config: MemoryConfig, band: Band, filter_grids: list[Grid], *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.stages = nnx.List(
            Stage(config, index, band, grid, rngs=rngs, dtype=dtype)
            for index, grid in enumerate(filter_grids)
        )
        channels = config.stages[-1][0]
        if isinstance(config.tokens, int):
            _, height, width = config.feature_grid
            channels *= height * width
        else:
            cells = math.prod(config.tokens)
            self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (cells, config.dim)))
        self.projection = nnx.Linear(channels, config.dim, rngs=rngs, dtype=dtype)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "N T H W C"],
        present: Bool[Array, " N"],
        *,
        training: bool,
        rngs: nnx.Rngs | None,
    ) -> Float[Array, "N M D"]:
        for stage in self.stages:
            x = stage(x, present, training=training, rngs=rngs)
        tokens = self.config.tokens
        if isinstance(tokens, int):
            grid = self.config.feature_grid
            bins, _ = distinct_bins(grid[0], tokens)
            x = _adaptive_pool(x, grid)
            x = jnp.einsum("MT,NTHWC->NMCHW", bins, x)  # C, H, W is the order of the checkpoints
            return self.projection(x.reshape(*x.shape[:2], -1))
        cells = _adaptive_pool(x, tokens).reshape(x.shape[0], -1, x.shape[-1])
        rows = self.projection(cells)
        return rows + self.position[...][None].astype(rows.dtype)


class SelfAttention(nnx.Module):
    """Attention over rows with a bias, RMS norm over the full width of query and key, no residual."""

    q: nnx.Linear
    k: nnx.Linear
    v: nnx.Linear
    o: nnx.Linear

    def __init__(self, config: MemoryConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nnx.Linear(config.dim, config.dim, rngs=rngs, dtype=dtype))
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.num_heads, self.dtype = config.num_heads, dtype

    def __call__(self, x: Float[Array, "B M D"], bias: Float[Array, "B M"]) -> Float[Array, "B M D"]:
        query, key = (
            norm(project(x).astype(jnp.float32)).astype(self.dtype)
            for norm, project in ((self.norm_q, self.q), (self.norm_k, self.k))
        )
        query, key, value = (y.reshape(*x.shape[:2], self.num_heads, -1) for y in (query, key, self.v(x)))
        out = attention(query, key[:, :0], value[:, :0], key, value, bias)  # every key is a row with a bias
        return self.o(out.reshape(x.shape))


class Reader(nnx.Module):
    """How each block of the transformer reads the memory, see `types.Reading`.

    Additions of low rank begin at zero. The gate begins at zero as well, until `train.calibration` has measured where.
    """

    key_down: nnx.Param
    key_up: nnx.Param
    value_down: nnx.Param
    value_up: nnx.Param

    def __init__(self, config: MemoryConfig, *, rngs: nnx.Rngs):
        blocks, dim, rank = config.reading_blocks, config.dim, config.reading
        if config.gate != "none":
            gate = jnp.zeros((blocks, 2, KNOTS))
            if config.gate == "learned":
                self.gate = nnx.Param(gate)
            else:
                self.fixed_gate = Buffer(gate)
        for name in ("key", "value") if rank else ():
            down = jax.random.normal(rngs.params(), (blocks, dim, rank)) * dim**-0.5
            setattr(self, f"{name}_down", nnx.Param(down))
            setattr(self, f"{name}_up", nnx.Param(jnp.zeros((blocks, rank, dim))))
        self.config = config

    def __call__(self) -> Reading:
        gate = {"none": None, "learned": "gate", "fixed": "fixed_gate"}[self.config.gate]
        gate = gate and getattr(self, gate)[...]
        if not self.config.reading:
            return Reading(gate)
        return Reading(
            gate, (self.key_down[...], self.key_up[...]), (self.value_down[...], self.value_up[...])
        )


class MemoryEncoder(nnx.Module):
    """Reference videos to memory.

    Weights are float32; convolutions and matrix products run in `dtype`, transforms, norms and softmax in float32.

    Args:
        filter_grid: latent grid (T, H, W) that the stored weights of the released filter are for, if another than
            `config.latent_grid`. Its features are then pooled to the grid that the projection is built for.
    """

    def __init__(
        self,
        config: MemoryConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        filter_grid: Grid | None = None,
    ):
        if not isinstance(config.tokens, int) and any(np.greater(config.tokens, config.feature_grid)):
            raise UserError(
                "memory.tokens has more cells than the convolutions leave",
                expected=f"at most {config.feature_grid}",
                found=config.tokens,
                fix="fewer cells, or smaller strides and pools in memory.stages",
            )
        grids, _ = _grids(config, filter_grid or config.latent_grid)
        self.high = Branch(config, "high", grids, rngs=rngs, dtype=dtype)
        self.low = Branch(config, "low", grids, rngs=rngs, dtype=dtype)
        self.self_attention = SelfAttention(config, rngs=rngs, dtype=dtype)
        if config.strength is not None:
            self.log_strength = nnx.Param(jnp.full((2,), math.log(config.strength)))  # high, low
        if config.gate != "none" or config.reading:
            self.reader = Reader(config, rngs=rngs)
        self.config = config

    def __call__(
        self,
        latents: Float[Array, "B R T H W C"],
        present: Bool[Array, "B R"] | None = None,
        source: Int[Array, " B"] | None = None,
        *,
        training: bool,
        rngs: nnx.Rngs | None = None,
    ) -> Memory:
        """Memory rows: those of all videos for the high band, then those for the low band.

        Args:
            latents: normalised latents of R reference videos per sample.
            present: False marks a missing video: its rows get bias -inf, and what stands in `latents` is not read.
            source: not read; videos tell all.
            training: statistics of the batch instead of the running ones, and dropout (from `rngs.dropout`).
        Raises:
            UserError: for latents of another number of channels, or of a grid that is too small or that the
                stored filter does not fit.
        """
        batch, videos = latents.shape[:2]
        if present is None:
            present = jnp.ones((batch, videos), bool)
        rows = self.video_rows(
            latents.reshape(-1, *latents.shape[2:]), present.reshape(-1), training=training, rngs=rngs
        )
        return self.mix(rows.reshape(batch, videos, *rows.shape[1:]), present)

    def video_rows(
        self,
        latents: Float[Array, "N T H W C"],
        present: Bool[Array, " N"] | None = None,
        *,
        training: bool,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "N 2 M D"]:
        """The rows of single videos for the high and the low band, before the attention that mixes videos.

        But for the statistics of a batch in training they do not depend on the other videos, so they can be computed
        once for a bank. Arguments and errors as for the whole.
        """
        config = self.config
        if latents.shape[-1] != config.in_dim:
            raise UserError(
                "latents do not fit the memory encoder",
                expected=f"{config.in_dim} channels",
                found=latents.shape,
            )
        if not all(_grids(config, latents.shape[1:4])[1]):
            raise UserError(
                "the memory encoder pools the latents away",
                expected=f"a grid of about {config.latent_grid}",
                found=latents.shape[1:4],
                fix="longer or larger videos",
            )
        if training and config.dropout > 0 and rngs is None:
            raise UserError(
                "the memory encoder needs a generator for its dropout", fix="pass rngs, or memory.dropout = 0"
            )
        if present is None:
            present = jnp.ones(len(latents), bool)
        latents = jnp.where(present[:, None, None, None, None], latents, 0)
        bands = []
        for name, branch in (("high", self.high), ("low", self.low)):
            with jax.named_scope(name):
                bands.append(branch(latents, present, training=training, rngs=rngs))
        return jnp.stack(bands, axis=1)

    def mix(self, rows: Float[Array, "B R 2 M D"], present: Bool[Array, "B R"]) -> Memory:
        """Memory from the rows of R videos per sample: the self-attention of each band, and the bias of each row."""
        config, batch = self.config, len(rows)
        counts = row_counts(config)
        bias = jnp.where(present[:, :, None], jnp.log(counts)[None, None], -jnp.inf).reshape(batch, -1)
        with jax.named_scope("self_attention"):
            within = jnp.repeat(jnp.maximum(bias, ABSENT), 2, axis=0)
            bands = rows.transpose(0, 2, 1, 3, 4).reshape(2 * batch, -1, config.dim)
            tokens = self.self_attention(bands, within)
        bias = jnp.tile(bias, (1, 2))
        if config.strength is not None:
            bias = bias + jnp.repeat(self.log_strength[...], bias.shape[1] // 2)[None]
        reading = self.reader() if config.gate != "none" or config.reading else None
        return Memory(tokens.reshape(batch, -1, config.dim), bias, reading)


def row_counts(config: MemoryConfig) -> Float[np.ndarray, " rows"]:
    """How many equal tokens of the released scheme each row of a video and band stands for."""
    if isinstance(config.tokens, int):
        return distinct_bins(config.feature_grid[0], config.tokens)[1].astype(np.float32)
    return np.ones(math.prod(config.tokens), np.float32)


def _grids(config: MemoryConfig, grid: Grid) -> tuple[list[Grid], Grid]:
    """For latents of `grid`, the grid after each convolution, before its pool, and that after the last pool."""
    grids = []
    for _, kernel, stride, pool in config.stages:
        grids.append(tuple((n + 2 * (kernel // 2) - kernel) // stride + 1 for n in grid))
        grid = tuple(n // pool for n in grids[-1])
    return grids, grid


def shuffle_videos(
    latents: Float[Array, "B R T H W C"], present: Bool[Array, "B R"], key: PRNGKeyArray
) -> tuple[Float[Array, "B R T H W C"], Bool[Array, "B R"]]:
    """Permutes the videos of each sample at random, alike for both branches, which share the input."""
    batch, videos = present.shape
    order = jnp.broadcast_to(jnp.arange(videos), (batch, videos))
    order = jax.random.permutation(key, order, axis=1, independent=True)
    latents = jnp.take_along_axis(latents, order[:, :, None, None, None, None], axis=1)
    return latents, jnp.take_along_axis(present, order, axis=1)
