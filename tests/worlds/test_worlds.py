"""Worlds, clips and captions: what is drawn from a seed and what a caption may say."""

import csv
import subprocess
import sys

import numpy as np
import pytest

from ditmem_jax.data.video import read_video
from ditmem_jax.errors import UserError
from ditmem_jax.worlds.captions import caption, strength, two_digits
from ditmem_jax.worlds.laws import PHENOMENA, RANGES, World, planet_names, splits
from ditmem_jax.worlds.make import clips_of, make
from ditmem_jax.worlds.measure import measure
from ditmem_jax.worlds.render import Camera
from ditmem_jax.worlds.simulate import sample_clip

WORLD = World("zorvex", gravity=6.24, bounciness=0.5, drag=1.0, friction=2.0, stiffness=30.0)


def test_splits_are_disjoint_and_grow():
    few, many = splits(3, backbone=8, train=8, unseen=8), splits(3, backbone=9, train=512, unseen=512)
    assert many.train[:8] == few.train and many.unseen[:8] == few.unseen and many.backbone[:8] == few.backbone
    names = [world.name for world in many.train + many.unseen]
    assert len(set(names)) == len(names) == len(planet_names(3))
    assert all(world.name is None for world in many.backbone)
    assert splits(4, train=8).train != few.train
    for world in many.train:
        for constant, span in RANGES.items():
            assert span.low <= getattr(world, constant) <= span.high
    with pytest.raises(UserError, match="at most 512"):
        splits(3, train=513)


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_clips_are_deterministic_and_of_the_camera_s_size(phenomenon):
    camera = Camera(size=48, frames=9)
    one, same, other = (
        sample_clip(np.random.default_rng(seed), WORLD, phenomenon, camera) for seed in (1, 1, 2)
    )
    assert one.video.shape == (9, 48, 48, 3) and one.video.dtype == np.uint8
    np.testing.assert_array_equal(one.video, same.video)
    assert (one.video != other.video).any()
    assert one.truth == {constant: getattr(WORLD, constant) for constant in PHENOMENA[phenomenon]}


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_bodies_stay_in_view(phenomenon):
    rng = np.random.default_rng(0)
    for world in splits(0, backbone=60).backbone:
        clip = sample_clip(rng, world, phenomenon)
        edge = clip.scene.look.radius
        assert clip.path.min() > edge - 0.01 and clip.path.max() < 4.01 - edge


def test_the_start_does_not_depend_on_the_world():
    other = World(None, gravity=2.0, bounciness=0.9, drag=0.3, friction=4.0, stiffness=10.0)
    for phenomenon in PHENOMENA:
        a, b = (sample_clip(np.random.default_rng(5), world, phenomenon) for world in (WORLD, other))
        np.testing.assert_array_equal(a.video[0], b.video[0])
        assert (a.video != b.video).any()


def test_captions():
    clip = sample_clip(np.random.default_rng(0), WORLD, "fall")
    bare = caption(clip)
    assert bare.startswith("a ") and bare.endswith("background")
    assert caption(clip, "zorvex") == f"on planet zorvex {bare}"
    assert caption(clip, state="numbers") == f"at gravity 6.2 and bounciness 0.50 {bare}"
    assert (
        caption(clip, "zorvex", "words") == f"on planet zorvex at strong gravity and weak bounciness {bare}"
    )


def test_captions_are_short_in_a_small_vocabulary_without_planet_names():
    vocabulary, longest = set(), 0
    for _, _, _, text in clips_of(
        splits(0, backbone=100).backbone, "backbone", 6, 0, Camera(size=8, frames=1)
    ):
        words = text.split()
        vocabulary |= {word for word in words if not word[0].isdigit()}
        longest = max(longest, len(words))
    assert len(vocabulary) < 100 and longest <= 45
    assert not vocabulary & set(planet_names(0))
    assert "planet" not in vocabulary


def test_numbers_and_words():
    assert [two_digits(v) for v in (0.304, 0.95, 0.999, 2.0, 9.96, 11.7, 79.6)] == [
        "0.30", "0.95", "1.0", "2.0", "10", "12", "80"
    ]  # fmt: skip
    assert [strength("bounciness", v) for v in (0.3, 0.44, 0.6, 0.8, 0.95)] == [
        "very weak", "weak", "medium", "strong", "very strong"
    ]  # fmt: skip


def test_make_writes_a_user_s_data(tmp_path):
    assert make(tmp_path, split="unseen", worlds=2, clips=6, seed=1) == 12
    rows = list(csv.DictReader((tmp_path / "captions.csv").read_text().splitlines()))
    assert len(rows) == 12 and list(rows[0])[:4] == ["video", "caption", "world", "phenomenon"]
    row = rows[7]
    video = read_video(tmp_path / "videos" / row["video"])
    assert video.frames.shape == (25, 32, 32, 3) and video.fps == 16
    assert row["caption"].startswith(f"on planet {row['world']} a ")
    assert float(row["gravity"]) == pytest.approx(splits(1).unseen[1].gravity, rel=1e-5)
    measured = measure(video.frames, row["phenomenon"]).constants
    assert measured["gravity"] == pytest.approx(float(row["gravity"]), rel=0.05)
    with pytest.raises(UserError, match="exists already"):
        make(tmp_path, split="unseen", worlds=2, clips=6, seed=1)


def test_the_command_line_makes_the_same_files_again_but_not_over_others(tmp_path):
    def run(folder: str) -> subprocess.CompletedProcess:
        sizes = ["--worlds=1", "--clips=2", "--split=backbone", "--seed=7"]
        command = [sys.executable, "-m", "ditmem_jax.worlds", f"--out={tmp_path / folder}", *sizes]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("a").returncode == 0 and run("b").returncode == 0
    for name in ("captions.csv", "videos/backbone_000000.mp4", "videos/backbone_000001.mp4"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = run("a")
    assert again.returncode == 1 and "exists already" in again.stderr and "Traceback" not in again.stderr
