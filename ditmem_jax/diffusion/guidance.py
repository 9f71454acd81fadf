"""Classifier-free guidance, with or without a memory in the negative branch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ditmem_jax.config.networks import TRAIN_STEPS
from ditmem_jax.types import Conditioning, Memory

Latents = Float[Array, "B T H W C"]
Velocity = Callable[[Latents, Float[Array, ""]], Latents]
"""Velocity of noisy latents at a noise level sigma."""


def guided(
    backbone: Callable[..., Latents],
    positive: Conditioning,
    negative: Conditioning,
    memory: Memory | None,
    scale: float,
    *,
    memory_in_negative: bool = True,
) -> Velocity:
    """Classifier-free guidance, negative + scale (positive - negative), one branch after the other.

    Both at once would take twice the memory for activations. The price of one by one is that weights are read and
    gathered twice a step, which is little beside the products at the lengths of video.

    Args:
        backbone: velocity of (latents, timestep, conditioning, memory), such as a `DiT`.
        memory_in_negative: give the memory to both branches, as released; otherwise guidance pushes towards it.
    """

    def branch(x, sigma, conditioning, bias):
        read = None if memory is None else memory._replace(bias=bias)
        return backbone(x, jnp.full(x.shape[:1], TRAIN_STEPS * sigma), conditioning, read)

    def both(x, sigma):
        toward, away = jax.lax.map(lambda given: branch(x, sigma, *given), branches)
        return away + scale * (toward - away)

    if scale == 1:
        return lambda x, sigma: branch(x, sigma, positive, None if memory is None else memory.bias)
    biases = None
    if memory is not None:
        other = memory.bias if memory_in_negative else jnp.full_like(memory.bias, -jnp.inf)
        biases = jnp.stack([memory.bias, other])
    branches = jax.tree.map(lambda *pair: jnp.stack(pair), positive, negative), biases
    return both
