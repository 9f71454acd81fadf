"""The protocol of kinds of condition, and the shape of a clip that follows its first frame."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array

from ditmem_jax.config import Config, DiTConfig
from ditmem_jax.data.video import Frames
from ditmem_jax.models.wan.clip import CLIPVision
from ditmem_jax.models.wan.vae import VAE
from ditmem_jax.types import GivenFrames


class ImageNetworks(NamedTuple):
    """The networks that conditions are made with, CLIP's for transformers that read its tokens, and what fetches arrays
    from where these compute."""

    vae: VAE
    clip: CLIPVision | None = None
    to_host: Callable[[Array], np.ndarray] = np.asarray


@runtime_checkable
class Condition(Protocol):
    """How one kind of transformer is told of given frames."""

    def __init__(self, config: Config): ...

    @staticmethod
    def serves(dit: DiTConfig) -> bool:
        """Return True for a transformer that is told of frames in this way."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of a clip that begins with a picture of these, at the area of `config.video`."""

    def check(self, frames: GivenFrames | None) -> None:
        """Raise a UserError for frames, or for none, that this transformer cannot make a clip of."""

    def encode(self, frames: Sequence[GivenFrames], networks: ImageNetworks) -> dict[str, Any]:
        """Return what becomes of the frames of each sample: fields of `types.Conditioning` as NumPy arrays.

        Raises:
            UserError: for frames that this transformer does not take.
        """

    def stored(self, clip: Frames) -> GivenFrames | None:
        """Return the frames of a clip that training gives, if its record is to keep what becomes of them."""

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what records keep, of one sample, by field of `types.Conditioning`."""
