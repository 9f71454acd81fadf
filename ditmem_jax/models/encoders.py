"""The seam for memory encoders: what one computes, and the kinds by the dataclass that configures them.

A new kind is a dataclass in `config.networks.EncoderConfig` and an `nnx.Module` in a file of its own, listed here. Its
configuration is saved with it, see `storage.encoders`.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ditmem_jax.config import EncoderConfig, FreeTokensConfig, MemoryConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.free_tokens import FreeTokens
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.types import Memory


@runtime_checkable
class Encoder(Protocol):
    """References of each sample to its memory: an `nnx.Module` with float32 weights, made from its `config` alone."""

    config: Any  # the EncoderConfig of its kind

    def __call__(
        self,
        latents: Float[Array, "B R T H W C"],
        present: Bool[Array, "B R"] | None = None,
        source: Int[Array, " B"] | None = None,
        *,
        training: bool,
        rngs: nnx.Rngs | None = None,
    ) -> Memory:
        """Return the memory of each sample.

        Args:
            latents: normalised latents of R reference videos per sample.
            present: False marks a missing video, whose latents are not read.
            source: the place in `config.sources` of each sample's source; None for kinds without sources.
            training: may change running statistics and draw from `rngs.dropout`.
        """


@runtime_checkable
class VideoEncoder(Encoder, Protocol):
    """An encoder whose work on a video depends on no other video, so that a bank can keep it (`bank.features`)."""

    def video_rows(
        self,
        latents: Float[Array, "N T H W C"],
        present: Bool[Array, " N"] | None = None,
        *,
        training: bool,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "N 2 M D"]:
        """Return what is made of single videos, for the high and the low band."""

    def mix(self, rows: Float[Array, "B R 2 M D"], present: Bool[Array, "B R"]) -> Memory:
        """Return the memory of samples from the rows of their videos."""


ENCODERS: dict[type, Callable[..., Encoder]] = {
    MemoryConfig: MemoryEncoder,
    FreeTokensConfig: FreeTokens,
}


def new_encoder(config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> Encoder:
    """A new encoder of the kind of `config`; matrix products run in `dtype`."""
    return ENCODERS[type(config)](config, rngs=rngs, dtype=dtype)


def per_video(encoder: Encoder) -> VideoEncoder:
    """The encoder, if it is one that works video by video.

    Raises:
        UserError: for a kind that does not.
    """
    if not isinstance(encoder, VideoEncoder):
        raise UserError(
            "this memory encoder computes nothing from single videos",
            expected="memory.kind = dit_mem",
            found=f"memory.kind = {encoder.config.kind}",
        )
    return encoder
