"""Clean frames: the shape of a clip, and which latents stay clean."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.conditions import clean
from ditmem_jax.conditions.clean import CleanFrames
from ditmem_jax.conditions.condition import ImageNetworks
from ditmem_jax.conditions.kinds import CONDITIONS, condition_for, prepared, require_condition
from ditmem_jax.config.files import load_config
from ditmem_jax.errors import UserError
from ditmem_jax.types import GivenFrames
from tests.tiny import replace, tiny_config

CONFIG = tiny_config("nowhere")  # 9 frames of 32 x 32, a stride of 4


def frames(count, height=32, width=32):
    return GivenFrames(np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((720, 1280), (704, 1248)),
        ((1920, 1080), (1248, 704)),
        ((640, 640), (928, 960)),
        ((3000, 4000), (800, 1088)),
        ((1000, 100), (2976, 288)),
        ((517, 333), (1152, 768)),
    ],
)
def test_a_clip_has_the_shape_that_wans_own_program_gives_it(shape, expected):
    """The numbers are those of Wan 2.2's `best_output_size` at 704 x 1280."""
    config = load_config("configs/wan22_5b.py")
    assert CleanFrames(config).size(*shape) == expected
    given = frames(1, *shape)
    video = prepared(config, given).video
    assert (video.height, video.width) == expected
    fixed = replace(config, "sample", follow_image=False)
    assert prepared(fixed, given) == fixed


@pytest.mark.parametrize(("count", "latent_frames"), [(1, 1), (5, 2)])
def test_the_first_latent_frames_are_those_of_the_pictures(monkeypatch, count, latent_frames):
    seen = []

    def encode(vae, pixels):
        seen.append(pixels)
        return jnp.full((1, latent_frames, 4, 4, 4), float(len(seen)))

    monkeypatch.setattr(clean, "encode", encode)
    pictures = [frames(count), frames(count, 50, 70)]
    found = CleanFrames(CONFIG).encode(pictures, ImageNetworks(types.SimpleNamespace()))
    assert [x.shape for x in seen] == [(1, count, 32, 32, 3)] * 2
    np.testing.assert_allclose(seen[0][0], pictures[0].first / 127.5 - 1, atol=1e-6)
    expected = np.arange(3) < latent_frames
    np.testing.assert_array_equal(found["given"], [expected] * 2)
    np.testing.assert_array_equal(found["clean"][:, :, 0, 0, 0], np.outer([1, 2], expected))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (frames(2), "1, 5, ... up to 5.*\n.*2\n.*use 1 frames"),
        (frames(9), "fewer than video.frames.*\n.*9\n.*use 5 frames"),
        (dataclasses.replace(frames(1), last=frames(1).first[0]), "takes no last frame"),
    ],
)
def test_frames_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=message):
        CleanFrames(CONFIG).encode([given], ImageNetworks(types.SimpleNamespace()))


def test_the_kind_of_a_transformer():
    assert isinstance(condition_for(CONFIG), CONDITIONS["clean"])
    text_only = replace(CONFIG, "dit", clean_frames=False)
    assert condition_for(text_only) is None
    with pytest.raises(UserError, match="takes no given frames"):
        require_condition(text_only)
