"""The seam for video diffusion transformers: what one computes, the kinds, and two of them as one model."""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.types import Compute, Conditioning, Memory

T = TypeVar("T")


@runtime_checkable
class Backbone(Protocol):
    """A frozen transformer that a memory is read by: an `nnx.Module` whose arrays are named by `models.placement`.

    It attends to the tokens of a memory beside its own in self-attention, with their bias, and `None` is exactly no
    memory. `compute` is fixed when it is built.
    """

    compute: Compute

    def __call__(
        self,
        latents: Float[Array, "B T H W C"],
        timestep: Float[Array, " B"] | Float[Array, "B G"],
        conditioning: Conditioning,
        memory: Memory | None = None,
    ) -> Float[Array, "B T H W C"]:
        """Return the velocity of noisy `latents` at `timestep`, 1000 sigma; clean frames in `conditioning` are as given."""


BACKBONES: dict[str, type[Backbone]] = {"wan": DiT}


class Experts(nnx.Module):
    """Two transformers for one model: one for high noise and one for low (Wan 2.2 A14B)."""

    def __init__(self, high: Backbone, low: Backbone):
        self.high, self.low = high, low


def with_expert(
    backbone: Backbone | Experts, high: bool | Bool[Array, ""], use: Callable[[Backbone], T]
) -> T:
    """Return `use(backbone)`; of two experts with the one that `high` tells, and only that one is computed.

    Gradients are to be taken in `use`: the backward pass of a choice gets copies of the weights that were chosen.
    """
    if not isinstance(backbone, Experts):
        return use(backbone)
    return jax.lax.cond(high, lambda: use(backbone.high), lambda: use(backbone.low))
