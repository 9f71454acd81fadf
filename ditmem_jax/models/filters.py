"""High- and low-pass filters of video features in Fourier space (DiT-Mem section 3.1)."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ditmem_jax.errors import UserError

Band = Literal["high", "low"]
Grid = tuple[int, int, int]


class Buffer(nnx.Variable):
    """State that is stored with the weights and neither trained nor updated."""


def radius(grid: Grid, *, released: bool) -> np.ndarray:
    """Distance from frequency zero, 0 to 1, of every bin of a Fourier transform over `grid`.

    The true distance covers all bins. The released one covers the half spectrum [T, H, W // 2 + 1] and counts
    bins along T and H as if the highest index were the highest frequency, which it is not; checkpoints hold it.
    """
    if released:
        axes = [np.linspace(0, 1, n) for n in (*grid[:2], grid[2] // 2 + 1)]
    else:
        axes = [2 * np.abs(np.fft.fftfreq(n)) for n in grid]
    return np.sqrt(sum(np.square(axis) for axis in np.meshgrid(*axes, indexing="ij")) / 3)


def gain(band: Band, distance: np.ndarray, channels: int) -> Float[Array, "channels *bins"]:
    """How much of each frequency the filter of `band` lets through, per channel: 0.2 to 1.2."""
    curve = 0.2 + 0.8 * np.sqrt(distance) if band == "high" else 1.2 - 0.8 * np.sqrt(distance)
    slope, offset = np.linspace(0.7, 1.3, channels), np.linspace(-0.05, 0.05, channels)
    per_channel = np.multiply.outer(slope, curve) + offset.reshape(-1, *[1] * curve.ndim)
    return jnp.asarray(np.clip(per_channel, 0.2, 1.2), jnp.float32)


class ReleasedFilter(nnx.Module):
    """The released filter: stored complex weights, drawn once, that fit one grid only."""

    def __init__(self, band: Band, channels: int, grid: Grid, *, rngs: nnx.Rngs):
        curve = gain(band, radius(grid, released=True), channels)
        noise = 0.05 * jax.random.normal(rngs.params(), (*curve.shape, 2))
        weight = jnp.stack([jnp.clip(curve + noise[..., 0], 0.05, 1.2), noise[..., 1]], axis=-1)
        self.complex_weight = Buffer(weight)  # [C, T, H, W // 2 + 1, (real, imaginary)]
        self.grid = grid

    def __call__(self, x: Float[Array, "N T H W C"]) -> Float[Array, "N T H W C"]:
        if x.shape[1:4] != self.grid:
            raise UserError(
                "latents do not fit the stored frequency filter",
                expected=f"a feature grid of {self.grid}",
                found=x.shape[1:4],
                fix="feed latents of the grid that the filter was made for, or use memory.filter = 'radial'",
            )
        real, imaginary = jnp.moveaxis(self.complex_weight[...], 0, 3)[None].transpose(5, 0, 1, 2, 3, 4)
        spectrum = jnp.fft.rfftn(x, axes=(1, 2, 3), norm="ortho") * jax.lax.complex(real, imaginary)
        # The product is no spectrum of real values. With the last axis apart, what is not real is dropped on
        # every device as the released code drops it; one transform over three axes may assume it is not there.
        spectrum = jnp.fft.ifftn(spectrum, axes=(1, 2), norm="ortho")
        return jnp.fft.irfft(spectrum, n=x.shape[3], axis=3, norm="ortho")


class RadialFilter(nnx.Module):
    """A filter of the true frequency radius, for any grid, without stored weights or noise.

    Its gain is real and the same for a frequency and its mirror along each axis, so the orthonormal real
    Fourier basis, cos + sin, diagonalises it: products with small matrices, quicker than complex transforms.
    """

    def __init__(self, band: Band):
        self.band = band

    def __call__(self, x: Float[Array, "N T H W C"]) -> Float[Array, "N T H W C"]:
        grid = x.shape[1:4]
        curve = jnp.moveaxis(gain(self.band, radius(grid, released=False), x.shape[-1]), 0, -1)
        return _real_fourier(_real_fourier(x) * curve[None])


def _real_fourier(x: Float[Array, "N T H W C"]) -> Float[Array, "N T H W C"]:
    """The real Fourier transform over T, H and W; it is its own inverse."""
    frames, height, width = (_cas(n) for n in x.shape[1:4])
    plane = np.kron(height, width)
    spectrum = jnp.einsum("UT,NTX->NUX", frames, x.reshape(*x.shape[:2], -1), precision="highest")
    spectrum = spectrum.reshape(*x.shape[:2], len(plane), -1)
    return jnp.einsum("QP,NTPC->NTQC", plane, spectrum, precision="highest").reshape(x.shape)


def _cas(n: int) -> Float[np.ndarray, "n n"]:
    angle = 2 * np.pi * np.outer(np.arange(n), np.arange(n)) / n
    return ((np.cos(angle) + np.sin(angle)) / np.sqrt(n)).astype(np.float32)
