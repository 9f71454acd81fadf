"""The training objective: the density of noise levels, and the weight of a sample's squared error.

The error of a good backbone is mostly noise that no knowledge can predict, and it is tens of times larger at
high than at low noise. Averaged as published, what a memory can contribute drowns in it. Dividing each sample's
error by what it would be without memory makes every noise level and every sample count by how much the memory
changes. "relative" computes that error, "running" takes a mean over samples that had no memory anyway.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ditmem_jax.config import ExpertsConfig, ObjectiveConfig
from ditmem_jax.config.networks import TRAIN_STEPS
from ditmem_jax.diffusion.flow import shifted_sigmas, training_weights

BINS = 20
SINGLE = ExpertsConfig()  # one transformer for all noise levels
Values = Array | np.ndarray
PRIOR = 4.0  # samples' worth of trust in a sample's own error, while its bin has few others


def draw_sigma(
    config: ObjectiveConfig, key: PRNGKeyArray, batch: int, experts: ExpertsConfig = SINGLE
) -> tuple[Float[Array, " B"], bool | Bool[Array, ""]]:
    """One noise level per sample, and whether of two experts that for high noise serves them all.

    It is the one that trains or, if both do, one that is drawn by its share of the levels.
    """
    if experts.boundary is not None:
        return _draw_for_expert(config, key, batch, experts)
    if config.density == "shifted":
        table = jnp.asarray(shifted_sigmas(TRAIN_STEPS, config.shift), jnp.float32)
        return table[jax.random.randint(key, (batch,), 0, TRAIN_STEPS)], False
    low, high = config.sigma_range
    if config.density == "uniform":
        return jax.random.uniform(key, (batch,), minval=low, maxval=high), False
    edges, cumulative = _spectrum(config)
    return jnp.interp(jax.random.uniform(key, (batch,)), cumulative, edges), False


def _draw_for_expert(
    config: ObjectiveConfig, key: PRNGKeyArray, batch: int, experts: ExpertsConfig
) -> tuple[Float[Array, " B"], bool | Bool[Array, ""]]:
    """Draws uniformly between the shares at which the expert's levels begin and end, and looks up their levels."""
    which, where = jax.random.split(key)
    below = share_below(config, experts)
    high = jax.random.uniform(which) >= below if experts.trains == "both" else experts.trains == "high"
    start, end = jnp.where(high, below, 0.0), jnp.where(high, 1.0, below)
    if config.density == "shifted":
        table = jnp.asarray(shifted_sigmas(TRAIN_STEPS, config.shift)[::-1], jnp.float32)
        first, last = (jnp.round(TRAIN_STEPS * share).astype(jnp.int32) for share in (start, end))
        return table[jax.random.randint(where, (batch,), first, last)], high
    share = jax.random.uniform(where, (batch,)) * (end - start) + start
    if config.density == "uniform":
        least, most = config.sigma_range
        return least + (most - least) * share, high
    edges, cumulative = _spectrum(config)
    return jnp.interp(share, cumulative, edges), high


def share_below(config: ObjectiveConfig, experts: ExpertsConfig) -> float:
    """The share of samples whose noise level falls below `experts.boundary`."""
    boundary = experts.boundary
    assert boundary is not None, "one transformer has no boundary"
    if config.density == "shifted":
        return float((~experts.is_high(shifted_sigmas(TRAIN_STEPS, config.shift))).mean())
    if config.density == "uniform":
        low, high = config.sigma_range
        return float(np.clip((boundary - low) / (high - low), 0, 1))
    edges, cumulative = map(np.asarray, _spectrum(config))
    return float(np.interp(boundary, edges, cumulative))


def _spectrum(config: ObjectiveConfig) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Edges of the histogram's bins, and the share of samples below each: its inverse draws from it."""
    weights = np.asarray(config.spectrum, np.float64)
    cumulative = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
    edges = np.linspace(0, 1, len(weights) + 1)
    return jnp.asarray(edges, jnp.float32), jnp.asarray(cumulative, jnp.float32)


def released_weight(sigma: Float[Array, " B"], shift: float) -> Float[Array, " B"]:
    """The published weight of a noise level: exact at the published steps, linear between them."""
    sigmas, weights = shifted_sigmas(TRAIN_STEPS, shift)[::-1], training_weights(shift)[::-1]
    return jnp.interp(sigma, jnp.asarray(sigmas, jnp.float32), jnp.asarray(weights, jnp.float32))


@struct.dataclass
class Baseline:
    """Sum and number of squared errors without memory, per noise-level bin.

    The backbone is frozen, so the mean does not drift: every sample counts alike, whenever it was seen.
    """

    total: Any  # [BINS]; not annotated with a shape, since a pytree may hold other leaves in place of arrays
    count: Any  # [BINS]

    @classmethod
    def empty(cls) -> "Baseline":
        return cls(jnp.zeros(BINS), jnp.zeros(BINS))

    def observe(
        self, sigma: Float[Array, " B"], error: Float[Array, " B"], without: Bool[Array, " B"]
    ) -> "Baseline":
        """Adds the errors of the samples that had no memory."""
        bins, weight = _bin(sigma), without.astype(jnp.float32)
        return Baseline(self.total.at[bins].add(error * weight), self.count.at[bins].add(weight))

    def expected(self, sigma: Float[Array, " B"], error: Float[Array, " B"]) -> Float[Array, " B"]:
        """Expected error without memory at `sigma`.

        Until its bin has seen samples, a sample's own `error` stands in, and then fades: minimising error over
        error (held constant) is minimising its logarithm, which has the right scale from the first step on.
        """
        total, count = self.total[_bin(sigma)], self.count[_bin(sigma)]
        return (total + PRIOR * error) / (count + PRIOR)


def _bin(sigma: Float[Array, " B"]) -> Array:
    return jnp.clip((sigma * BINS).astype(jnp.int32), 0, BINS - 1)


def in_bins(sigma: Float[Array, " B"]) -> Bool[Array, "bins B"]:
    """True where a sample's noise level falls into a bin of `Baseline`."""
    return jnp.arange(BINS)[:, None] == _bin(sigma)[None]


def loss(
    config: ObjectiveConfig,
    sigma: Float[Array, " B"],
    error: Float[Array, " B"],
    reference: Float[Array, " B"],
) -> Float[Array, ""]:
    """The number to minimise.

    Args:
        error: squared error of each sample.
        reference: the error that it would have without memory, held constant; the released loss ignores it.
    """
    if config.kind == "released":
        return (released_weight(sigma, config.shift) * error).mean()
    return (error / jax.lax.stop_gradient(reference)).mean()


def gain_by_level(
    error: Float[Values, "levels B"], without: Float[Values, "levels B"], counted: Bool[Values, "levels B"]
) -> tuple[Float[Values, " levels"], Float[Values, " levels"]]:
    """Gain from memory at each noise level: 1 - mean error with memory / mean error without, over samples.

    A ratio of means: in a mean of ratios the samples that have hardly any error would decide.

    Args:
        error, without: squared errors with and without memory.
        counted: which samples count at a level.
    Returns:
        The gains, 0 at a level where no sample counts; and 1 where one does, else 0.
    """
    counted = counted.astype(error.dtype)
    seen = counted.max(axis=1)
    ours, theirs = ((counted * x).sum(axis=1) for x in (error, without))
    return seen * (1 - ours / (theirs + (1 - seen))), seen


def gain(
    error: Float[Values, "levels B"], without: Float[Values, "levels B"], counted: Bool[Values, "levels B"]
) -> Float[Values, ""] | float:
    """The gain from memory: the mean of `gain_by_level` over the levels where a sample counts; 0 if none does."""
    gains, seen = gain_by_level(error, without, counted)
    return gains.sum() / (seen.sum() + (1 - seen.max()))
