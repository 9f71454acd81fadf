"""Networks of a few numbers, in place of the real ones, whose errors are known by hand.

Latents are zero, so that noise can be read off the noisy latents. A sample is told by a number, the first of its text
embedding, and a video by its mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.models.ditmem import Networks
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.state import Arrays, split
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.types import Batch, Compute, Conditioning, Memory

GRID = (1, 2, 2, 3)


class Seen:
    """The arguments that networks were called with, where nothing is compiled."""

    def __init__(self):
        self.references = self.present = self.sigma = self.noise = self.memory = self.dropout = None


class FakeEncoder(MemoryEncoder):
    """A token for each video: its mean times a trained factor. Counts its calls in training as running statistics."""

    def __init__(self, seen: Seen | None = None):
        self.factor, self.calls = nnx.Param(jnp.float32(1)), nnx.BatchStat(jnp.float32(0))
        self.config, self.seen = None, seen

    def __call__(self, latents, present=None, source=None, *, training, rngs=None):
        if training:
            self.calls[...] += 1
        if self.seen is not None:
            self.seen.references, self.seen.present = latents, present
            self.seen.dropout = None if rngs is None else jax.random.key_data(rngs.dropout())
        tokens = self.factor * latents.mean((2, 3, 4, 5))[..., None]
        return Memory(tokens, jnp.where(present, 0.0, -jnp.inf))


class FakeDiT(DiT):
    """Errs by sigma times the sample's number plus `offset`, less the sum of its memory tokens, everywhere."""

    def __init__(self, offset: float = 0.0, seen: Seen | None = None):
        self.offset, self.seen = nnx.Param(jnp.float32(offset)), seen
        self.compute = Compute()

    def __call__(self, latents, timestep, conditioning, memory=None):
        sigma = timestep / 1000
        if self.seen is not None:
            self.seen.sigma, self.seen.noise, self.seen.memory = sigma, latents / _over(sigma), memory
        error = sigma * conditioning.text[:, 0, 0] + self.offset
        if memory is not None:
            error = error - (jnp.exp(memory.bias)[..., None] * memory.tokens).sum((1, 2))
        return latents / _over(sigma) + _over(error)


class NoiseBlind(DiT):
    """Predicts zero: the error of a sample is the mean square of its noise."""

    def __init__(self):
        self.compute = Compute()

    def __call__(self, latents, timestep, conditioning, memory=None):
        return jnp.zeros_like(latents)


def _over(x: jax.Array) -> jax.Array:
    return x.reshape(-1, 1, 1, 1, 1)


def networks(dit: nnx.Module, encoder: nnx.Module | None = None) -> tuple[Networks, Arrays, Arrays]:
    """Structures of both, and the arrays of each."""
    pairs = split(dit), split(encoder or FakeEncoder())
    return Networks(*(structure for structure, _ in pairs)), *(arrays for _, arrays in pairs)


def batch(numbers, videos) -> Batch:
    """Samples with these numbers and the means of their videos, nan for none."""
    videos = np.asarray(videos, np.float32)
    present = ~np.isnan(videos)
    latents = np.zeros((len(numbers), *GRID), np.float32)
    text = np.asarray(numbers, np.float32).reshape(-1, 1, 1)
    means = np.where(present, videos, 0)[..., None, None, None, None]
    return Batch(
        *jax.tree.map(jnp.asarray, (latents, Conditioning(text), np.tile(means, (1, 1, *GRID)), present))
    )
