"""The arithmetic of the demo's table against hand-made numbers, and its sentences."""

import math

import numpy as np
import pytest

from ditmem_jax.demo import score
from ditmem_jax.demo.trials import ALL, SAMPLED, Findings


def findings(true, **measured) -> Findings:
    """Falls, one planet each, of gravities `true`."""
    count = len(true)
    true = np.array(true, float)
    other = np.roll(true, 1)
    values = {way: np.array(measured.get(way, true), float) for way in ALL}
    names = np.full(count, "fall"), np.full(count, "gravity")
    return Findings(np.arange(count), np.arange(count), *names, true, other, values)


def test_errors_by_hand():
    e = math.e
    found = findings(
        [2.0, 4.0, 8.0, 5.0],
        without=[2.0 * e, 4.0 / e, 8.0 * e**2, 5.0],
        right=[2.0 * e**0.5, 4.0, 8.0 * e**-0.5, 5.0],
        wrong=[2.0, 4.0, 8.0, math.nan],
        copy=[2.0 / e, math.nan, 8.0, 5.0 * e**9],
    )
    everything, row = score.rows(found)[:2]
    assert (everything.name, row.name) == ("all constants", "gravity (falls)")
    assert everything.error == row.error  # there is nothing else
    assert (row.clips, row.of) == (3, 4)
    assert row.measured == {"real": 4, "without": 4, "right": 4, "wrong": 3, "stated": 4, "copy": 3}
    assert row.error["without"][0] == pytest.approx(4 / 3)
    assert row.error["right"][0] == pytest.approx(1 / 3)
    assert row.ratio["right"][0] == pytest.approx(1 / 4)
    assert row.error["stated"] == (0, 0) and row.correlation["stated"] == pytest.approx(1)
    assert row.error["copy"][0] == pytest.approx(
        1 / 2
    )  # of the clips that are compared, the two that tell it
    middle = math.sqrt(2 * 12)
    guess = np.mean([abs(math.log(middle / g)) for g in (2, 4, 8)])
    assert row.guess == row.error["guess"][0] == pytest.approx(guess)
    assert row.over_guess[0] == pytest.approx(1 / 3 / guess)
    assert row.over_guess[1] < row.over_guess[0] < row.over_guess[2]


def test_without_references_that_fit_a_clip_is_the_one_without_memory():
    e = math.e
    found = findings(
        [2.0, 4.0, 8.0], without=[2.0 * e, 4.0 * e, math.nan], wrong=[2.0 * e**3, 4.0 * e**2, 8.0]
    )
    scores = {"wrong": np.array([[0.1, 0.4], [0.5, 0.2], [0.6, 0.9]])}
    wrong = score.relevance(found, scores, 0.5)["wrong"]
    means = {"read": 1 / 2, "all read": 5 / 2, "shipped": 3 / 2, "without": 1}
    assert wrong == pytest.approx({"lowest": 0.1, "highest": 0.9} | means)


def test_copies_that_tell_nothing_cost_no_clip():
    row = score.rows(findings([2.0, 4.0], without=[4.0, 8.0], copy=[math.nan, math.nan]))[0]
    assert row.clips == 2 and math.isnan(row.error["copy"][0]) and row.ratio["right"][0] == 0


def test_spread_is_that_of_planets():
    # Ten clips of each of two planets, alike within: drawing planets anew gives 0, 1/2 or 1, with odds 1 : 2 : 1.
    errors, world = np.repeat([[0.0], [1.0]], 10, axis=0), np.repeat([3, 7], 10)
    mean, means = score._bootstrap(errors, world)
    assert mean == 0.5
    assert means.std() == pytest.approx(math.sqrt(1 / 8), rel=0.05)


def test_rows_without_anything_to_compare():
    rows = score.rows(findings([2.0, 4.0], right=[math.nan, math.nan]))
    assert [row.clips for row in rows] == [0] * 7
    assert score.finding(rows[0], 3).startswith("Nothing can be said")


def row(ratio, low, high, other, other_low, other_high) -> score.Row:
    ratios = {"right": (ratio, low, high), "wrong": (other, other_low, other_high)}
    numbers = dict.fromkeys((*SAMPLED, "guess", "copy"), (0.5, 0.1))
    return score.Row("gravity (falls)", 48, 48, {}, numbers, ratios, {}, 0.4, (0.8, 0.7, 0.9))


@pytest.mark.parametrize(
    ("numbers", "says", "silent"),
    [
        ((0.4, 0.3, 0.5, 1.1, 0.9, 1.3), ["takes on its laws", "40 %", "do not help (110 %)"], ["short of"]),
        ((0.4, 0.3, 0.5, 1.5, 1.2, 1.9), ["takes on its laws", "raise it to 150 %"], ["do not help"]),
        ((0.4, 0.3, 0.5, 0.6, 0.5, 0.8), ["lower it too", "not all of this is knowledge"], []),
        ((0.8, 0.7, 0.9, 1.0, 0.9, 1.1), ["a little of its laws", "short of the 70 % aimed at"], ["takes on its"]),
        ((0.6, 0.3, 1.1, 1.0, 0.9, 1.1), ["No effect of the memory can be told"], ["takes on", "falls"]),
        ((1.3, 1.1, 1.5, 1.0, 0.9, 1.1), ["The memory does harm"], ["takes on", "falls"]),
    ],
)  # fmt: skip
def test_finding_claims_no_more_than_the_numbers(numbers, says, silent):
    text = score.finding(row(*numbers), 3)
    assert all(part in text for part in says) and not any(part in text for part in silent)
    assert text.endswith(".") and text[0].isupper()
