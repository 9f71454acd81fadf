"""Solvers of the sampling ODE: Euler, UniPC and DPM-Solver++ 2M behind one protocol.

A sample x = (1 - sigma) x0 + sigma eps follows dx/dsigma = v(x, sigma) from noise to sigma = 0. With the predicted
data m = x - sigma v and lambda = log((1 - sigma) / sigma), the exact solution from level s to level t is

    x_t = q x_s + sigma_t ∫ exp(lambda) m dlambda,    q = sigma_t / sigma_s,

the integral from lambda_s to lambda_t. A constant m gives x_t = q x_s + (1 - q) m_s, which is Euler's step. Both
multistep solvers take m as linear in lambda: with h = lambda_t - lambda_s and D = (h / h_before) (m_s - m_before),

    predictor: x_t = q x_s + (1 - q) (m_s + D / 2)
    corrector: x_t = q x_s + (1 - q) (m_s + rho D + rho_t (m_t - m_s)),

DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) being the predictor alone, and UniPC of order 2 with
B(h) = 1 - exp(-h) ("bh2", arXiv 2302.04867) both. UniPC corrects x_t once m_t is known, which needs no further
velocity and makes it of order 3. rho and rho_t solve the order conditions of its section 3 for h and h_before:

    rho_t + rho = b_1,    rho_t - (h_before / h) rho = b_2,
    b_1 = 1 / (1 - exp(-h)) - 1 / h,    b_2 = 1 / (1 - exp(-h)) - 2 b_1 / h.

Steps of order 1 have D = 0 and rho_t = 1 / 2: the first, which has nothing before it, and the last, where lambda is
infinite. Hence every step is the same few multiply-adds with coefficients of its own, which are computed on the host
in float64, and one compiled program takes every step of a schedule of any length.
"""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ditmem_jax.diffusion.guidance import Latents, Velocity
from ditmem_jax.errors import UserError

LARGEST_SIGMA = 1 - 1e-6
"""Stands for sigma = 1, whose lambda is infinite, in the differences of lambda, as in diffusers."""


class Carry(NamedTuple):
    """The state of a solver between steps: the latents, and whatever it remembers of earlier steps."""

    latents: Latents
    history: tuple[Latents, ...] = ()


class Solver(Protocol):
    """A way from noise to clean latents, one velocity a step."""

    def coefficients(self, sigmas: Float[np.ndarray, " steps"]) -> Float[np.ndarray, "steps k"]:
        """The coefficients of each step of a schedule, float32, its sigma first; the schedule ends at sigma = 0.

        Args:
            sigmas: noise levels at which the velocity is taken, strictly falling, in (0, 1].
        Raises:
            UserError: for other levels.
        """

    def init(self, noise: Latents) -> Carry:
        """The carry before the first step."""

    def step(self, velocity: Velocity, carry: Carry, row: Float[Array, " k"]) -> Carry:
        """One step with its row of the coefficients."""


class Euler:
    """The straight step along the velocity, of order 1."""

    def coefficients(self, sigmas):
        """Columns: sigma, and its change."""
        return np.stack([sigmas, np.diff(_to_zero(sigmas))], axis=1).astype(np.float32)

    def init(self, noise):
        return Carry(noise)

    def step(self, velocity, carry, row):
        sigma, change = row
        return Carry(carry.latents + change * velocity(carry.latents, sigma))


class DPMSolverPP2M:
    """DPM-Solver++ of order 2, multistep, for deterministic sampling."""

    def coefficients(self, sigmas):
        """Columns: sigma; the weights of the latents, of their data and of the data before."""
        q, _, slope = _differences(sigmas)
        return _table(sigmas, *_weights(q, slope / 2))

    def init(self, noise):
        return Carry(noise, (jnp.zeros_like(noise),))

    def step(self, velocity, carry, row):
        sigma, *weights = row
        x, (before,) = carry
        data = x - sigma * velocity(x, sigma)
        return Carry(_sum(weights, x, data, before), (data,))


class UniPC:
    """UniPC of order 2 with B(h) = 1 - exp(-h): predictor and corrector.

    The history is what of the corrected latents is known before their data is, and the data of the step before.
    """

    def coefficients(self, sigmas):
        """Columns: sigma; the weight of its data in the corrector; three weights each as in `DPMSolverPP2M`,
        for the predictor and for what is known of the next corrector."""
        q, h, slope = _differences(sigmas)
        b_1 = 1 / -np.expm1(-h) - 1 / h
        b_2 = 1 / -np.expm1(-h) - 2 * b_1 / h
        rho = (b_1 - b_2) * slope / (1 + slope)
        rho_t = np.where(slope > 0, b_1 - rho, 0.5)
        x, data, before = _weights(q, rho * slope)
        known = x, data - (1 - q) * rho_t, before
        correction = np.append(0, (1 - q) * rho_t)[:-1]
        return _table(sigmas, correction, *_weights(q, slope / 2), *known)

    def init(self, noise):
        return Carry(noise, (noise, jnp.zeros_like(noise)))

    def step(self, velocity, carry, row):
        sigma, correction, *weights = row
        x, (known, before) = carry
        data = x - sigma * velocity(x, sigma)
        x = known + correction * data
        predicted, known = (_sum(each, x, data, before) for each in (weights[:3], weights[3:]))
        return Carry(predicted, (known, data))


SOLVERS: dict[str, Solver] = {"euler": Euler(), "unipc": UniPC(), "dpm++": DPMSolverPP2M()}
"""Every solver, by its name in `sample.solver`."""


def _to_zero(sigmas: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " levels"]:
    """The levels with the final 0."""
    levels = np.append(sigmas, 0.0)
    if len(sigmas) == 0 or not (levels[0] <= 1 and np.all(np.diff(levels) < 0)):
        raise UserError(
            "impossible noise levels", expected="one or more, strictly falling, in (0, 1]", found=list(sigmas)
        )
    return levels


def _differences(sigmas: Float[np.ndarray, " steps"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each step q, h, and h / h_before, which is 0 in a step of order 1."""
    levels = _to_zero(sigmas)
    finite = np.minimum(levels, LARGEST_SIGMA)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log1p(-finite) - np.log(finite))
    slope = np.zeros_like(h)
    slope[1:-1] = h[1:-1] / h[:-2]
    return levels[1:] / levels[:-1], h, slope


def _weights(q: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of x_s, m_s and m_before in q x_s + (1 - q) (m_s + slope (m_s - m_before))."""
    return q, (1 - q) * (1 + slope), (q - 1) * slope


def _table(*columns: np.ndarray) -> Float[np.ndarray, "steps k"]:
    return np.float32(np.stack(columns, axis=1))


def _sum(weights, x: Latents, data: Latents, before: Latents) -> Latents:
    of_x, of_data, of_before = weights
    return of_x * x + of_data * data + of_before * before
