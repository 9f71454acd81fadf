"""The filters of the memory encoder, by hand, against the released weights and against NumPy's Fourier transform."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.models import filters
from tests.parity.golden import GoldenFile

TESTS = Path(__file__).parents[1]


def test_radius_by_hand():
    t, w = np.array([0, 1])[:, None], np.array([0, 0.5, 1, 0.5])
    np.testing.assert_allclose(filters.radius((2, 1, 4), released=False)[:, 0], np.sqrt((t**2 + w**2) / 3))
    # The released one takes the last of three bins, a low frequency, for the highest.
    np.testing.assert_allclose(filters.radius((3, 1, 1), released=True).ravel() * np.sqrt(3), [0, 0.5, 1])
    np.testing.assert_allclose(
        filters.radius((3, 1, 1), released=False).ravel() * np.sqrt(3), [0, 2 / 3, 2 / 3]
    )


@pytest.mark.parametrize(
    ("band", "lowest", "highest"),
    [("high", [0.2, 0.2, 0.31], [0.65, 1.0, 1.2]), ("low", [0.79, 1.2, 1.2], [0.23, 0.4, 0.57])],
)
def test_gain_by_hand(band, lowest, highest):
    np.testing.assert_allclose(filters.gain(band, np.array([0.0, 1.0]), 3).T, [lowest, highest], rtol=1e-6)


@pytest.mark.parametrize("band", ["high", "low"])
def test_released_filters_are_the_curve_with_noise(band):
    golden = GoldenFile.read(TESTS / "golden" / "encoder_one_step.safetensors")
    name = f"w/{band}_pass_module.conv_block1.fft_filter.complex_weight"
    stored, grid = golden.tensors[name], (6, 7, 11)
    ours = filters.ReleasedFilter(band, 8, grid, rngs=nnx.Rngs(0)).complex_weight[...]
    curve = filters.gain(band, filters.radius(grid, released=True), 8)
    for weight in (stored, ours):
        assert weight.shape == (*curve.shape, 2)
        difference = np.stack([weight[..., 0] - curve, weight[..., 1]])
        assert np.abs(difference.mean((1, 2, 3, 4))).max() < 5e-3 and 0.04 < difference.std() < 0.055


@pytest.mark.parametrize("grid", [(5, 4, 3), (1, 2, 1)])
def test_radial_filter_is_a_fourier_filter(grid):
    x = np.random.default_rng(0).standard_normal((2, *grid, 3), np.float32)
    curve = np.moveaxis(np.asarray(filters.gain("high", filters.radius(grid, released=False), 3)), 0, -1)
    want = np.fft.ifftn(np.fft.fftn(x, axes=(1, 2, 3)) * curve, axes=(1, 2, 3))
    np.testing.assert_allclose(filters.RadialFilter("high")(jnp.asarray(x)), want.real, atol=1e-5)
