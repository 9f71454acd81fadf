"""Every solver: exact for straight paths, its order, one program for all steps, and equality with diffusers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.diffusion import flow
from ditmem_jax.diffusion.solvers import SOLVERS
from ditmem_jax.errors import UserError
from tests.parity.golden import Check
from tests.parity.solvers import FEW, SHAPE, diffusers_path, inputs, path

ORDERS = {"euler": 1, "unipc": 3, "dpm++": 2}
"""A corrector adds one to its predictor's order."""
KINDS = pytest.mark.parametrize("kind", SOLVERS)


def solve(kind, velocity, noise, sigmas, drop_last=False):
    solver = SOLVERS[kind]
    carry = solver.init(noise)
    for row in solver.coefficients(sigmas)[: -1 if drop_last else None]:
        carry = solver.step(velocity, carry, row)
    return carry.latents


@KINDS
@pytest.mark.parametrize("sigmas", [flow.shifted_sigmas(7, 5.0), np.array(FEW), np.array([1.0])], ids=len)
def test_exact_for_straight_paths(kind, sigmas):
    clean, noise = (jax.random.normal(jax.random.key(i), SHAPE) for i in range(2))
    out = solve(kind, lambda x, sigma: noise - clean, noise, sigmas)
    np.testing.assert_allclose(out, clean, atol=2e-6)


def test_euler_by_hand():
    coefficients = SOLVERS["euler"].coefficients(np.array([1.0, 0.75, 0.25]))
    np.testing.assert_array_equal(coefficients, [[1, -0.25], [0.75, -0.5], [0.25, -0.25]])
    noise = jnp.full(SHAPE, 8.0)
    out = solve("euler", lambda x, sigma: x * sigma, noise, np.array([1.0, 0.5]))
    # 8 - 0.5 * (8 * 1) = 4, then 4 - 0.5 * (4 * 0.5) = 3
    np.testing.assert_array_equal(out, np.full(SHAPE, 3.0))


@KINDS
def test_order_of_convergence(kind):
    """On dx/dsigma = x from sigma 0.9 to 0.1, whose solution is exp(sigma)."""

    def error(steps):
        sigmas = np.linspace(0.9, 0.1, steps + 1)
        out = solve(kind, lambda x, sigma: x, jnp.full(SHAPE, jnp.exp(0.9)), sigmas, drop_last=True)
        return np.abs(out - np.exp(0.1)).max()

    assert np.log2(error(16) / error(32)) == pytest.approx(ORDERS[kind], abs=0.35)


@KINDS
def test_one_program_takes_every_step_of_every_schedule(kind):
    traces = []

    @jax.jit
    def step(carry, row):
        traces.append(1)
        return SOLVERS[kind].step(lambda x, sigma: jnp.tanh(x) * sigma, carry, row)

    noise = jax.random.normal(jax.random.key(0), SHAPE)
    for steps, shift in ((4, 1.0), (9, 5.0)):
        carry = SOLVERS[kind].init(noise)
        structure = jax.tree.structure(carry)
        for row in SOLVERS[kind].coefficients(flow.shifted_sigmas(steps, shift)):
            carry = step(carry, row)
            assert jax.tree.structure(carry) == structure
        assert np.all(np.isfinite(carry.latents))
    assert len(traces) == 1


@KINDS
@pytest.mark.parametrize("sigmas", [[], [0.5, 0.5], [0.2, 0.5], [1.1, 0.5], [0.5, 0.0], [np.nan]])
def test_impossible_levels(kind, sigmas):
    with pytest.raises(UserError, match="impossible noise levels"):
        SOLVERS[kind].coefficients(np.array(sigmas))


@KINDS
@pytest.mark.parametrize(
    ("steps", "shift", "sigmas"),
    [
        *((steps, shift, None) for steps, shift in itertools.product((1, 2, 4, 20, 40), (1.0, 3.0, 5.0))),
        (20, 5.0, flow.shifted_sigmas(20, 5.0)),
        (len(FEW), 1.0, FEW),
    ],
    ids=str,
)
def test_equal_to_diffusers(kind, steps, shift, sigmas):
    for package in ("torch", "diffusers"):
        pytest.importorskip(package)
    levels, want = diffusers_path(kind, steps, shift, sigmas)
    check = Check(kind, path(kind, levels if sigmas is None else np.array(sigmas), *inputs()), want)
    assert check.ok, check.error
