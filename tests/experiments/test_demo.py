"""The demo: its trials, the arithmetic of its table against hand-made numbers, its sentences, its page, its steps."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from ditmem_jax.config import to_dict
from ditmem_jax.errors import UserError
from ditmem_jax.worlds import PHENOMENA, caption, splits
from experiments.demo import score, show, trials
from experiments.demo.__main__ import FEW, Demo
from experiments.demo.trials import ALL, SAMPLED, Findings
from tests.tiny import tiny_config

WORLDS = splits(0, unseen=4).unseen
ONCE = dict.fromkeys(PHENOMENA, 1)


def test_trials_are_new_prompts_about_every_planet():
    first = trials.draw(WORLDS, ONCE | {"fall": 2}, set(), seed=0)
    assert len(first) == 4 * 7 and len({trial.seed for trial in first}) == 4 * 7
    assert all(trial.other != trial.world and trial.world.name in trial.prompt.split() for trial in first)
    assert all(
        trial.stated != trial.prompt and trial.clip.truth == trial.world.shown_by(trial.phenomenon)
        for trial in first
    )
    again = trials.draw(WORLDS, ONCE | {"fall": 2}, {first[0].prompt}, seed=0)
    assert again[0].prompt != first[0].prompt
    assert [trial.prompt for trial in again[7:]] == [trial.prompt for trial in first[7:]]
    assert first[0].asks_other == first[0].prompt.replace(first[0].world.name, first[0].other.name)


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
    )
    everything, row = score.rows(found)[:2]
    assert (everything.name, row.name) == ("all constants", "gravity (falls)")
    assert everything.error == row.error  # there is nothing else
    assert (row.clips, row.of) == (3, 4)
    assert row.measured == {"real": 4, "without": 4, "right": 4, "wrong": 3, "stated": 4}
    assert row.error["without"][0] == pytest.approx(4 / 3)
    assert row.error["right"][0] == pytest.approx(1 / 3)
    assert row.ratio["right"][0] == pytest.approx(1 / 4)
    assert row.error["stated"] == (0, 0) and row.correlation["stated"] == pytest.approx(1)
    middle = math.sqrt(2 * 12)
    assert row.guess == pytest.approx(np.mean([abs(math.log(middle / g)) for g in (2, 4, 8)]))


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
    console = Console(width=80)
    with console.capture() as text:
        show.print_tables(console, rows)
    assert "nan" not in text.get()


def row(ratio, low, high, other, other_low, other_high) -> score.Row:
    ratios = {"right": (ratio, low, high), "wrong": (other, other_low, other_high)}
    numbers = dict.fromkeys(SAMPLED, (0.5, 0.1))
    return score.Row("gravity (falls)", 48, 48, {}, numbers, ratios, {}, 0.4)


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


def test_real_clips_measure_true_and_page_shows_them(tmp_path):
    drawn = trials.draw(WORLDS[:2], dict.fromkeys(PHENOMENA, 0) | {"fall": 1}, set(), seed=0)
    real = np.stack([trial.clip.video for trial in drawn])
    clips = dict.fromkeys(SAMPLED, real) | {"wrong": np.zeros_like(real)}
    found = trials.examine(drawn, clips)
    assert found.constant.tolist() == ["gravity", "bounciness"] * 2
    np.testing.assert_allclose(found.measured["real"], found.true, rtol=0.1)
    assert np.isnan(found.measured["wrong"]).all()
    found.save(tmp_path / "findings.npz")
    loaded = Findings.load(tmp_path / "findings.npz")
    np.testing.assert_array_equal(loaded.measured["right"], found.measured["right"])

    (tmp_path / "metrics.csv").write_text("step,objective,loss,gain\n10,1,0.5,0.1\n20,1,0.4,0.2\n")
    (tmp_path / "validation.csv").write_text("step,gain,gain_wrong\n0,0,0\n20,0.1,-0.1\n")
    rows = score.rows(loaded)
    result = {
        "finding": "What was found.", "retrieved": 0.5, "leaked": 0, "config": to_dict(tiny_config(tmp_path)), "commands": ["python -m x"],
        "settings": {"steps": 3}, "seconds": {"train": 1.0}, "machine": {"cores": 2},
    }  # fmt: skip
    page = show.make_page(result, rows, loaded, drawn, clips, tmp_path)
    assert page.count("<canvas") == 2 * 4 and page.count("not measurable") == 2
    assert (
        "What was found." in page
        and drawn[0].world.name.capitalize() in page
        and not re.search(r"\bnan\b", page)
    )


def test_clips_follow_their_prompt_and_memory_alone(monkeypatch):
    """Every way of making a clip gets its own prompts and memory, but the same noise."""
    drawn = trials.draw(WORLDS, dict.fromkeys(PHENOMENA, 0) | {"fall": 7}, set(), seed=0)
    calls = []

    class Fake:
        def generate(self, prompts, seeds, references):
            calls.append((prompts, seeds, references))
            return np.array([[[[[seed % 256] * 3]]] for seed in seeds], np.uint8)

    def find(bank, prompts, k):
        names = [[text.split()[2]] * k for text in prompts]
        return names, np.array([[[len(text)] * k] for text in prompts], np.float32)

    monkeypatch.setattr(trials.Sampler, "load", lambda config, encoder: Fake())
    monkeypatch.setattr(trials, "find", find)
    config = tiny_config("unused")
    clips, retrieved = trials.make(config, "encoder", drawn)
    assert retrieved == 1
    assert all(len(clips[way]) == len(drawn) == 28 for way in SAMPLED)
    np.testing.assert_array_equal(clips["right"], clips["without"])
    by_way = dict(zip(SAMPLED, (calls[i : i + 2] for i in range(0, 8, 2)), strict=True))
    assert all(len(prompts) == trials.BATCH for prompts, _, _ in calls)
    assert by_way["without"][0][2] is None and by_way["stated"][0][2] is None
    assert by_way["right"][0][:2] == by_way["wrong"][0][:2] == by_way["without"][0][:2]
    assert by_way["stated"][0][0][0] == caption(drawn[0].clip, drawn[0].world.name, "numbers")


def test_steps_are_taken_once_and_folders_are_not_mixed(tmp_path):
    config, console = tiny_config(tmp_path), Console(quiet=True)
    demo = Demo(tmp_path / "demo", config, FEW, [], console)
    taken = []
    demo._step("worlds", lambda: taken.append(1), lambda: demo.commands.append("python -m x"))
    again = Demo(tmp_path / "demo", config, FEW, [], console)
    again._step("worlds", lambda: taken.append(2))
    assert (
        taken == [1] and again.commands == demo.commands == ["python -m x"] and again.seconds == demo.seconds
    )
    with pytest.raises(UserError, match="other settings"):
        Demo(tmp_path / "demo", config, dataclasses.replace(FEW, steps=21), [], console)
    assert json.loads((tmp_path / "demo" / "settings.json").read_text())["steps"] == 20
