"""Law error: how far the physics that a clip shows is from that of its world, for records and trials of `worlds`.

The error of a constant is |ln(measured / true)|: 0.1 is about 10 %. Beside it stands that of a guess, always the middle
of the constant's range. Validation takes both while a memory trains; the demo scores its trials by the same functions.
"""

import numpy as np
from jaxtyping import Float

from ditmem_jax.worlds.laws import RANGES
from ditmem_jax.worlds.measure import LAWLESS_PX, measure


def told(video: np.ndarray, phenomenon: str) -> dict[str, float]:
    """The constants that a clip [T, H, W, 3] tells, by name; none where it strays from every such motion.

    A fall that never reaches the floor tells gravity, but no bounciness.
    """
    found = measure(video, phenomenon)
    if found.residual_px > LAWLESS_PX:
        return {}
    return {name: value for name, value in found.constants.items() if found.sigma[name] < np.inf}


def law_error(
    measured: Float[np.ndarray, " n"] | float, true: Float[np.ndarray, " n"] | float
) -> Float[np.ndarray, " n"] | float:
    """|ln(measured / true)|; NaN where nothing was measured."""
    return np.abs(np.log(measured / true))


def guess(constant: str) -> float:
    """The middle of a constant's range, linear or logarithmic as its worlds are drawn."""
    return RANGES[constant].at(0.5)
