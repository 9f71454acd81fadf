"""The demo's stages: taken once, each with its time; the commands run from any folder; folders are not mixed."""

import dataclasses
import json
import subprocess

import numpy as np
import pytest
from rich.console import Console

from ditmem_jax.data.video import write_video
from ditmem_jax.demo.stages import FEW, Demo, Settings, _duration
from ditmem_jax.demo.trials import Kind
from ditmem_jax.errors import UserError
from tests.tiny import tiny_config


@pytest.fixture
def demo(tmp_path):
    return lambda settings=FEW, **options: Demo(
        tmp_path / "demo", tiny_config(tmp_path), settings, ["--config=tiny"], Console(quiet=True, **options)
    )


def test_stages_are_taken_once_and_folders_are_not_mixed(demo, tmp_path):
    first = demo()
    taken = []
    first._stage("worlds", lambda: taken.append(1), lambda: first.commands.append("python -m x"))
    again = demo()
    again._stage("worlds", lambda: taken.append(2))
    assert taken == [1] and again.commands == first.commands == ["python -m x"]
    assert again.seconds == first.seconds
    with pytest.raises(UserError, match="other settings"):
        demo(dataclasses.replace(FEW, steps=21))
    assert json.loads((tmp_path / "demo" / "settings.json").read_text())["steps"] == 20


def test_a_stage_that_failed_is_taken_again(demo):
    first = demo()

    def fail():
        raise UserError("no disk")

    with pytest.raises(UserError, match="no disk"):
        first._stage("worlds", fail)
    taken = []
    demo()._stage("worlds", lambda: taken.append(1))
    assert taken == [1]


def test_every_stage_tells_how_long_it_takes(demo, tmp_path):
    one = demo()
    one.console = Console(width=200)
    with one.console.capture() as text:
        one._stage("train", lambda: None)
    assert text.get() == f"train: about {_duration(FEW.typical_seconds['train'])} on two idle CPU cores\n"
    (tmp_path / "demo" / "train.json").write_text('{"commands": [], "seconds": 75.2}')
    with one.console.capture() as text:
        one._stage("train", lambda: None)
    assert text.get() == "train: done before, in 1 min 15 s\n"
    (tmp_path / "demo" / "results.json").write_text('{"seconds": {"sample": 9.4}}')
    with one.console.capture() as text:
        one._stage("sample", lambda: None)
    assert text.get() == "sample: took 9 s last time\n"
    assert sum(Settings(3000).typical_seconds.values()) == pytest.approx(13 * 60, rel=0.2)


def test_commands_are_modules_of_the_library_with_the_configuration_by_name(demo, monkeypatch):
    calls = []

    def run(command, **options):
        calls.append(command)
        return subprocess.CompletedProcess(command, int(len(calls) == 2))

    monkeypatch.setattr(subprocess, "run", run)
    one = demo()
    one._encode("train")
    assert calls[0][1:4] == ["-m", "ditmem_jax.encode", "--config=tiny"]
    with pytest.raises(UserError, match=r"ditmem encode ended with exit status 1"):
        one._encode("unseen")


def test_references_are_found_among_the_clips(demo, tmp_path):
    one = demo()
    for number, split in enumerate(("train", "unseen")):
        folder = tmp_path / "demo" / "worlds" / split
        (folder / "videos").mkdir(parents=True)
        name = f"{split}_0.mp4"
        table = f"video,caption,world,phenomenon\n{name},a ball,planet {number},fall\n"
        (folder / "captions.csv").write_text(table)
        write_video(folder / "videos" / name, np.full((3, 32, 32, 3), 100 * number, np.uint8), 16)
    assert one._kinds() == {"train_0.mp4": Kind("planet 0", "fall"), "unseen_0.mp4": Kind("planet 1", "fall")}
    assert one._video("unseen_0.mp4").shape == (3, 32, 32, 3)
    assert abs(one._video("unseen_0.mp4").mean() - 100) < 5
