"""The seam for conditions: how a transformer is told of frames that a clip is to hold.

Each kind is a file, listed in `CONDITIONS`; `condition_for` finds that of a config. A kind says which pictures its
transformer takes, what shape they give a clip, and what becomes of them as fields of a `types.Conditioning`.
"""

from ditmem_jax.conditions.clean import CleanFrames
from ditmem_jax.conditions.condition import Condition
from ditmem_jax.config import Config
from ditmem_jax.errors import UserError

CONDITIONS: dict[str, type[Condition]] = {"clean": CleanFrames}
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
