"""Velocities taken again: when, for which samples, and how far from all steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.diffusion.solvers import SOLVERS
from ditmem_jax.diffusion.step_cache import Kept, recall

SHAPE = (2, 1, 1, 1, 2)


def walk(velocity, sigmas, tolerance, shape=SHAPE, **options):
    """Velocities at falling levels, and what is kept at the end."""
    kept, found = Kept.none(shape), []
    for sigma in sigmas:
        value, kept = recall(velocity, kept, jnp.zeros(shape), jnp.float32(sigma), tolerance, **options)
        found.append(np.asarray(value))
    return found, kept


def test_a_step_is_left_out_while_the_expected_change_is_small():
    """v = 2 - sigma: after levels 1 and 0.9 the change is 1 / 1.1 of its length a noise level, 0.15 at a distance of 0.165."""
    found, kept = walk(lambda x, sigma: jnp.full(SHAPE, 2 - sigma), [1.0, 0.9, 0.8, 0.75, 0.7, 0.6], 0.15)
    np.testing.assert_allclose([x.flat[0] for x in found], [1, 1.1, 1.1, 1.1, 1.3, 1.3], rtol=1e-6)
    np.testing.assert_array_equal(kept.computed, [3, 3])
    np.testing.assert_allclose(kept.sigma, [0.7, 0.7])
    np.testing.assert_allclose(kept.change, [0.2 / 1.3 / 0.2] * 2, rtol=1e-5)


def test_each_sample_decides_for_itself():
    """The first sample's velocity does not change; the second's does, and is computed at every step."""
    rates = jnp.float32([0.0, 5.0]).reshape(2, 1, 1, 1, 1)
    velocity = lambda x, sigma: jnp.ones(SHAPE) + rates * (1 - sigma)  # noqa: E731
    found, kept = walk(velocity, [1.0, 0.9, 0.8, 0.7], 0.1)
    np.testing.assert_array_equal(kept.computed, [2, 4])
    alone, _ = walk(lambda x, sigma: velocity(x, sigma)[1:], [1.0, 0.9, 0.8, 0.7], 0.1, (1, *SHAPE[1:]))
    np.testing.assert_array_equal([x[1:] for x in found], alone)


def test_what_is_not_usable_is_computed():
    _, kept = walk(lambda x, sigma: jnp.ones(SHAPE), [1.0, 0.9, 0.8], 0.5, usable=jnp.array([True, False]))
    np.testing.assert_array_equal(kept.computed, [2, 3])


def test_a_velocity_of_zero_is_computed_again():
    _, kept = walk(lambda x, sigma: jnp.zeros(SHAPE), [1.0, 0.9, 0.8], 0.5)
    np.testing.assert_array_equal(kept.computed, [3, 3])


@pytest.mark.parametrize("name", SOLVERS)
def test_a_smaller_tolerance_is_nearer_to_all_steps(name):
    """On dx/dsigma = x, whose velocity changes by its own length over a noise level."""
    solver, errors, counts = SOLVERS[name], [], []
    for tolerance in (0.3, 0.1, 0.0):
        carry, kept = solver.init(jnp.ones(SHAPE)), Kept.none(SHAPE)
        for row in solver.coefficients(np.linspace(1, 0.05, 20)):
            value, kept = recall(lambda x, sigma: x, kept, carry.latents, jnp.float32(row[0]), tolerance)
            carry = solver.step(lambda x, sigma, value=value: value, carry, jnp.asarray(row))
        errors.append(float(abs(carry.latents[0] - np.exp(-1)).max()))
        counts.append(int(kept.computed[0]))
    assert counts[0] < counts[1] < counts[2] == 20
    assert errors[0] > errors[1] and errors[1] < 0.05
