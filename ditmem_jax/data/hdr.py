"""High dynamic range to what an ordinary screen shows: BT.2020 with the curves PQ or HLG to BT.709.

As FFmpeg's `zscale=t=linear:npl=203,zscale=p=bt709,tonemap=mobius:desat=0,zscale=t=bt709`, which few builds have whole.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

Curve = Literal["pq", "hlg"]
CURVES: dict[int, Curve] = {16: "pq", 18: "hlg"}  # by FFmpeg's numbers of transfer functions
WHITE = 203.0  # nits of paper (BT.2408)
PEAK = 1000.0  # nits of the brightest light that is told from others
LINEAR_TO = 0.3  # share of white up to which light stays as it is, FFmpeg's default
LUMA = np.array([0.2627, 0.678, 0.0593], np.float32)
TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)


def to_sdr(signal: Float[np.ndarray, "*shape 3"], curve: Curve) -> UInt8[np.ndarray, "*shape 3"]:
    """RGB signals from 0 to 1 in BT.2020 as sRGB-like pixels for a screen of gamma 2.4 (BT.1886).

    The curves are those of BT.2100, HLG for a screen of 1000 nits. Light above `LINEAR_TO` of white is compressed along
    a Möbius curve by the largest of the three colours, which keeps hues.
    """
    signal = np.clip(signal, 0, 1).astype(np.float32)
    light = (_pq(signal) if curve == "pq" else _hlg(signal)) / WHITE
    light = np.maximum(light @ TO_709.T, 0)
    largest = light.max(-1, keepdims=True)
    light *= _mobius(largest) / np.maximum(largest, 1e-6)
    return np.rint(255 * np.clip(light, 0, 1) ** (1 / 2.4)).astype(np.uint8)


def _pq(signal: np.ndarray) -> np.ndarray:
    """Nits of a PQ signal (BT.2100, table 4)."""
    x = signal ** (1 / 78.84375)
    return 10000 * (np.maximum(x - 0.8359375, 0) / (18.8515625 - 18.6875 * x)) ** (1 / 0.1593017578125)


def _hlg(signal: np.ndarray) -> np.ndarray:
    """Nits of an HLG signal on a screen of 1000 nits (BT.2100, table 5)."""
    bright = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    scene = np.where(signal <= 0.5, signal**2 / 3, bright)
    return 1000 * scene * np.maximum(scene @ LUMA, 1e-9)[..., None] ** 0.2


def _mobius(x: np.ndarray) -> np.ndarray:
    """x up to LINEAR_TO, then along (x + a) / (x + b) to 1 at the peak, smoothly."""
    j, peak = LINEAR_TO, PEAK / WHITE
    a = -j * j * (peak - 1) / (j * j - 2 * j + peak)
    b = (j * j - 2 * j * peak + peak) / (peak - 1)
    scale = (b * b + 2 * b * j + j * j) / (b - a)
    return np.where(x <= j, x, scale * (x + a) / (x + b))
