"""Reads a law's constants off a clip's pixels: track the bodies, fit the law's own motion to the track."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8
from scipy.optimize import least_squares

from ditmem_jax.errors import UserError, nearest
from ditmem_jax.worlds.laws import PHENOMENA, RANGES
from ditmem_jax.worlds.motion import MOTIONS, PIVOT
from ditmem_jax.worlds.render import CAMERA, Camera
from ditmem_jax.worlds.track import Track, track

ROBUST_PX = 0.2  # tracking errors beyond this count linearly, not squared
FLOOR_PX = 0.01  # no track is taken to be better than this when uncertainties are told
LAWLESS_PX = 1.0  # a clip that strays further from every motion of its law does not show the law
SILENT = 0.5  # a constant that is no better known than this has not been measured


@dataclass(frozen=True)
class Measurement:
    """A measurement of a clip.

    Attributes:
        constants: measured constants by name, units as in `laws.RANGES`; empty if nothing could be fitted.
        sigma: relative standard error of each, from the residual of the fit; infinite where nothing is shown.
        residual_px: root mean square distance in pixels between the track and the fitted motion.
        ok: whether body and motion were found and tell every constant. If not, `why` says what is wrong.
    """

    constants: dict[str, float] = field(default_factory=dict)
    sigma: dict[str, float] = field(default_factory=dict)
    residual_px: float = float("inf")
    ok: bool = False
    why: str = ""


def _fall(found: Track, times: np.ndarray) -> dict[str, float]:
    x, y = found.position[:, 0].T
    return {"x": np.median(x), "y": y[0], "rest": y.min()}


def _throw(found: Track, times: np.ndarray) -> dict[str, float]:
    x, y = found.position[:, 0].T
    vx, vy = (found.position[2, 0] - found.position[0, 0]) / (times[2] - times[0])
    return {"x": x[0], "y": y[0], "rest": y.min(), "vx": vx, "vy": vy}


def _pendulum(found: Track, times: np.ndarray) -> dict[str, float]:
    arm = found.position[:, 0] - PIVOT
    return {"angle": np.arctan2(arm[0, 0], -arm[0, 1]), "length": np.median(np.hypot(*arm.T))}


def _spring(found: Track, times: np.ndarray) -> dict[str, float]:
    x, y = found.position[:, 0].T
    middle = (x.min() + x.max()) / 2
    return {"x": middle, "y": np.median(y), "stretch": x[0] - middle}


def _slide(found: Track, times: np.ndarray) -> dict[str, float]:
    x, y = found.position[:, 0].T
    return {"x": x[0], "y": np.median(y), "vx": (x[2] - x[0]) / (times[2] - times[0])}


def _collision(found: Track, times: np.ndarray) -> dict[str, float]:
    (left, right), (left_later, right_later) = found.position[0, :, 0], found.position[4, :, 0]
    y, elapsed = np.median(found.position[..., 1]), times[4] - times[0]
    return {
        "left": left, "right": right, "y": y, "radius": found.radius,
        "v_left": (left_later - left) / elapsed, "v_right": (right_later - right) / elapsed,
    }  # fmt: skip


_STARTS: dict[str, Callable[[Track, np.ndarray], dict[str, float]]] = {
    "fall": _fall, "throw": _throw, "pendulum": _pendulum,
    "spring": _spring, "slide": _slide, "collision": _collision,
}  # fmt: skip


def measure(
    video: UInt8[np.ndarray, "T H W 3"] | Float[np.ndarray, "T H W 3"],
    phenomenon: str,
    camera: Camera = CAMERA,
) -> Measurement:
    """Measures the constants that `phenomenon` shows. Colours go from 0 to 255, also in float videos.

    A clip without such a body or motion gives a `Measurement` that is not `ok`.

    Raises:
        UserError: for an unknown phenomenon or a video that is not what `camera` takes.
    """
    if phenomenon not in PHENOMENA:
        raise UserError(
            f"unknown phenomenon {phenomenon!r}", expected=nearest(phenomenon, PHENOMENA, len(PHENOMENA))
        )
    expected = (camera.frames, camera.size, camera.size, 3)
    if video.shape != expected:
        raise UserError(
            "video and camera do not fit together", expected=f"shape {expected}", found=f"shape {video.shape}"
        )
    found = track(video.astype(np.float32), phenomenon, camera)
    if found.seen.mean() < 0.6:
        return Measurement(why=f"the body was found in {found.seen.mean():.0%} of the frames only")
    return fit(found, phenomenon, camera)


def fit(found: Track, phenomenon: str, camera: Camera = CAMERA) -> Measurement:
    """Fits a phenomenon's motion to a track: best of a coarse grid, then robust least squares.

    Constants are fitted as logarithms, so that their errors are relative and they stay positive.
    """
    times = camera.times
    start = _STARTS[phenomenon](found, times)
    names, constants = list(start), PHENOMENA[phenomenon]
    motion, trusted = MOTIONS[phenomenon], found.seen[..., None] * camera.scale

    def error_px(values: np.ndarray) -> np.ndarray:
        known = dict(zip(names, values[: len(names)], strict=True))
        laws = dict(zip(constants, np.exp(values[len(names) :]), strict=True))
        return ((motion(times, **known, **laws) - found.position) * trusted).ravel()

    grid = itertools.product(*[[np.log(RANGES[c].at(f)) for f in np.linspace(0, 1, 7)] for c in constants])
    guesses = [np.array([*start.values(), *laws]) for laws in grid]
    best = min(guesses, key=lambda guess: np.abs(error_px(guess)).sum())
    # Five times beyond the range on both sides: room to tell a wrong constant, none for overflow.
    limits = [(0.1 if name == "length" else -9.0, 9.0) for name in names]
    limits += [(np.log(RANGES[c].low / 5), np.log(RANGES[c].high * 5)) for c in constants]
    low, high = np.array(limits).T
    best = np.clip(best, low + 1e-6, high - 1e-6)
    robust = {"loss": "soft_l1", "f_scale": ROBUST_PX, "x_scale": "jac"}
    result = least_squares(error_px, best, bounds=(low, high), ftol=1e-6, max_nfev=60, **robust)

    error = error_px(result.x)
    count = found.seen.sum()
    residual = float(np.sqrt((error**2).sum() / count))
    scale = max(np.sqrt((error**2).sum() / max(2 * count - len(best), 1)), FLOOR_PX)
    # Every parameter is given an effect of 0.01 pixels, so that one without any gets a huge error, not none.
    effect = np.concatenate([result.jac, FLOOR_PX * np.eye(len(best))])
    sigma = scale * np.linalg.norm(np.linalg.pinv(effect), axis=1)[len(names) :]
    at_limit = np.minimum(result.x - low, high - result.x)[len(names) :] < 0.01
    sigma = np.where(at_limit | (sigma > SILENT), np.inf, sigma)
    if residual > LAWLESS_PX:
        why = f"the body strays {residual:.1f} pixels from any such motion"
    elif (sigma == np.inf).any():
        why = "the motion does not tell " + " or ".join(np.array(constants)[sigma == np.inf])
    else:
        why = ""
    return Measurement(
        constants=dict(zip(constants, np.exp(result.x[len(names) :]).tolist(), strict=True)),
        sigma=dict(zip(constants, sigma.tolist(), strict=True)),
        residual_px=residual,
        ok=not why,
        why=why,
    )
