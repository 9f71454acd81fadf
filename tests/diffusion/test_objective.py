"""Densities over noise levels, the released weight, the running mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.config import ExpertsConfig, ObjectiveConfig
from ditmem_jax.diffusion import objective
from ditmem_jax.diffusion.flow import shifted_sigmas, training_weights
from ditmem_jax.diffusion.objective import Baseline, draw_sigma, released_weight
from ditmem_jax.errors import UserError

KEY = jax.random.key(0)


def test_shifted_density_draws_the_published_steps():
    sigma = np.asarray(draw_sigma(ObjectiveConfig(), KEY, 4000)[0])
    assert np.isin(sigma, shifted_sigmas(1000, 5.0).astype(np.float32)).all()
    assert abs(sigma.mean() - shifted_sigmas(1000, 5.0).mean()) < 0.01


def test_uniform_density_keeps_its_range():
    sigma, _ = draw_sigma(ObjectiveConfig(density="uniform", sigma_range=(0.2, 0.6)), KEY, 4000)
    assert 0.2 <= sigma.min() and sigma.max() <= 0.6
    np.testing.assert_allclose(sigma.mean(), 0.4, atol=0.01)


def test_spectrum_density_follows_its_histogram():
    sigma, _ = draw_sigma(ObjectiveConfig(density="spectrum", spectrum=(0.0, 3.0, 1.0, 0.0)), KEY, 8000)
    counts, _ = np.histogram(sigma, bins=4, range=(0, 1))
    np.testing.assert_allclose(counts / 8000, [0, 0.75, 0.25, 0], atol=0.02)


DENSITIES = [
    (ObjectiveConfig(shift=5.0), 7 / 12),  # s below which 5 s / (1 + 4 s) stays below 0.875
    (ObjectiveConfig(density="uniform", sigma_range=(0.5, 1.0)), 0.75),
    (ObjectiveConfig(density="spectrum", spectrum=(0.0, 3.0, 1.0, 0.0)), 1.0),
    (ObjectiveConfig(density="spectrum", spectrum=(1.0, 0.0, 0.0, 1.0)), 0.75),
]


@pytest.mark.parametrize(("config", "below"), DENSITIES)
def test_levels_of_the_expert_that_trains(config, below):
    np.testing.assert_allclose(objective.share_below(config, ExpertsConfig(0.875)), below, atol=1e-3)
    everything = np.asarray(draw_sigma(config, KEY, 4000)[0])
    for trains in ("high", "low"):
        mine = (everything >= 0.875) if trains == "high" else (everything < 0.875)
        if mine.any():
            sigma, high = draw_sigma(config, KEY, 4000, ExpertsConfig(0.875, trains))
            assert high == (trains == "high")
            assert sigma.min() >= 0.875 - 1e-6 if high else sigma.max() <= 0.875 + 1e-6
            np.testing.assert_allclose(sigma.mean(), everything[mine].mean(), atol=0.02)


def test_an_encoder_of_both_experts_trains_on_each_by_its_share():
    config, experts = DENSITIES[1][0], ExpertsConfig(0.875, "both")
    keys = jax.random.split(KEY, 2000)
    sigma, high = map(np.asarray, jax.vmap(lambda key: draw_sigma(config, key, 4, experts))(keys))
    assert sigma[high].min() >= 0.875 - 1e-6 and sigma[~high].max() <= 0.875 + 1e-6
    np.testing.assert_allclose(high.mean(), 0.25, atol=0.03)
    np.testing.assert_allclose(np.histogram(sigma, 4, (0.5, 1))[0] / sigma.size, [0.25] * 4, atol=0.03)


@pytest.mark.parametrize("boundary", [0.502, 0.506, 0.511, 0.544, 0.632, 0.669, 0.757, 0.875])
def test_levels_at_the_boundary_have_the_expert_that_was_drawn(boundary):
    """One ulp below or above: their float32 timesteps may round to the other side."""
    at = float(np.float32(boundary))
    near = float(np.nextafter(np.float32(boundary), np.float32(0)))
    config, experts = ObjectiveConfig(density="uniform", sigma_range=(near, at)), ExpertsConfig(boundary)
    below = objective.share_below(config, ExpertsConfig(boundary))
    keys = jax.random.split(KEY, 200)
    _, high = jax.vmap(lambda key: draw_sigma(config, key, 4, experts))(keys)
    np.testing.assert_allclose(high.mean(), 1 - below, atol=0.12)
    for trains in ("high", "low"):
        assert draw_sigma(config, KEY, 4, ExpertsConfig(boundary, trains))[1] == (trains == "high")
    assert experts.is_high(boundary) and not experts.is_high(boundary - 1e-6)


def test_released_weight_is_the_published_one():
    sigmas = jnp.asarray(shifted_sigmas(1000, 5.0), jnp.float32)
    np.testing.assert_allclose(released_weight(sigmas, 5.0), training_weights(5.0), rtol=1e-4, atol=1e-5)


def test_running_mean_takes_over_from_the_samples_own_error():
    sigma, error = jnp.tile(jnp.array([0.31, 0.31, 0.92]), 1000), jnp.tile(jnp.array([2.0, 4.0, 7.0]), 1000)
    baseline = Baseline.empty()
    np.testing.assert_allclose(baseline.expected(sigma, error), error)
    baseline = baseline.observe(sigma, error, error < 5)  # the third has memory
    np.testing.assert_allclose(baseline.expected(sigma, error)[:3], [3, 3, 7], rtol=2e-3)
    assert baseline.count.sum() == 2000


@pytest.mark.parametrize(("kind", "value"), [("relative", 0.75), ("running", 0.75)])
def test_loss_divides_by_the_reference_and_holds_it(kind, value):
    sigma, error, reference = jnp.array([0.5, 0.5]), jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0])
    config = ObjectiveConfig(kind=kind)
    np.testing.assert_allclose(objective.loss(config, sigma, error, reference), value)
    held = jax.grad(lambda reference: objective.loss(config, sigma, error, reference))(reference)
    np.testing.assert_array_equal(held, 0)


def test_running_needs_samples_without_memory():
    with pytest.raises(UserError, match="memory_dropout"):
        ObjectiveConfig(kind="running", memory_dropout=0.0)
