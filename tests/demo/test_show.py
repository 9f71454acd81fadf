"""The demo's tables in the terminal, and its page."""

import math
import re

import numpy as np
import pytest
from rich.console import Console

from ditmem_jax.config import to_dict
from ditmem_jax.demo import score, show, trials
from ditmem_jax.demo.trials import SAMPLED
from ditmem_jax.worlds.laws import PHENOMENA, splits
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def measured():
    """Two falls, their clips by way of making, and what these show; those of wrong memory show nothing."""
    worlds = splits(0, unseen=4).unseen[:2]
    drawn = trials.draw(worlds, dict.fromkeys(PHENOMENA, 0) | {"fall": 1}, set(), seed=0)
    real = np.stack([trial.clip.video for trial in drawn])
    clips = dict.fromkeys((*SAMPLED, "copy"), real) | {"wrong": np.zeros_like(real)}
    return drawn, clips, trials.examine(drawn, clips)


def result(folder):
    alike = {"planet": 0.75, "planet and phenomenon": 0.5}
    read = {"read": 1.0, "all read": 0.25, "shipped": 0.25, "without": 0.5}
    return {
        "finding": "What was found.", "leaked": 0, "config": to_dict(tiny_config(folder)), "commands": ["python -m x"],
        "settings": {"steps": 3}, "seconds": {"train": 1.0}, "machine": {"cores": 2},
        "references": {"training": alike | {"left_out": {"itself": 7, "same source": 0}}, "prompts": alike | {"planet": 1.0}},
        "relevance": {"right": read, "wrong": read | {"read": 0.0, "all read": 0.75, "shipped": 0.5}},
    }  # fmt: skip


def test_page_shows_the_clips(measured, tmp_path):
    drawn, clips, found = measured
    (tmp_path / "metrics.csv").write_text("step,objective,loss,gain\n10,1,0.5,0.1\n20,1,0.4,0.2\n")
    (tmp_path / "validation.csv").write_text("step,gain,gain_wrong\n0,0,0\n20,0.1,-0.1\n")
    page = show.make_page(result(tmp_path), score.rows(found), found, drawn, clips, tmp_path)
    assert page.count("<canvas") == 2 * 4 and page.count("not measurable") == 2
    assert (
        "What was found." in page
        and drawn[0].world.name.capitalize() in page
        and not re.search(r"\bnan\b", page)
    )


def test_what_does_not_fit_is_told(tmp_path):
    text = show.relevance(result(tmp_path))
    assert "0 % of the wrong" in text and "errs by 0.50 (0.50 without memory, 0.75 if it is read" in text


def test_how_references_differ_is_told(tmp_path):
    text = show.references(result(tmp_path))
    assert "(itself 7 times)" in text and "same source" not in text
    assert "75.0 % of them in training and 100.0 % for the prompts" in text


@pytest.mark.parametrize("wrong", [1.0, math.nan], ids=["compared", "nothing to compare"])
def test_tables_fit_a_terminal_and_show_what_needs_no_model(measured, wrong):
    _, _, found = measured
    found.measured["wrong"][:] = found.true * wrong
    found.measured["copy"][:] = found.true * math.e
    console = Console(width=80)
    with console.capture() as text:
        show.print_tables(console, score.rows(found))
    lines = text.get().splitlines()
    assert "nan" not in text.get() and "…" not in text.get() and max(map(len, lines)) <= 80
    table = lines.index(next(line for line in lines if line.startswith("law error without a model")))
    assert lines[table + 1].split() == ["guess", "copy", "right", "/", "guess"]
    assert ("1.00±0.00" in lines[table + 2]) == (wrong == 1)
