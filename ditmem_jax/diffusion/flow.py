"""Flow matching: noise levels, noising, target and weight, as pure functions.

A noisy sample is x = (1 - sigma) x0 + sigma eps, the velocity dx/dsigma = eps - x0, and the timestep that the
transformer sees is 1000 sigma. Schedules are shifted towards noise: sigma = shift s / (1 + (shift - 1) s) for
s falling evenly from 1 (DiT-Mem section 3, Wan 2.1 section 4).
"""

import numpy as np
from jaxtyping import Array, Float

from ditmem_jax.config.networks import TRAIN_STEPS
from ditmem_jax.config.schema import SampleConfig
from ditmem_jax.errors import UserError


def shifted_sigmas(steps: int, shift: float) -> np.ndarray:
    """Noise levels `[steps]`, from 1 downwards, without the final 0; float64 on the host."""
    if steps < 1 or shift <= 0:
        raise UserError(
            "impossible schedule", expected="steps >= 1, shift > 0", found=f"steps {steps}, shift {shift}"
        )
    even = np.linspace(1.0, 0.0, steps + 1)[:-1]
    return shift * even / (1 + (shift - 1) * even)


def sampling_sigmas(config: SampleConfig) -> np.ndarray:
    """Noise levels at which a clip's velocity is taken, without the final 0; float64 on the host."""
    return np.float64(config.sigmas) if config.sigmas else shifted_sigmas(config.steps, config.shift)


def training_weights(shift: float = 5.0) -> np.ndarray:
    """The released weight of each of the 1000 training steps: a bell over timesteps, mean 1."""
    timesteps = TRAIN_STEPS * shifted_sigmas(TRAIN_STEPS, shift)
    bell = np.exp(-2 * ((timesteps - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)
    bell = bell - bell.min()
    return bell * TRAIN_STEPS / bell.sum()


def add_noise(
    latents: Float[Array, "B *grid"], noise: Float[Array, "B *grid"], sigma: Float[Array, " B"]
) -> Float[Array, "B *grid"]:
    """The noisy sample at noise level `sigma`, one per sample."""
    sigma = sigma.reshape(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise


def target(latents: Float[Array, "*shape"], noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The velocity that the transformer should predict."""
    return noise - latents
