"""What a kind of condition does, and the shape of a clip that follows its first frame."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ditmem_jax.config import Config, DiTConfig
from ditmem_jax.models.wan.vae import VAE
from ditmem_jax.types import GivenFrames


class ImageNetworks(NamedTuple):
    """The networks that conditions are made with."""

    vae: VAE


@runtime_checkable
class Condition(Protocol):
    """How one kind of transformer is told of given frames."""

    def __init__(self, config: Config): ...

    @staticmethod
    def serves(dit: DiTConfig) -> bool:
        """Return True for a transformer that is told of frames in this way."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of a clip that begins with a picture of these, at the area of `config.video`."""

    def encode(self, frames: Sequence[GivenFrames], networks: ImageNetworks) -> dict[str, Any]:
        """Return what becomes of the frames of each sample: fields of `types.Conditioning` as NumPy arrays.

        Raises:
            UserError: for frames that this transformer does not take.
        """


def sized(config: Config, condition: Condition, frames: GivenFrames) -> Config:
    """The config with clips of the shape that the first frame asks for, if `sample.follow_image` says so."""
    if not config.sample.follow_image:
        return config
    height, width = condition.size(*frames.first.shape[1:3])
    return dataclasses.replace(config, video=dataclasses.replace(config.video, height=height, width=width))
