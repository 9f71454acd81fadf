"""A frozen transformer and a memory encoder together: reference videos and noisy latents in, velocity out.

Pure functions, the same for training, validation and sampling.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ditmem_jax.config import Config, MemoryConfig
from ditmem_jax.config.networks import TRAIN_STEPS
from ditmem_jax.diffusion.flow import add_noise, target
from ditmem_jax.models.attention.kernels import resolve
from ditmem_jax.models.encoders import Encoder
from ditmem_jax.models.state import Structure
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.types import Backend, Batch, Compute, Memory


class Networks(NamedTuple):
    """Structures of the frozen transformer and of what trains beside it; their arrays are passed beside them."""

    dit: Structure
    encoder: Structure | None
    adapted: Structure | None = None
    """The transformer with places for low-rank adapters (`adapters.attach`); None where there are none."""


def attention_backend(config: Config, mesh: Mesh) -> Backend:
    """The kernel of attention on the devices of `mesh`: `config.mesh.attention`, with "auto" decided.

    Raises:
        UserError: for one that these devices do not have, or that does not take these weights.
    """
    platform = mesh.devices.flat[0].platform
    return resolve(config.mesh.attention, platform, config.weights.computed_in, config.dit.head_dim)


def compute_for(config: Config, mesh: Mesh, *, training: bool = False) -> Compute:
    """How the transformer of `config` computes on the devices of `mesh`; errors as `attention_backend`."""
    remat = config.run.remat if training else "none"
    blocks = config.memory.blocks if isinstance(config.memory, MemoryConfig) else None
    return Compute(attention_backend(config, mesh), remat, memory_blocks=blocks)


def encode(encoder: Encoder, batch: Batch, *, training: bool = False, rngs: nnx.Rngs | None = None) -> Memory:
    """The memory of each sample's reference videos."""
    references = batch.references.astype(jnp.float32)
    return encoder(references, batch.present, batch.source, training=training, rngs=rngs)


def keep_only(memory: Memory, keep: Bool[Array, " B"]) -> Memory:
    """The memory without that of the samples that are not kept: for them attention is exactly that without memory."""
    return memory._replace(bias=jnp.where(keep[:, None], memory.bias, -jnp.inf))


def with_strength(memory: Memory, strength: float | Float[Array, ""]) -> Memory:
    """The memory with the attention weight of its rows multiplied by `strength`; 0 is exactly no memory."""
    return memory._replace(bias=memory.bias + jnp.log(jnp.asarray(strength, jnp.float32))[None, None])


def velocity(
    backbone: DiT,
    memory: Memory | None,
    batch: Batch,
    sigma: Float[Array, " B"],
    noise: Float[Array, "B T H W C"],
) -> Float[Array, "B T H W C"]:
    """Velocity of the batch's latents at noise level `sigma`, one per sample."""
    noisy = add_noise(batch.latents.astype(jnp.float32), noise, sigma)
    return backbone(noisy, TRAIN_STEPS * sigma, batch.conditioning, memory)


def per_sample_mse(
    backbone: DiT,
    memory: Memory | None,
    batch: Batch,
    sigma: Float[Array, " B"],
    noise: Float[Array, "B T H W C"],
) -> Float[Array, " B"]:
    """Mean squared error of the velocity over the noisy latents, per sample."""
    predicted = velocity(backbone, memory, batch, sigma, noise)
    error = jnp.square(predicted - target(batch.latents.astype(jnp.float32), noise))
    return batch.conditioning.noisy_mean(error)


def give_first_frame(batch: Batch, key: PRNGKeyArray, probability: float) -> Batch:
    """The batch with each sample given its own first latent frame with this probability."""
    if probability == 0:
        return batch
    size, frames = batch.latents.shape[:2]
    given = jax.random.bernoulli(key, probability, (size, 1)) & (jnp.arange(frames) == 0)[None]
    return batch._replace(conditioning=batch.conditioning._replace(clean=batch.latents, given=given))
