"""Flow matching against hand-written arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.config import ExpertsConfig, SampleConfig
from ditmem_jax.diffusion import flow
from ditmem_jax.errors import UserError


def test_shifted_sigmas():
    np.testing.assert_array_equal(flow.shifted_sigmas(1, 5.0), [1])
    np.testing.assert_allclose(flow.shifted_sigmas(4, 1.0), [1, 0.75, 0.5, 0.25])
    # 5 s / (1 + 4 s) for s = 1, 3/4, 1/2, 1/4
    np.testing.assert_allclose(flow.shifted_sigmas(4, 5.0), [1, 3.75 / 4, 2.5 / 3, 1.25 / 2])


@pytest.mark.parametrize(("steps", "shift"), [(0, 5.0), (4, 0.0), (4, -1.0)])
def test_impossible_schedules(steps, shift):
    with pytest.raises(UserError, match="impossible schedule"):
        flow.shifted_sigmas(steps, shift)


def test_explicit_levels_replace_steps_and_shift():
    np.testing.assert_array_equal(flow.sampling_sigmas(SampleConfig(steps=2, shift=1.0)), [1, 0.5])
    np.testing.assert_array_equal(flow.sampling_sigmas(SampleConfig(sigmas=(1.0, 0.9))), [1, 0.9])


@pytest.mark.parametrize("boundary", [0.502, 0.506, 0.511, 0.544, 0.632, 0.669, 0.757, 0.875])
def test_rounding_does_not_move_a_level_from_its_expert(boundary):
    sigmas = np.array([boundary + 1e-6, boundary, np.nextafter(boundary, 0), boundary - 1e-6])
    np.testing.assert_array_equal(ExpertsConfig(boundary).is_high(sigmas), [True, True, True, False])


def test_noise_and_target():
    clean, noise = jnp.array([[4.0, 8.0], [4.0, 8.0]]), jnp.array([[0.0, 2.0], [0.0, 2.0]])
    noisy = flow.add_noise(clean, noise, jnp.array([0.25, 1.0]))
    np.testing.assert_array_equal(noisy, [[3.0, 6.5], [0.0, 2.0]])
    np.testing.assert_array_equal(flow.target(clean, noise), [[-4.0, -6.0], [-4.0, -6.0]])


def test_the_target_is_the_slope_of_the_path():
    clean, noise = jnp.array([[1.0]]), jnp.array([[5.0]])
    ahead, here = (flow.add_noise(clean, noise, jnp.array([s])) for s in (0.75, 0.25))
    np.testing.assert_allclose((ahead - here) / 0.5, flow.target(clean, noise))


def test_training_weights():
    weights = flow.training_weights()
    timesteps = 1000 * flow.shifted_sigmas(1000, 5.0)
    assert weights.shape == (1000,)
    assert weights.mean() == pytest.approx(1)
    assert weights.min() == 0
    assert timesteps[weights.argmax()] == pytest.approx(500, abs=2)
    # exp(-2 (t / 1000 - 1/2)^2) less its least value, which is that of t = 1000; the last t is 1000 * 0.005 / 1.004
    least, last = np.exp(-0.5), np.exp(-2 * (0.005 / 1.004 - 0.5) ** 2)
    assert weights[-1] / weights.max() == pytest.approx((last - least) / (1 - least), rel=1e-4)
