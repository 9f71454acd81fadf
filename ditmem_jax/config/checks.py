"""Checks of configured values, as constructors make them."""

import math
from typing import Any

import numpy as np

from ditmem_jax.errors import UserError


def require(condition: bool, what: str, **details: Any) -> None:
    """Raise a UserError about `what` unless the condition holds."""
    if not condition:
        raise UserError(what, **details)


RANGES = {
    "a finite number": lambda x: abs(x) <= np.finfo(np.float32).max,
    "above 0": lambda x: 0 < x < math.inf,
    "0 or more": lambda x: 0 <= x < math.inf,
    "at least 1": lambda x: 1 <= x < math.inf,
    "0 to 4294967295": lambda x: 0 <= x < 2**32,
    "at least 1, or -1": lambda x: x == -1 or 1 <= x < math.inf,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
}
"""Ranges of numbers, as messages name them. None of them holds an infinity or a NaN."""


def check(part: str, config: Any, expected: str, *names: str) -> None:
    """Raise a UserError unless each number in the fields `names` is in the range `expected`; None is in each."""
    for name in names:
        value = getattr(config, name)
        if not all(x is None or RANGES[expected](x) for x in np.ravel(value)):
            raise UserError(f"{part}.{name}", expected=expected, found=value)
