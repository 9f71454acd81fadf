"""Renders paths of bodies to soft, anti-aliased video.

Edges are smooth ramps of the signed distance, two pixels wide, so that positions survive to a small fraction
of a pixel. Backgrounds change only from top to bottom; springs are fixed to the left edge of the view.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from ditmem_jax.worlds.motion import PIVOT

FLOOR = 0.3  # height of the floor in the phenomena that have one, m
HAS_FLOOR = ("fall", "throw", "slide")
ROD = (128.0, 128.0, 128.0)  # colour of rods, pivots and springs: grey, so no body's colour
ROD_WIDTH, PIVOT_RADIUS = 0.14, 0.12  # m

# Bodies are saturated and of middling brightness, backgrounds pale or dark: any pair survives H.264.
BODIES = {
    "red": (208, 42, 42),
    "green": (30, 150, 60),
    "blue": (45, 80, 215),
    "orange": (238, 130, 20),
    "purple": (155, 50, 185),
    "cyan": (20, 175, 195),
}
BACKGROUNDS = {
    "white": (236, 236, 236),
    "sand": (222, 208, 180),
    "sky": (186, 208, 230),
    "black": (24, 24, 26),
    "navy": (30, 38, 66),
}


@dataclass(frozen=True)
class Camera:
    """Square view of `metres`, lower left corner at the origin; `softness` is the width of edges (px)."""

    size: int = 32
    frames: int = 25
    fps: float = 16.0
    metres: float = 4.0
    softness: float = 2.0

    @property
    def scale(self) -> float:
        """Pixels per metre."""
        return self.size / self.metres

    @property
    def times(self) -> Float[np.ndarray, " T"]:
        """Time of each frame in seconds; motion starts at the first."""
        return np.arange(self.frames) / self.fps


CAMERA = Camera()


@dataclass(frozen=True)
class Look:
    """Appearance: radius in metres (half the side for a block), colours as red, green, blue from 0 to 255."""

    radius: float
    bodies: tuple[tuple[float, ...], ...]
    background: tuple[float, ...]
    shaded: bool


def _coverage(distance: np.ndarray, camera: Camera) -> np.ndarray:
    """Signed distance to an outline (metres, negative inside) to coverage: a smoothstep across the edge."""
    ramp = np.clip(0.5 - distance * (camera.scale / camera.softness), 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _segment(x: np.ndarray, y: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance from each point to the line from `start` to `end` (both [T, 2])."""
    dx, dy = (end - start).T[:, :, None, None]
    rx, ry = x - start[:, 0, None, None], y - start[:, 1, None, None]
    along = np.clip((rx * dx + ry * dy) / (dx**2 + dy**2), 0, 1)
    return np.hypot(rx - along * dx, ry - along * dy)


def _backdrop(phenomenon: str, look: Look, y: np.ndarray, camera: Camera) -> np.ndarray:
    """Background colours [H, 1, 3]."""
    shade = 1 - 0.16 * (1 - y / camera.metres) if look.shaded else np.ones_like(y)
    backdrop = shade[..., None] * np.array(look.background, np.float32)
    if phenomenon in HAS_FLOOR:
        floor = _coverage(y - FLOOR, camera)[..., None]
        backdrop = backdrop + floor * 0.4 * (np.float32(128) - backdrop)
    return backdrop


def render(
    path: Float[np.ndarray, "T bodies 2"], phenomenon: str, look: Look, camera: Camera
) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames of the bodies along `path` (metres), with the floor, rod or spring that the phenomenon has."""
    path = path.astype(np.float32)
    pixel = (np.arange(camera.size, dtype=np.float32) + 0.5) / np.float32(camera.scale)
    x, y = pixel[None, :], np.float32(camera.metres) - pixel[:, None]
    frames = np.broadcast_to(_backdrop(phenomenon, look, y, camera), (len(path), camera.size, camera.size, 3))

    layers = []  # (coverage [T, H, W], colour), back to front
    body = path[:, 0]
    if phenomenon == "pendulum":
        pivot = np.broadcast_to(np.float32(PIVOT), body.shape)
        rod = np.minimum(
            _segment(x, y, pivot, body) - ROD_WIDTH / 2, np.hypot(x - PIVOT[0], y - PIVOT[1]) - PIVOT_RADIUS
        )
        layers.append((_coverage(rod, camera), ROD))
    if phenomenon == "spring":
        wall = body * np.float32([0, 1]) - np.float32(
            [camera.metres, 0]
        )  # beyond the edge of the view: no end to be seen
        layers.append((_coverage(_segment(x, y, wall, body) - ROD_WIDTH / 2, camera), ROD))
    for k, colour in enumerate(look.bodies):
        rx, ry = x - path[:, k, 0, None, None], y - path[:, k, 1, None, None]
        if phenomenon == "slide":  # a square with round corners
            corner = 0.4 * look.radius
            qx, qy = np.abs(rx) - (look.radius - corner), np.abs(ry) - (look.radius - corner)
            distance = (
                np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - corner
            )
        else:
            distance = np.hypot(rx, ry) - look.radius
        layers.append((_coverage(distance, camera), colour))
    for coverage, colour in layers:
        frames = frames + coverage[..., None] * (np.array(colour, np.float32) - frames)
    return np.clip(frames + 0.5, 0, 255).astype(np.uint8)
