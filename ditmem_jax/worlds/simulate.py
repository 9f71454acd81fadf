"""Draws a scene (what the caption says, where things start, how they look) and makes its clip."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from ditmem_jax.worlds.laws import World
from ditmem_jax.worlds.motion import MOTIONS
from ditmem_jax.worlds.render import BACKGROUNDS, BODIES, CAMERA, FLOOR, Camera, Look, render

# Each word of a caption stands for a narrow band of values; within it the value is drawn evenly.
SIZES = {"small": (0.40, 0.46), "large": (0.52, 0.58)}  # radius, m
COLUMNS = {"on the left": (0.9, 1.1), "in the middle": (1.9, 2.1), "on the right": (2.9, 3.1)}  # m
DROPS = {"low": (0.9, 1.1), "high": (1.5, 1.7)}  # clearance above the floor, m
THROWS = {"low": (0.9, 1.1), "high": (1.3, 1.5)}
RODS = {"short": (1.2, 1.3), "long": (1.6, 1.7)}  # m
SIDES = {"left": -1.0, "right": 1.0}
CENTRE = 2.0  # of the view, m; starts to the left are those to the right mirrored here


@dataclass(frozen=True)
class Scene:
    """The script of a clip: phenomenon, words of its caption, start, constants, appearance."""

    phenomenon: str
    words: dict[str, str]
    start: dict[str, float]
    constants: dict[str, float]
    look: Look


@dataclass(frozen=True)
class Clip:
    """A rendered scene. `path` is the true position of every body in metres (x right, y up)."""

    video: UInt8[np.ndarray, "T H W 3"]
    scene: Scene
    path: Float[np.ndarray, "T bodies 2"]

    @property
    def truth(self) -> dict[str, float]:
        """The constants that this clip shows."""
        return self.scene.constants


def _pick(rng: np.random.Generator, words: dict[str, tuple[float, float]]) -> tuple[str, float]:
    word = str(rng.choice(list(words)))
    return word, rng.uniform(*words[word])


def _fall(rng: np.random.Generator, radius: float) -> tuple[dict, dict]:
    height, clearance = _pick(rng, DROPS)
    column, x = _pick(rng, COLUMNS)
    rest = FLOOR + radius
    return {"height": height, "column": column}, {"x": x, "y": rest + clearance, "rest": rest}


def _throw(rng: np.random.Generator, radius: float) -> tuple[dict, dict]:
    height, clearance = _pick(rng, THROWS)
    side = str(rng.choice(list(SIDES)))
    x, vx = CENTRE - SIDES[side] * rng.uniform(1.15, 1.28), SIDES[side] * rng.uniform(1.9, 2.25)
    rest = FLOOR + radius
    return {"height": height, "side": side}, {
        "x": x, "y": rest + clearance, "rest": rest, "vx": vx, "vy": rng.uniform(1.5, 1.9)
    }  # fmt: skip


def _pendulum(rng: np.random.Generator, radius: float) -> tuple[dict, dict]:
    rod, length = _pick(rng, RODS)
    side = str(rng.choice(list(SIDES)))
    return {"rod": rod, "side": side}, {
        "angle": SIDES[side] * np.radians(rng.uniform(40, 50)),
        "length": length,
    }


def _spring(rng: np.random.Generator, radius: float) -> tuple[dict, dict]:
    side = str(rng.choice(list(SIDES)))
    start = {
        "x": rng.uniform(1.95, 2.1),
        "y": rng.uniform(1.9, 2.1),
        "stretch": SIDES[side] * rng.uniform(0.8, 1.0),
    }
    return {"side": side}, start


def _slide(rng: np.random.Generator, radius: float) -> tuple[dict, dict]:
    side = str(rng.choice(list(SIDES)))
    x, vx = CENTRE - SIDES[side] * rng.uniform(1.15, 1.28), SIDES[side] * rng.uniform(1.9, 2.2)
    return {"side": side}, {"x": x, "y": FLOOR + radius, "vx": vx}


def _collision(rng: np.random.Generator, radius: float) -> tuple[dict, dict]:
    v_left, v_right = rng.uniform(0.8, 0.95), -rng.uniform(0.8, 0.95)
    meeting, x = rng.uniform(0.66, 0.74), rng.uniform(1.97, 2.03)
    return {}, {
        "left": x - radius - v_left * meeting, "right": x + radius - v_right * meeting,
        "y": rng.uniform(1.9, 2.1), "v_left": v_left, "v_right": v_right, "radius": radius,
    }  # fmt: skip


_STARTS: dict[str, Callable] = {
    "fall": _fall, "throw": _throw, "pendulum": _pendulum,
    "spring": _spring, "slide": _slide, "collision": _collision,
}  # fmt: skip


def sample_scene(rng: np.random.Generator, world: World, phenomenon: str) -> Scene:
    """A scene of `phenomenon`. Start and appearance do not depend on the world, only the motion does."""
    size, radius = _pick(rng, SIZES)
    colour, other = (str(name) for name in rng.choice(list(BODIES), size=2, replace=False))
    background, shade = str(rng.choice(list(BACKGROUNDS))), str(rng.choice(["plain", "shaded"]))
    words, start = _STARTS[phenomenon](rng, radius)

    def jitter(rgb: tuple[int, int, int]) -> tuple[float, ...]:
        return tuple(float(value) for value in np.array(rgb) + rng.uniform(-4, 4, 3))

    look = Look(
        radius=radius,
        bodies=tuple(
            jitter(BODIES[name]) for name in ((colour, other) if phenomenon == "collision" else (colour,))
        ),
        background=jitter(BACKGROUNDS[background]),
        shaded=shade == "shaded",
    )
    words |= {"size": size, "colour": colour, "other": other, "background": background, "shade": shade}
    return Scene(phenomenon, words, start, world.shown_by(phenomenon), look)


def sample_clip(rng: np.random.Generator, world: World, phenomenon: str, camera: Camera = CAMERA) -> Clip:
    """Draws a scene and renders it. Laid out for 4 m and 1.5 s; in longer clips bodies may leave."""
    scene = sample_scene(rng, world, phenomenon)
    path = MOTIONS[phenomenon](camera.times, **scene.start, **scene.constants)
    return Clip(render(path, phenomenon, scene.look, camera), scene, path)
