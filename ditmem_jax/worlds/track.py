"""Finds the bodies of a clip: pixels to one sub-pixel position per body and frame.

Each pixel is written as background plus shares of the bodies' colours (and of the grey of rods), a small
linear system; a body's position is the centroid of its share. Known beforehand are the palette, the number of
bodies, whether there is a rod, and that backgrounds change only from top to bottom.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from ditmem_jax.worlds.render import BODIES, FLOOR, HAS_FLOOR, ROD, Camera

_PALETTE = np.array(list(BODIES.values()), np.float32)


@dataclass(frozen=True)
class Track:
    """Positions (m; x right, y up), interpolated where a body was not `seen`; mean radius (m)."""

    position: Float[np.ndarray, "T bodies 2"]
    seen: Bool[np.ndarray, "T bodies"]
    radius: float


def background(
    frames: Float[np.ndarray, "T H W 3"], phenomenon: str, camera: Camera
) -> Float[np.ndarray, "H 3"]:
    """Colour of each row behind the bodies: its median, and above the floor a straight line through these.

    The line (Theil-Sen: median of all slopes) forgives the few rows that bodies cover for the most part.
    """
    rows = np.median(frames.swapaxes(0, 1).reshape(camera.size, -1, 3), axis=1)
    height = camera.metres - (np.arange(camera.size) + 0.5) / camera.scale
    clear = height > FLOOR + camera.softness / camera.scale if phenomenon in HAS_FLOOR else height > 0
    i, j = np.triu_indices(clear.sum(), 1)
    y, colour = height[clear], rows[clear]
    slope = np.median((colour[i] - colour[j]) / (y[i] - y[j])[:, None], axis=0)
    line = height[:, None] * slope
    return np.where(clear[:, None], line + np.median(colour - line[clear], axis=0), rows).astype(np.float32)


def _body_colours(frames: np.ndarray, count: int) -> np.ndarray:
    """The `count` palette colours with the most pixels near them, each moved to the mean of these pixels."""
    pixels = frames[::3].reshape(-1, 3)  # a third of the frames is plenty
    squared = (pixels**2).sum(1)[:, None] - 2 * pixels @ _PALETTE.T + (_PALETTE**2).sum(1)
    nearest = np.where(squared.min(1) < 60.0**2, squared.argmin(1), len(_PALETTE))
    found = np.argsort(-np.bincount(nearest, minlength=len(_PALETTE) + 1)[:-1], kind="stable")[:count]
    return np.stack([pixels[nearest == k].mean(0) if (nearest == k).any() else _PALETTE[k] for k in found])


def _shares(frames: np.ndarray, behind: np.ndarray, colours: np.ndarray, rod: bool) -> np.ndarray:
    """Share of each body in each pixel, [bodies, T, H, W]."""
    mixed = np.concatenate([colours, [ROD]]) if rod else colours
    basis = mixed[None] - behind[:, None]  # [H, colours, 3]
    inverse = np.linalg.pinv(basis)[..., : len(colours)]  # [H, 3, bodies]
    return np.moveaxis((frames - behind[:, None]) @ inverse.astype(np.float32), -1, 0)


def track(frames: Float[np.ndarray, "T H W 3"], phenomenon: str, camera: Camera) -> Track:
    """Tracks the bodies of a clip with colours from 0 to 255. The one that starts on the left comes first."""
    count = 2 if phenomenon == "collision" else 1
    share = _shares(
        frames,
        background(frames, phenomenon, camera),
        _body_colours(frames, count),
        rod=phenomenon in ("pendulum", "spring"),
    )
    pixel = np.arange(camera.size, dtype=np.float32) + 0.5

    def centroid(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        total = weight.sum((2, 3))
        safe = np.maximum(total, 1e-6)
        return total, weight.sum(2) @ pixel / safe, weight.sum(3) @ pixel / safe

    whole, column, row = centroid(np.where(share > 0.4, share, 0))
    area = whole
    for _ in range(2):  # again, with all of the share but only near the body
        reach = np.sqrt(np.median(area, axis=1) / np.pi)[:, None] + camera.softness / 2 + 0.5
        distance = np.hypot(pixel - column[..., None, None], pixel[:, None] - row[..., None, None])
        area, column, row = centroid(np.where((distance < reach[..., None, None]) & (share > 0.01), share, 0))

    usual = np.median(area, axis=1, keepdims=True)
    radius = np.sqrt(usual / np.pi)
    margin = np.minimum.reduce([column, camera.size - column, row, camera.size - row])
    likely = (radius > 0.2 * camera.scale) & (radius < 0.9 * camera.scale)
    likely = likely & (area > 0.5 * whole)  # one body, not specks all over
    seen = likely & (margin > radius - 0.25) & (area > 0.6 * usual) & (area < 1.5 * usual)
    position = np.stack([column / camera.scale, camera.metres - row / camera.scale], axis=-1)
    for k, axis in np.ndindex(count, 2):
        if seen[k].any():  # bridge the gaps
            position[k, :, axis] = np.interp(
                range(len(frames)), np.flatnonzero(seen[k]), position[k, seen[k], axis]
            )
    order = np.argsort(position[:, : max(1, camera.frames // 6), 0].mean(1))
    return Track(
        position[order].swapaxes(0, 1).astype(np.float64), seen[order].T, float(radius.mean() / camera.scale)
    )
