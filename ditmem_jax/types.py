"""Values that the parts of the library hand to each other."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

Backend = Literal["xla", "cudnn", "splash"]
Remat = Literal["none", "products", "attention", "blocks", "offload"]


LowRank = tuple[Float[Array, "*A D r"], Float[Array, "*A r D"]]
"""A matrix of low rank as its two factors; those of all blocks have a leading axis."""


class Reading(NamedTuple):
    """How the A blocks that read a memory do so, each in its own way.

    `gate` is added to the bias of the tokens of the high and the low band: a curve over noise levels, by its values at
    K evenly spaced levels from 0 to 1. `key` and `value` are added to the block's own projections of memory tokens.
    """

    gate: Float[Array, "A 2 K"] | None = None
    key: LowRank | None = None
    value: LowRank | None = None


class Memory(NamedTuple):
    """Memory tokens: keys and values beside the video's own in every self-attention of the transformer.

    `bias` is added to the attention logits of a token: the log of how many equal tokens it stands for, plus the log
    of the strength; -inf for a token that is absent. The tokens of the high band come first, then as many of the low
    band. Without a `reading` all blocks read them alike, as released.
    """

    tokens: Float[Array, "B M D"]
    bias: Float[Array, "B M"]
    reading: Reading | None = None


class Conditioning(NamedTuple):
    """The inputs of a backbone beside noisy latents, noise level and memory.

    A backbone says which it takes: text-to-video kinds take text alone, image-to-video kinds `frames`, channels beside
    the noisy latents such as a given first frame and its mask, and Wan 2.1's also `image`, CLIP image tokens. Others
    take given frames among the noisy ones: `clean` latents where `given`, which are at timestep 0.
    """

    text: Float[Array, "B L E"]
    """Text embeddings, zero past their length."""
    frames: Float[Array, "B T H W Y"] | None = None
    image: Float[Array, "B I P"] | None = None
    clean: Float[Array, "B T H W C"] | None = None
    given: Bool[Array, "B T"] | None = None
    """True for latent frames that `clean` gives; never all of a sample."""

    def fill(self, latents: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        """Return `latents` with the clean frames in their places."""
        if self.clean is None or self.given is None:
            return latents
        return jnp.where(self.given[:, :, None, None, None], self.clean.astype(latents.dtype), latents)

    def timesteps(self, timestep: Float[Array, " B"]) -> Float[Array, " B"] | Float[Array, "B T"]:
        """Return the timestep of each latent frame, 0 for clean ones; where none is given, that of all."""
        return timestep if self.given is None else jnp.where(self.given, 0.0, timestep[:, None])

    def noisy_mean(self, error: Float[Array, "B T H W C"]) -> Float[Array, " B"]:
        """Return the mean of `error` of each sample over its noisy latents."""
        if self.given is None:
            return error.mean(axis=(1, 2, 3, 4))
        noisy = (~self.given).astype(error.dtype)
        return (error.mean(axis=(2, 3, 4)) * noisy).sum(axis=1) / noisy.sum(axis=1)


@dataclasses.dataclass(frozen=True)
class GivenFrames:
    """Pictures that a clip is to hold: its first frames and, where there is one, its last.

    They may be of any size; each kind of condition cuts them to that of the clip (`conditions`).
    """

    first: UInt8[np.ndarray, "n H W 3"]
    last: UInt8[np.ndarray, "h w 3"] | None = None
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Where they come from, as JSON values: what a clip's file tells of them."""


class Batch(NamedTuple):
    """Samples to train or validate on. `ids` are those of the records, on the host only.

    `source` tells memory encoders that have a table of sources, see `FreeTokensConfig`, which is each sample's.
    """

    latents: Float[Array, "B T H W C"]
    conditioning: Conditioning
    references: Float[Array, "B R T H W C"]
    """Latents of the reference videos, zero where there is none."""
    present: Bool[Array, "B R"]
    """True where there is a reference."""
    ids: Any = None
    source: Int[Array, " B"] | None = None


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a network computes, beside what; fixed when it is built.

    Args:
        backend: the kernel of attention.
        remat: what the backward pass finds kept. "none" computes nothing again; "products" keeps matrix products
            only, which saves half of the memory and on CPUs even time; "attention" keeps the inputs of blocks and the
            outputs of kernels of attention; "blocks" the inputs only; "offload" has these in the memory of the host,
            where the device can reach that (GPUs and TPUs).
        unroll: lay the blocks out instead of scanning them, for counting operations.
        memory_blocks: first and last of the blocks that read a memory; None is all of them.
    """

    backend: Backend = "xla"
    remat: Remat = "none"
    unroll: bool = False
    memory_blocks: tuple[int, int] | None = None
