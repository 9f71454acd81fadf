"""The seam for conditions: how a transformer is told of frames that a clip is to hold.

Each kind is a file, listed in `CONDITIONS`; `condition_for` finds that of a config. A kind says which pictures its
transformer takes, what shape they give a clip, and what becomes of them as fields of a `types.Conditioning`.
"""

import dataclasses

from ditmem_jax.conditions.channels import FrameChannels
from ditmem_jax.conditions.clean import CleanFrames
from ditmem_jax.conditions.condition import Condition
from ditmem_jax.config import Config
from ditmem_jax.errors import UserError
from ditmem_jax.types import GivenFrames

CONDITIONS: dict[str, type[Condition]] = {"clean": CleanFrames, "channels": FrameChannels}
"""Every kind, by name."""


def condition_for(config: Config) -> Condition | None:
    """Return how the transformer of `config` takes given frames; None if it takes none."""
    return next((kind(config) for kind in CONDITIONS.values() if kind.serves(config.dit)), None)


def require_condition(config: Config) -> Condition:
    """As `condition_for`; raises UserError for a transformer that takes no frames."""
    if (condition := condition_for(config)) is None:
        raise UserError(
            "this transformer takes no given frames",
            expected="one that makes clips of pictures, such as Wan2.2-TI2V-5B",
            found="a text-to-video kind",
            fix="leave the frames out, or --config=wan22_5b",
        )
    return condition


def prepared(config: Config, frames: GivenFrames | None) -> Config:
    """Return `config` for clips that hold these frames: of the shape of the first if `sample.follow_image` says so.

    Raises:
        UserError: for frames that the transformer does not take, or none where it needs some.
    """
    condition = condition_for(config) if frames is None else require_condition(config)
    if condition is not None:
        condition.check(frames)
    if frames is None or not config.sample.follow_image:
        return config
    height, width = condition.size(*frames.first.shape[1:3])
    return dataclasses.replace(config, video=dataclasses.replace(config.video, height=height, width=width))


def condition_layout(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what records keep of given frames, of one sample, by field of `types.Conditioning`."""
    condition = condition_for(config)
    return {} if condition is None else condition.layout()
