"""The trials of the demo: new prompts about every planet, clips of one noise, references, and what is measured."""

import numpy as np
import pyarrow as pa
import pytest

from ditmem_jax.bank.lexical import LexicalEmbedder
from ditmem_jax.bank.search import Bank
from ditmem_jax.bank.table import Table
from ditmem_jax.demo import trials
from ditmem_jax.demo.trials import SAMPLED, Findings, Kind
from ditmem_jax.worlds.captions import caption
from ditmem_jax.worlds.laws import PHENOMENA, splits
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


def test_clips_follow_their_prompt_and_memory_alone(monkeypatch):
    """Every way of making a clip gets its own prompts and memory, but the same noise."""
    drawn = trials.draw(WORLDS, dict.fromkeys(PHENOMENA, 0) | {"fall": 7}, set(), seed=0)
    calls = []

    class Fake:
        def generate(self, prompts, seeds, references):
            calls.append((prompts, seeds, references))
            return np.array([[[[[seed % 256] * 3]]] for seed in seeds], np.uint8)

    def find(bank, prompts, k):
        names = [[f"{text.split()[2]} {rank}" for rank in range(k)] for text in prompts]
        return names, np.array([[[len(text)] * k] for text in prompts], np.float32)

    monkeypatch.setattr(trials.Sampler, "load", lambda config, encoder: Fake())
    monkeypatch.setattr(trials, "find", find)
    monkeypatch.setattr(trials.Bank, "open", lambda uri: None)
    monkeypatch.setattr(trials, "scores", lambda bank, prompts, ids: (prompts, ids))
    config = tiny_config("unused")
    clips, found = trials.make(config, "encoder", drawn)
    k = config.data.references
    prompts, others = found["scores.wrong"]
    assert prompts == [trial.prompt for trial in drawn] and others[0][0] == f"{drawn[0].other.name} 0"
    assert found["references"].tolist() == [
        [f"{trial.world.name} {rank}" for rank in range(k)] for trial in drawn
    ]
    assert all(len(clips[way]) == len(drawn) == 28 for way in SAMPLED)
    np.testing.assert_array_equal(clips["right"], clips["without"])
    by_way = dict(zip(SAMPLED, (calls[i : i + 2] for i in range(0, 8, 2)), strict=True))
    assert all(len(prompts) == trials.BATCH for prompts, _, _ in calls)
    assert by_way["without"][0][2] is None and by_way["stated"][0][2] is None
    assert by_way["right"][0][:2] == by_way["wrong"][0][:2] == by_way["without"][0][:2]
    assert by_way["stated"][0][0][0] == caption(drawn[0].clip, drawn[0].world.name, "numbers")


def test_scores_are_of_the_prompt_whatever_found_the_clips(tmp_path):
    captions = ["on planet zorvex a ball drops", "on planet quindara a ball drops", "a pendulum swings"]
    rows = {"id": ["a", "b", "c"], "caption": captions, "source": ["a.mp4", "b.mp4", "c.mp4"]}
    Table.create(tmp_path / "bank", LexicalEmbedder.fit(captions), pa.table(rows))
    found = trials.scores(Bank.open(tmp_path / "bank"), captions[:2], [["a", "b"], ["a", "c"]])
    assert found[0, 0] == pytest.approx(1, abs=0.1) and found[0, 1] == pytest.approx(found[1, 0])
    assert 1 > found[0, 1] > found[1, 1]


def test_how_alike_references_are():
    fall, throw, elsewhere = Kind("zorvex", "fall"), Kind("zorvex", "throw"), Kind("quindara", "fall")
    found = trials.alike([(fall, [fall, throw]), (throw, [throw, elsewhere])])
    assert found == {"planet": pytest.approx(3 / 4), "planet and phenomenon": pytest.approx(1 / 2)}


def test_real_clips_and_copies_measure_true(tmp_path):
    drawn = trials.draw(WORLDS[:2], dict.fromkeys(PHENOMENA, 0) | {"fall": 1}, set(), seed=0)
    real = np.stack([trial.clip.video for trial in drawn])
    clips = dict.fromkeys((*SAMPLED, "copy"), real) | {"wrong": np.zeros_like(real)}
    found = trials.examine(drawn, clips | {"copy": real[::-1]})
    assert found.constant.tolist() == ["gravity", "bounciness"] * 2
    np.testing.assert_allclose(found.measured["real"], found.true, rtol=0.1)
    np.testing.assert_allclose(found.measured["copy"], np.roll(found.true, 2), rtol=0.1)
    assert np.isnan(found.measured["wrong"]).all()
    found.save(tmp_path / "findings.npz")
    loaded = Findings.load(tmp_path / "findings.npz")
    for way in ("right", "copy"):
        np.testing.assert_array_equal(loaded.measured[way], found.measured[way])
