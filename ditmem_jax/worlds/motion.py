"""Motion under each law in closed form: times [T] (s) to positions [T, bodies, 2] (m; x right, y up).

Clips are made with these functions and measured by fitting them, so a constant has one meaning throughout.
"""

import numpy as np
from jaxtyping import Float
from scipy.special import ellipj, ellipk, lambertw

Times = Float[np.ndarray, " T"]
Path = Float[np.ndarray, "T bodies 2"]

PIVOT = (2.0, 3.6)  # where every pendulum hangs


def _path(x: float | Times, y: float | Times, times: Times) -> Path:
    return np.stack(np.broadcast_arrays(x, y, times)[:2], axis=-1)[:, None]


def fall(times: Times, *, x: float, y: float, rest: float, gravity: float, bounciness: float) -> Path:
    """Dropped from rest at height `y`; each bounce at height `rest` keeps `bounciness` of the speed."""
    drop_time = np.sqrt(2 * max(y - rest, 0.0) / gravity)
    # Bounce n (from 1) leaves the floor with speed g * drop_time * e^n and lasts 2 * drop_time * e^n.
    powers = bounciness ** np.arange(1, 64)
    landings = drop_time + np.concatenate([[0.0], np.cumsum(2 * drop_time * powers)])
    bounce = np.searchsorted(landings, times, side="right") - 1  # -1 before the first landing
    in_air = (bounce >= 0) & (bounce < len(powers))
    bounce = np.clip(bounce, 0, len(powers) - 1)
    since = np.where(in_air, times - landings[bounce], 0.0)
    bounced = rest + gravity * drop_time * powers[bounce] * since - gravity * since**2 / 2
    height = np.where(times < drop_time, y - gravity * times**2 / 2, np.maximum(bounced, rest))
    return _path(x, height, times)


def throw(
    times: Times, *, x: float, y: float, rest: float, vx: float, vy: float, gravity: float, drag: float
) -> Path:
    """Thrown with velocity (vx, vy) through air; where it comes down to height `rest` it stays."""
    terminal = gravity / drag
    reach = (vy + terminal) / drag
    # y + reach * (1 - exp(-drag t)) - terminal * t = rest, solved for its later root by Lambert's W.
    # A path that stays below `rest` has none; -1/e, the double root, then stops it at its highest point.
    level = (y - rest + reach) / terminal
    argument = -reach / terminal * drag * np.exp(np.minimum(-drag * level, 50.0))
    landing = max(0.0, level + lambertw(max(argument, 1e-12 - 1 / np.e)).real / drag)
    t = np.minimum(times, landing)
    decay = -np.expm1(-drag * t)
    return _path(x + vx / drag * decay, y + reach * decay - terminal * t, times)


def pendulum(
    times: Times, *, angle: float, length: float, gravity: float, pivot: tuple[float, float] = PIVOT
) -> Path:
    """Released from rest at `angle` (radians from straight down, right is positive); exact for any angle."""
    modulus = np.sin(angle / 2) ** 2
    _, cn, dn, _ = ellipj(np.sqrt(gravity / length) * times, modulus)
    now = 2 * np.arcsin(np.sin(angle / 2) * cn / dn)
    return _path(pivot[0] + length * np.sin(now), pivot[1] - length * np.cos(now), times)


def pendulum_period(angle: float, length: float, gravity: float) -> float:
    """Seconds from release until the bob is back."""
    return float(4 * np.sqrt(length / gravity) * ellipk(np.sin(angle / 2) ** 2))


def spring(times: Times, *, x: float, y: float, stretch: float, stiffness: float) -> Path:
    """Released from rest `stretch` metres right of the equilibrium `x`; horizontal, undamped."""
    return _path(x + stretch * np.cos(np.sqrt(stiffness) * times), y, times)


def slide(times: Times, *, x: float, y: float, vx: float, friction: float) -> Path:
    """Pushed off with speed `vx`; slows by `friction` (m/s^2) until it stops."""
    t = np.minimum(times, abs(vx) / friction)
    return _path(x + vx * t - np.sign(vx) * friction * t**2 / 2, y, times)


def collision(
    times: Times,
    *,
    left: float,
    right: float,
    y: float,
    v_left: float,
    v_right: float,
    radius: float,
    bounciness: float,
) -> Path:
    """Two equal masses meet head-on: momentum is kept, `bounciness` of the closing speed comes back."""
    meeting = (right - left - 2 * radius) / max(v_left - v_right, 1e-3)  # if ever
    before, after = np.minimum(times, meeting), np.maximum(times - meeting, 0.0)
    mean, half = (v_left + v_right) / 2, bounciness * (v_left - v_right) / 2
    a = left + v_left * before + (mean - half) * after
    b = right + v_right * before + (mean + half) * after
    return np.concatenate([_path(a, y, times), _path(b, y, times)], axis=1)


MOTIONS = {
    "fall": fall,
    "throw": throw,
    "pendulum": pendulum,
    "spring": spring,
    "slide": slide,
    "collision": collision,
}
