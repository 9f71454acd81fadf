"""Given frames from files."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from ditmem_jax.conditions.files import read_frames
from ditmem_jax.data.video import read_start, read_video, write_video
from ditmem_jax.errors import UserError
from tests.tiny import tiny_config

CONFIG = tiny_config("nowhere")  # clips of 8 frames per second


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture, and a video at 16 frames per second whose frames get brighter."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).save(folder / "a.png")
    steps = np.arange(0, 240, 20, dtype=np.uint8)
    write_video(folder / "a.mp4", np.broadcast_to(steps[:, None, None, None], (12, 16, 16, 3)), 16)
    return folder


def test_first_and_last_frame(files):
    assert read_frames(CONFIG) is None
    found = read_frames(CONFIG, files / "a.png", str(files / "a.png"))
    np.testing.assert_array_equal(found.first[0], np.asarray(Image.open(files / "a.png")))
    np.testing.assert_array_equal(found.last, found.first[0])
    sha256 = hashlib.sha256((files / "a.png").read_bytes()).hexdigest()
    assert found.origin == {
        name: {"file": "a.png", "sha256": sha256} for name in ("first_frame", "last_frame")
    }


def test_a_video_is_continued_at_the_rate_of_the_clips(files):
    found = read_frames(CONFIG, video=files / "a.mp4")
    np.testing.assert_array_equal(found.first, read_video(files / "a.mp4").frames[:10:2])
    assert len(read_frames(CONFIG, video=files / "a.mp4", count=1).first) == 1
    np.testing.assert_array_equal(read_start(files / "a.mp4", 3, 16), read_video(files / "a.mp4").frames[:3])
    with pytest.raises(
        UserError, match=r"too short.*\n.*17 frames, which are 9 at 8 per second.*\n.*12 frames"
    ):
        read_frames(CONFIG, video=files / "a.mp4", count=9)


def test_frames_that_contradict_each_other(files):
    with pytest.raises(UserError, match="begin with a picture and with a video"):
        read_frames(CONFIG, files / "a.png", video=files / "a.mp4")
    with pytest.raises(UserError, match="no first one"):
        read_frames(CONFIG, last_frame=files / "a.png")
