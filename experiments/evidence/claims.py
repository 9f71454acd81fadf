"""From measured constants to claims: ratios of mean law errors, with intervals over planets and seeds.

The error of a clip is |ln(measured / true)|. Ratios are of means pooled over seeds; intervals come from drawing planets
and seeds anew (bootstrap). Only constants that every way of making a clip tells are compared.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from ditmem_jax.worlds.laws import RANGES

DRAWS = 4000


def errors(rows: list[tuple], told: dict[str, list[list[dict]]]) -> dict[str, np.ndarray]:
    """Errors [seeds, rows] by way, NaN where a clip does not tell the constant; and of the guess.

    Args:
        rows: (trial, phenomenon, constant, true value).
        told: by way, for each seed, what the clip of each trial tells.
    """
    found = {}
    for way, seeds in told.items():
        found[way] = np.array(
            [
                [abs(math.log(seed[t][c] / true)) if c in seed[t] else np.nan for t, _, c, true in rows]
                for seed in seeds
            ]
        )
    guess = [abs(math.log(RANGES[constant].at(0.5) / true)) for _, _, constant, true in rows]
    found["guess"] = np.tile(guess, (len(next(iter(found.values()))), 1))
    return found


def ratio(
    found: dict[str, np.ndarray], planet: np.ndarray, chosen: np.ndarray, over: str, under: str
) -> dict:
    """Mean error of way `over` by that of `under`: value, 95 % interval, and how much was compared."""
    ways = [found[way] for way in found if way != "copy"]
    compared = np.all([np.isfinite(x) for x in ways], axis=0) & chosen[None]
    a, b = (np.where(compared, found[way], 0.0) for way in (over, under))
    worlds = np.unique(planet)
    member = (planet[None] == worlds[:, None]).astype(float)  # [worlds, rows]
    top, bottom, counts = (x @ member.T for x in (a, b, compared.astype(float)))  # [seeds, worlds]
    if not (total := counts.sum()):
        return {"value": np.nan, "low": np.nan, "high": np.nan, "compared": 0}
    rng, seeds = np.random.default_rng(0), len(a)
    draws = []
    for _ in range(DRAWS):
        some = rng.integers(0, len(worlds), len(worlds))
        row = rng.integers(0, seeds, seeds)
        draws.append(top[np.ix_(row, some)].sum() / bottom[np.ix_(row, some)].sum())
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "value": top.sum() / bottom.sum(), "low": low, "high": high, "compared": int(total),
        over: a.sum() / total, under: b.sum() / total,
    }  # fmt: skip


AIMS: dict[str, tuple[Callable[[tuple], bool], str, str, float]] = {
    "right_over_none": (lambda row: True, "right", "none", 0.35),
    "right_over_guess": (lambda row: True, "right", "guess", 0.45),
    "fall_gravity_over_guess": (lambda row: row[1:3] == ("fall", "gravity"), "right", "guess", 0.6),
    "bounciness_over_guess": (lambda row: row[2] == "bounciness", "right", "guess", 0.75),
    "wrong_over_none": (lambda row: True, "wrong", "none", 1.02),
}


def claims(rows: list[tuple], planet: np.ndarray, found: dict[str, np.ndarray]) -> list[dict]:
    """Every claim about clips, the aims first."""
    out = []
    for name, (choose, over, under, target) in AIMS.items():
        if {over, under} <= found.keys():
            chosen = np.array([choose(row) for row in rows])
            measured = ratio(found, planet, chosen, over, under)
            out.append({"name": name, "target": target, "met": measured["value"] <= target} | measured)
    for constant in RANGES:
        chosen = np.array([row[2] == constant for row in rows])
        for way in ("right", "other kind"):
            if way in found:
                out.append(
                    {"name": f"{constant}: {way} over guess"} | ratio(found, planet, chosen, way, "guess")
                )
    everything = np.ones(len(rows), bool)
    if "believed" in found:
        out.append({"name": "wrong over believed"} | ratio(found, planet, everything, "wrong", "believed"))
    for way in ("stated", "other kind", "wrong"):
        if way in found:
            out.append({"name": f"{way} over guess"} | ratio(found, planet, everything, way, "guess"))
    return out


def harm(losses: np.ndarray, levels: Sequence[float]) -> dict:
    """By how much the loss with memory exceeds that without, in percent, by level: ratio of means; and the worst."""
    means = losses.mean(axis=(0, 2))  # [levels, (without, with)]
    percent = 100 * (means[:, 1] / means[:, 0] - 1)
    by_level = {f"{level:g}": round(float(x), 2) for level, x in zip(levels, percent, strict=True)}
    low = max(x for level, x in by_level.items() if float(level) <= 0.4)
    return {"name": "harm_percent", "value": max(by_level.values()), "up to 0.4": low, "target": 1.0,
            "met": low <= 1.0, "levels": by_level}  # fmt: skip
