"""Vectors as points of a plane, and columns as colours."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

SCALE = ((91, 110, 225), (42, 157, 143), (233, 161, 59))  # from low to high; told apart on light and on dark
CATEGORIES = ("#3b82c4", "#e08a1e", "#c2508f", "#2a9d6f", "#7c6bd6", "#b3543b", "#5aa9a9", "#8b8f3f")
UNKNOWN = "#8a8f98"


def project(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N 2"]:
    """The two directions in which the vectors differ most (PCA), each from -1 to 1.

    The sign of each is such that its largest part is positive, so that the same vectors make the same map.
    """
    centred = vectors - vectors.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    directions = (
        directions[:2] * np.sign(directions[:2, np.abs(directions[:2]).argmax(1)].diagonal())[:, None]
    )
    points = np.zeros((len(vectors), 2))
    points[:, : len(directions)] = (
        centred @ directions.T
    )  # one vector has one direction, and no other to differ from
    middle, extent = (points.max(0) + points.min(0)) / 2, np.ptp(points, axis=0) / 2
    return (points - middle) / np.where(extent > 0, extent, 1)


@dataclasses.dataclass(frozen=True)
class Colours:
    """A colour per value, and what they mean: the ends of a scale, or a name for each colour."""

    of: list[str]
    ends: tuple[float, float] | None = None
    names: tuple[tuple[str, str], ...] = ()


def colour(values: Sequence[Any] | None) -> Colours:
    """Numbers along a scale, other values by the most frequent ones; None is grey."""
    if values is None:
        return Colours([CATEGORIES[0]] * 0)
    if numbers := [value for value in values if isinstance(value, (int, float)) and np.isfinite(value)]:
        low, high = float(min(numbers)), float(max(numbers))
        return Colours([_on_scale(value, low, high) for value in values], ends=(low, high))
    common = [name for name, _ in Counter(v for v in values if v is not None).most_common(len(CATEGORIES))]
    tones = dict(zip(sorted(common, key=str), CATEGORIES, strict=False))
    names = [(tone, str(name)) for name, tone in tones.items()]
    if any(value not in tones for value in values):
        names.append((UNKNOWN, "other"))
    return Colours([tones.get(value, UNKNOWN) for value in values], names=tuple(names))


def _on_scale(value: Any, low: float, high: float) -> str:
    if value is None or not np.isfinite(value):
        return UNKNOWN
    place = (value - low) / (high - low) * (len(SCALE) - 1) if high > low else 1.0
    red, green, blue = (np.interp(place, range(len(SCALE)), part) for part in zip(*SCALE, strict=True))
    return f"#{round(red):02x}{round(green):02x}{round(blue):02x}"
