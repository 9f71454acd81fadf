"""Frames as channels: the mask, the grey clip that is encoded, and the tokens of the pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.conditions import channels
from ditmem_jax.conditions.channels import FrameChannels
from ditmem_jax.conditions.condition import ImageNetworks
from ditmem_jax.conditions.images import bicubic
from ditmem_jax.conditions.kinds import condition_layout, prepared
from ditmem_jax.config import CLIPConfig, ExpertsConfig, MeshConfig
from ditmem_jax.config.files import load_config
from ditmem_jax.encode import shards
from ditmem_jax.errors import UserError
from ditmem_jax.models.backbone import Experts
from ditmem_jax.models.wan.vae import VAE
from ditmem_jax.parallel.mesh import make_mesh
from ditmem_jax.sample.sampler import Sampler
from ditmem_jax.train.setup import batch_layout
from ditmem_jax.types import GivenFrames
from tests.fakes import FakeDiT
from tests.tiny import replace, tiny_config

CLIP = CLIPConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1, image_size=28)
PLAIN = replace(tiny_config("nowhere"), "dit", clean_frames=False, in_dim=4 + 4 + 4)  # as Wan 2.2: no CLIP
FIRST = dataclasses.replace(PLAIN, clip=CLIP)
FIRST = replace(FIRST, "dit", image_dim=16)
BOTH = replace(FIRST, "dit", image_positions=2 * CLIP.tokens)


def frames(count=1, last=False, height=32, width=32):
    pictures = np.random.default_rng(0).integers(0, 256, (count + last, height, width, 3), np.uint8)
    return GivenFrames(pictures[:count], pictures[-1] if last else None)


@pytest.fixture
def networks(monkeypatch):
    """Stand-ins that show what they are given: latents of every fourth frame, and tokens of four picture means."""

    def encode(_, pixels):
        pixels = np.asarray(pixels)[:, ::4, ::8, ::8]
        return jnp.asarray(np.concatenate([pixels, pixels[..., :1]], axis=-1))

    def image_tokens(_, pictures):
        return jnp.broadcast_to(pictures.mean((1, 2))[:, :1, None], (len(pictures), CLIP.tokens, 16))

    monkeypatch.setattr(channels, "encode", encode)
    monkeypatch.setattr(channels, "image_tokens", image_tokens)
    return ImageNetworks(None, None)


@pytest.mark.parametrize(
    ("given", "mask"),
    [
        (frames(1), [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]),
        (frames(3), [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]),
        (frames(1, last=True), [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]),
    ],
    ids=["first", "first three", "first and last"],
)
def test_the_mask_tells_of_every_frame_of_a_latent_frame(networks, given, mask):
    """Latents are those of a clip that is grey but for the given frames."""
    told = FrameChannels(PLAIN).encode([given], networks)
    assert told.keys() == {"frames"} == condition_layout(PLAIN).keys()
    assert told["frames"].shape[1:] == condition_layout(PLAIN)["frames"] == (3, 4, 4, 8)
    np.testing.assert_array_equal(told["frames"][0, :, 0, 0, :4], mask)
    clip = np.zeros((9, 32, 32, 3), np.float32)
    clip[: len(given.first)] = given.first / np.float32(127.5) - 1
    if given.last is not None:
        clip[-1] = given.last / np.float32(127.5) - 1
    np.testing.assert_allclose(told["frames"][0, ..., 4:7], clip[::4, ::8, ::8], atol=1e-5)


def test_tokens_are_of_the_first_picture_and_then_of_the_last(networks):
    for config, last in ((FIRST, False), (BOTH, True)):
        given = frames(1, last)
        tokens = FrameChannels(config).encode([given], networks)["image"]
        assert tokens.shape[1:] == condition_layout(config)["image"]
        pictures = [given.first[0], *([given.last] if last else [])]
        expected = [bicubic(x[None] / np.float32(127.5) - 1, 28, 28)[..., 0].mean() for x in pictures]
        np.testing.assert_allclose(tokens[0, :: CLIP.tokens, 0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((720, 1280), (720, 1280)),
        ((1920, 1080), (1280, 720)),
        ((640, 640), (960, 960)),
        ((517, 333), (1184, 768)),
    ],
)
def test_a_clip_has_the_shape_that_wans_own_program_gives_it(shape, expected):
    """Each side of the picture's shape rounded down at 720 x 1280, as in Wan 2.1's `image2video.py`."""
    config = load_config("configs/wan_i2v_14b.py")
    video = prepared(config, frames(1, height=shape[0], width=shape[1])).video
    assert (video.height, video.width) == expected


def test_a_picture_is_stretched_by_the_rounding_alone_and_cut_where_its_shape_is_another(networks):
    """Black sides of a wide picture are cut off for a square clip; a picture of 33 x 35 is stretched to 32 x 32."""
    wide = np.full((1, 32, 96, 3), 0, np.uint8)
    wide[:, :, 32:64] = 255
    told = FrameChannels(PLAIN).encode([GivenFrames(wide)], networks)["frames"]
    assert (told[0, 0, :, 1:3, 4] > 0.9).all()
    near = frames(1, height=33, width=35)
    told = FrameChannels(PLAIN).encode([near], networks)["frames"]
    expected = bicubic(near.first / np.float32(127.5) - 1, 32, 32)[0, ::8, ::8]
    np.testing.assert_allclose(told[0, 0, ..., 4:7], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (PLAIN, None, "makes clips of pictures.*\n.*a first frame"),
        (BOTH, None, "a first and a last frame"),
        (FIRST, frames(1, last=True), "no last frame"),
        (BOTH, frames(1), "a last frame too"),
        (PLAIN, frames(9), "fewer than video.frames = 9"),
        (PLAIN, frames(8, last=True), "fewer than video.frames = 9"),
    ],
)
def test_frames_that_do_not_fit(config, given, message):
    with pytest.raises(UserError, match=message):
        prepared(config, given)


@pytest.mark.parametrize("config", [PLAIN, FIRST, BOTH], ids=["plain", "first", "both"])
def test_records_keep_what_training_is_to_tell(networks, monkeypatch, config):
    """That of a clip's own first frame, and of its last where the transformer wants one; batches are laid out for it."""
    monkeypatch.setattr(shards, "_clip", lambda config: None)
    clip = frames(9).first
    found = shards._condition(config, object.__new__(VAE), clip)
    last = clip[-1] if config is BOTH else None
    expected = FrameChannels(config).encode([GivenFrames(clip[:1], last)], networks)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name][0])
    batch = batch_layout(config, make_mesh(MeshConfig(), jax.devices()[:1]), np.float32)
    shapes = {name: getattr(batch.conditioning, name).shape[1:] for name in found}
    assert shapes == {name: x.shape for name, x in found.items()}


def test_records_of_clean_frames_keep_nothing_more():
    config = tiny_config("nowhere")
    assert shards._condition(config, object.__new__(VAE), frames(9).first) == {}
    assert condition_layout(config) == {}


def test_cubic_convolution_by_hand():
    """A line of one bright pixel, to twice its length: the weights of PyTorch's kernel at distances 1/4 and 3/4."""
    line = np.zeros((1, 1, 6, 3), np.float32)
    line[:, :, 2] = 1
    half = [0, -0.03515625, -0.10546875, 0.26171875, 0.87890625]
    expected = [*half, *half[::-1], 0, 0]
    np.testing.assert_allclose(bicubic(line, 1, 12)[0, 0, :, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(bicubic(line, 1, 6), line)


class Told(FakeDiT):
    """Its velocity is the mean of what it is told of the frames of a sample, plus that of the tokens."""

    def __call__(self, latents, timestep, conditioning, memory=None):
        velocity = conditioning.frames.mean((1, 2, 3, 4)) + conditioning.image.mean((1, 2))
        return jnp.broadcast_to(velocity[:, None, None, None, None], latents.shape)


def test_both_experts_are_told_of_the_frames_of_each_clip():
    """Two steps of Euler, one of each expert, go half of the way along the velocity."""
    config = dataclasses.replace(FIRST, experts=ExpertsConfig(0.9))
    config = replace(config, "sample", steps=2, shift=1.0, guidance=2.0)
    text = {prompt: jnp.zeros((16, 16)) for prompt in ("", "a ball", "a cube")}
    sampler = Sampler(config, Experts(Told(), Told()), object.__new__(VAE), text)
    shapes, scales = condition_layout(config), np.array([1, 2], np.float32)
    told = {name: np.stack([np.full(shape, x, np.float32) for x in scales]) for name, shape in shapes.items()}
    latents = sampler.latents(["a ball", "a cube"], [0, 1], frames=told)
    expected = sampler.noise([0, 1]) - 2 * scales.reshape(2, 1, 1, 1, 1)
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    with pytest.raises(UserError, match="makes clips of pictures"):
        sampler.latents(["a ball"], [0])
