"""A step cache: velocities that have hardly changed since they were computed are taken again.

Most of a schedule the velocity changes slowly with the noise level, and a network need not be asked at every step; this
is what TeaCache (arXiv 2411.19108) and MagCache (arXiv 2506.09045) use. They tell a step that can be left out by curves
that were fitted to one network. Here the sample's own past tells: with the relative change a noise level r between the
last two velocities that were computed, at sigma_2 and before that at sigma_1,

    r = |v_2 - v_1| / (|v_2| (sigma_1 - sigma_2)),

the velocity at sigma is expected to have changed by r (sigma_2 - sigma) of its length, and is computed again once that
reaches the tolerance. Every sample of a batch decides for itself, so that none depends on the others; the network is
asked while any of them needs it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ditmem_jax.diffusion.guidance import Latents, Velocity


class Kept(NamedTuple):
    """The last velocity that was computed for each sample, and what is known of its change."""

    velocity: Latents
    sigma: Float[Array, " B"]
    """Noise levels at which it was computed."""
    change: Float[Array, " B"]
    """Relative change a noise level; infinite until two velocities are computed."""
    computed: Int[Array, " B"]
    """How many were computed."""

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> "Kept":
        """Before the first step of samples of this shape."""
        each = np.zeros(shape[:1], np.float32)
        return cls(np.zeros(shape, np.float32), each + 2, each + np.inf, np.zeros(shape[:1], np.int32))


def recall(
    velocity: Velocity,
    kept: Kept,
    x: Latents,
    sigma: Float[Array, ""],
    tolerance: float,
    usable: Bool[Array, " B"] | bool = True,
) -> tuple[Latents, Kept]:
    """Return the velocity at (x, sigma), computed or as it was kept, and what is kept from now on.

    Args:
        tolerance: the relative change that is let pass.
        usable: False for samples whose kept velocity is of another function, and is computed again in any case.
    """
    needed = ~(kept.change * (kept.sigma - sigma) < tolerance) | jnp.logical_not(usable)
    found = jax.lax.cond(needed.any(), lambda: velocity(x, sigma), lambda: kept.velocity)
    chosen = jnp.where(needed.reshape(-1, 1, 1, 1, 1), found, kept.velocity)
    change = _length(chosen - kept.velocity) / (_length(chosen) * (kept.sigma - sigma))
    change = jnp.where(needed, jnp.where(kept.computed > 0, change, jnp.inf), kept.change)
    return chosen, Kept(
        chosen, jnp.where(needed, sigma, kept.sigma), change, kept.computed + needed.astype(jnp.int32)
    )


def _length(x: Latents) -> Float[Array, " B"]:
    return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(axis=(1, 2, 3, 4)))
