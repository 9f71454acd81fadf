"""Where the gate of a new memory begins: every block at the same small share of attention, less at low noise.

A memory's tokens take about 1 % of the attention in most blocks of an untrained reader and ten times that in some, and
what they change of the estimate of the clean clip is about the same at every noise level, while that estimate's own
error falls with the noise. So the gate starts at

    gate(block, band, sigma) = log(share wanted / share measured in the block) + log(e(sigma) / e(1)),

in odds in place of shares, with e(sigma) = sigma sqrt(mean squared error of the velocity without memory), the rms error
of the estimate x - sigma v of the clean clip. Both are measured on one batch.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditmem_jax.config import Config, MemoryConfig
from ditmem_jax.config.networks import TRAIN_STEPS
from ditmem_jax.diffusion.flow import add_noise
from ditmem_jax.models.backbone import with_expert
from ditmem_jax.models.ditmem import Networks, encode, per_sample_mse
from ditmem_jax.models.memory_encoder import KNOTS
from ditmem_jax.models.state import Arrays
from ditmem_jax.parallel.mesh import replicated
from ditmem_jax.train.step import TrainState
from ditmem_jax.types import Batch

LOWEST = 0.02  # noise level at which the first knot is measured, since there is no error to compare at 0


def calibrate(
    config: Config, networks: Networks, backbone: Arrays, state: TrainState, batch: Batch, mesh: Mesh
) -> TrainState:
    """Return `state` with the gate of its memory encoder where it begins; under `jax.set_mesh`."""
    start = jax.jit(make_start(config, networks), out_shardings=replicated(mesh))
    gate = start(backbone, state.params | state.rest, batch)
    if "reader.fixed_gate" in state.rest:
        return dataclasses.replace(state, rest=state.rest | {"reader.fixed_gate": gate})
    return dataclasses.replace(state, params=state.params | {"reader.gate": gate})


def make_start(config: Config, networks: Networks) -> Callable[[Arrays, Arrays, Batch], jax.Array]:
    """The pure program (frozen weights, encoder, batch) -> gate [A, 2, K]."""
    assert isinstance(config.memory, MemoryConfig), "other memories have no gate"
    share = config.memory.gate_share
    levels = np.maximum(np.linspace(0, 1, KNOTS), LOWEST).astype(np.float32)
    high = config.experts.is_high(levels)

    def start(backbone: Arrays, encoder: Arrays, batch: Batch) -> jax.Array:
        model, memory = networks.dit.merge(backbone), encode(networks.encoder.merge(encoder), batch)
        clean = batch.latents.astype(jnp.float32)

        def at_level(given):
            level, high, key = given
            noise = jax.random.normal(key, clean.shape)
            sigma = jnp.full((len(clean),), level)

            def measure(dit):
                noisy = add_noise(clean, noise, sigma)
                odds = dit.memory_share(noisy, TRAIN_STEPS * sigma, batch.conditioning, memory)
                return per_sample_mse(dit, None, batch, sigma, noise).mean(), odds

            return with_expert(model, high, measure)

        keys = jax.random.split(jax.random.key(config.run.seed), KNOTS)
        error, odds = jax.lax.map(at_level, (levels, high, keys))
        wanted = jnp.log(share / 2 / (1 - share))  # half of it for each band
        curve = jnp.log(levels) + 0.5 * jnp.log(error)
        return (wanted - jnp.log(odds).mean(axis=0))[:, :, None] + (curve - curve[-1])[None, None]

    return start
