"""From measured constants to a table: errors of the law, their spread, and what they say.

The error of a clip is |ln(measured / true)|: 0.1 is about 10 %. Clips of one planet are alike, so all spreads come
from drawing planets, not clips, anew (bootstrap).
"""

import dataclasses
import math

import numpy as np

from ditmem_jax.demo.trials import ALL, SAMPLED, Findings
from ditmem_jax.evaluate.laws import guess, law_error
from ditmem_jax.worlds.laws import RANGES

DRAWS = 4000
AIM = 0.7  # of the error without memory


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        clips: how many measurements are compared: those where all ways of making gave one; `of`: of how many.
        measured: how many each way gave.
        error: mean error and its standard error, by way; "guess" is that of always naming the middle of a constant's
            range, "copy" that of showing the nearest reference instead, where this tells the constant.
        ratio: error with right and with wrong memory over the error without: value, and 95 % interval.
        correlation: of measured and true constants, by way; "other" is that of clips with wrong memory with the
            constants of the planet that this memory is from.
        guess: the mean error of "guess".
        over_guess: error with right memory over that of "guess": value, and 95 % interval.
    """

    name: str
    clips: int
    of: int
    measured: dict[str, int]
    error: dict[str, tuple[float, float]]
    ratio: dict[str, tuple[float, float, float]]
    correlation: dict[str, float]
    guess: float
    over_guess: tuple[float, float, float]


def rows(findings: Findings) -> list[Row]:
    """All constants together, gravity from falls, each constant."""
    everything = np.ones(len(findings.constant), bool)
    kinds = {"all constants": everything}
    kinds |= {"gravity (falls)": (findings.constant == "gravity") & (findings.phenomenon == "fall")}
    kinds |= {constant: findings.constant == constant for constant in RANGES}
    return [_row(name, findings, chosen) for name, chosen in kinds.items()]


def relevance(
    findings: Findings, scores: dict[str, np.ndarray], min_score: float
) -> dict[str, dict[str, float]]:
    """Compare clips that read all references with clips that read those that fit, by right and wrong memory.

    Returns of each the lowest and the highest score, the share of references that are read, and the mean error of all
    constants: if all are read, as shipped and without memory. A clip without any of its references is the one without
    memory; one with some is counted as if it read them all.

    Args:
        scores: by way, of each trial and reference for the prompt.
        min_score: of references that are read.
    """
    compared = np.all([np.isfinite(findings.measured[way]) for way in SAMPLED], axis=0)
    error = {way: law_error(findings.measured[way], findings.true) for way in SAMPLED}
    found = {}
    for way, score in scores.items():
        fits = score >= min_score
        read = np.any(fits, axis=1)[findings.trial]
        shipped = np.where(read, error[way], error["without"])
        found[way] = {"lowest": float(score.min()), "highest": float(score.max()), "read": float(fits.mean())}
        for name, x in (("all read", error[way]), ("shipped", shipped), ("without", error["without"])):
            found[way][name] = float(np.mean(x, where=compared)) if compared.any() else math.nan
    return found


def _row(name: str, findings: Findings, chosen: np.ndarray) -> Row:
    compared = chosen & np.all([np.isfinite(findings.measured[way]) for way in SAMPLED], axis=0)
    true, other, world = (values[compared] for values in (findings.true, findings.other, findings.world))
    constants = findings.constant[compared]
    measured = {way: findings.measured[way][compared] for way in SAMPLED}
    middles = np.array([guess(constant) for constant in constants])
    values = measured | {"guess": middles}
    mean, means = _bootstrap(np.stack([law_error(one, true) for one in values.values()], axis=1), world)
    error = {way: (float(mean[i]), float(means[:, i].std(ddof=1))) for i, way in enumerate(values)}
    copy = findings.measured["copy"][compared]
    told = np.isfinite(copy)
    copy_mean, copy_means = _bootstrap(np.asarray(law_error(copy[told], true[told]))[:, None], world[told])
    error["copy"] = (float(copy_mean[0]), float(copy_means.std(ddof=1)))

    def over(way: str, base: str) -> tuple[float, float, float]:
        one, other = (list(values).index(name) for name in (way, base))
        low, high = np.percentile(means[:, one] / means[:, other], [2.5, 97.5])
        return float(mean[one] / mean[other]), float(low), float(high)

    place = {way: _places(constants, values) for way, values in measured.items()}
    correlation = {way: _correlation(place[way], _places(constants, true)) for way in SAMPLED}
    correlation["other"] = _correlation(place["wrong"], _places(constants, other))
    return Row(
        name,
        clips=int(compared.sum()),
        of=int(chosen.sum()),
        measured={way: int(np.isfinite(findings.measured[way][chosen]).sum()) for way in ALL},
        error=error,
        ratio={way: over(way, "without") for way in ("right", "wrong")},
        correlation=correlation,
        guess=error["guess"][0],
        over_guess=over("right", "guess"),
    )


def _bootstrap(errors: np.ndarray, world: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means [way] of errors [clip, way], and means [draw, way] over planets drawn with replacement."""
    worlds = np.unique(world)
    if not len(worlds):
        return np.full(errors.shape[1], np.nan), np.full((DRAWS, errors.shape[1]), np.nan)
    member = (world[None] == worlds[:, None]).astype(float)
    sums, counts = member @ errors, member.sum(axis=1)
    times = np.random.default_rng(0).multinomial(len(worlds), np.full(len(worlds), 1 / len(worlds)), DRAWS)
    return errors.mean(axis=0), (times @ sums) / (times @ counts)[:, None]


def _places(constants: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where values lie in the ranges of their constants, on a logarithmic scale: comparable among constants."""
    spans = [(math.log(RANGES[constant].low), math.log(RANGES[constant].high)) for constant in constants]
    low, high = np.array(spans).reshape(-1, 2).T
    return (np.log(values) - low) / (high - low)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def finding(row: Row, references: int) -> str:
    """One sentence about all constants together, whichever way it turned out."""
    if row.clips < 3:
        return (
            f"Nothing can be said: of {row.of} constants only {row.clips} could be measured in every version."
        )
    (ratio, low, high), (other, other_low, other_high) = row.ratio["right"], row.ratio["wrong"]
    shown = f"shown {'one clip' if references == 1 else f'{references} clips'} of a planet it never saw"
    if high < 1 and ratio <= AIM:
        text = f"{shown}, the frozen model takes on its laws: the error falls to {percent(ratio)} of that without memory"
    elif high < 1:
        text = f"{shown}, the frozen model takes on a little of its laws: the error falls to {percent(ratio)} of that "
        text += f"without memory, short of the {percent(AIM)} aimed at"
    elif low > 1:
        text = (
            f"the memory does harm: {shown}, the error of the frozen model's laws rises to {percent(ratio)}"
        )
    else:
        text = f"no effect of the memory can be told: {shown}, the frozen model errs in its laws by {percent(ratio)} "
        text += "of what it errs without memory"
    if other_high < 1:
        text += (
            f"; but another planet's clips lower it too, to {percent(other)}, so not all of this is knowledge"
        )
    elif other_low > 1:
        text += f"; another planet's clips raise it to {percent(other)}"
    else:
        text += f"; another planet's clips do not help ({percent(other)})"
    return text[0].upper() + text[1:] + "."


def evidence(row: Row, planets: int) -> str:
    """The numbers behind the finding."""
    if not row.clips:
        return "There is nothing to compare."
    (without, spread), right, wrong = row.error["without"], row.error["right"], row.error["wrong"]
    ratio, low, high = row.ratio["right"]
    return (
        f"Over {row.clips} constants in clips of {planets} unseen planets the error |ln(measured / true)| is "
        f"{without:.2f} ± {spread:.2f} without memory, {right[0]:.2f} ± {right[1]:.2f} with the right planet's clips "
        f"and {wrong[0]:.2f} ± {wrong[1]:.2f} with a wrong planet's. Right over none: {ratio:.2f}, 95 % interval "
        f"{low:.2f} to {high:.2f}. Always naming the middle of the range errs by {row.guess:.2f}; the nearest "
        f"reference itself, shown as it is, by {row.error['copy'][0]:.2f}."
    )


def percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"
