"""The evidence: its arms are configurations, its claims say where they come from, its page says how old they are."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import ditmem_jax as dm
from experiments.evidence.__main__ import sources
from experiments.evidence.arms import ARMS
from experiments.evidence.claims import AIMS, claims, errors, harm, ratio

FOLDER = Path(__file__).parents[2] / "experiments/evidence"
RESULTS = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_a_configuration(name):
    base = dm.load_config("tiny")
    assert ARMS[name].config(base).run.out == base.run.out


@pytest.mark.parametrize("claim", RESULTS["claims"], ids=lambda c: f"{c['planets']} {c['arm']} {c['name']}")
def test_a_claim_says_where_it_comes_from(claim):
    assert {
        "name",
        "value",
        "arm",
        "planets",
        "seeds",
        "steps",
        "commit",
        "digests",
        "device",
    } <= claim.keys()


def test_every_aim_is_reported():
    reported = {claim["name"] for claim in RESULTS["claims"] if claim["planets"].startswith("report")}
    assert reported >= {*AIMS, "harm_percent"}


def test_the_page_says_at_which_commit_numbers_of_older_files_were_measured():
    older = {claim["commit"] for claim in RESULTS["claims"] if claim["digests"] != sources()}
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert older <= set(re.findall(r"measured at\s+`(\w+)`", page))


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr("experiments.evidence.claims.DRAWS", 20)


ROWS = [(0, "fall", "gravity", 10.0), (1, "bounce", "bounciness", 0.5), (2, "fall", "gravity", 5.0)]
PLANET = np.array([0, 0, 1])


def told(factor):
    """Constants that are off by a factor, for two seeds."""
    return [[{constant: factor * true} for _, _, constant, true in ROWS]] * 2


def test_ratios_of_mean_errors():
    found = errors(ROWS, {"none": told(4.0), "right": told(2.0), "wrong": told(4.0)})
    measured = ratio(found, PLANET, np.ones(3, bool), "right", "none")
    assert measured["value"] == pytest.approx(0.5) and measured["compared"] == 6
    assert (measured["low"], measured["high"]) == pytest.approx((0.5, 0.5))
    by_name = {claim["name"]: claim for claim in claims(ROWS, PLANET, found)}
    assert by_name["wrong_over_none"]["value"] == pytest.approx(1) and by_name["wrong_over_none"]["met"]
    assert not by_name["right_over_none"]["met"] and by_name["fall_gravity_over_guess"]["compared"] == 4


def test_what_one_way_does_not_tell_is_compared_for_none():
    silent = told(2.0)
    silent[0] = [{}, *silent[0][1:]]
    found = errors(ROWS, {"none": told(4.0), "right": silent})
    assert ratio(found, PLANET, np.ones(3, bool), "right", "none")["compared"] == 5


def test_harm_is_the_worst_level():
    losses = np.ones((2, 3, 4, 2))  # seeds, levels, clips, without and with
    losses[:, 1, :, 1] = 1.03
    losses[:, 2, :, 1] = 0.5
    found = harm(losses, (0.1, 0.4, 0.9))
    assert found["value"] == found["up to 0.4"] == pytest.approx(3.0) and not found["met"]
