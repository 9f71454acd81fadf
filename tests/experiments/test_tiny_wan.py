"""The shipped weights: small, complete, and of some use."""

import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.config import Config, build
from ditmem_jax.configs.tiny import get_config
from ditmem_jax.data.video import to_unit
from ditmem_jax.models.wan.vae import decode_scan, encode_scan
from ditmem_jax.storage.weights import load_dit, load_umt5, load_vae
from ditmem_jax.types import Conditioning
from ditmem_jax.worlds.captions import caption
from ditmem_jax.worlds.laws import planet_names, sample_world
from ditmem_jax.worlds.simulate import sample_clip
from experiments.tiny_wan.common import WEIGHTS


@pytest.fixture(scope="module")
def config() -> Config:
    return build(Config, get_config())


@pytest.fixture(scope="module")
def clip():
    rng = np.random.default_rng(3)
    return sample_clip(rng, sample_world(rng), "fall")


def test_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 16e6


@pytest.mark.slow
def test_vae_reconstructs(config, clip):
    vae = load_vae(config)
    video = jnp.asarray(to_unit(clip.video[None]))
    latents = encode_scan(vae, video)
    psnr = 10 * jnp.log10(4 / jnp.square(decode_scan(vae, latents) - video).mean())
    assert psnr > 25
    assert 0.3 < latents.std() < 3  # normalised


def test_planet_names_are_unknown_words(config, clip):
    _, tokenizer = load_umt5(config)
    one, other = (tokenizer([caption(clip, name)])[0] for name in planet_names(0)[:2])
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_transformer_tells_a_clip_from_its_caption(config, clip):
    text, tokenizer = load_umt5(config)
    ids, mask = tokenizer([caption(clip, state="numbers")])
    context = text(jnp.asarray(ids), jnp.asarray(mask))
    latents = encode_scan(load_vae(config), jnp.asarray(to_unit(clip.video[None])))
    noise = jnp.asarray(np.random.default_rng(0).normal(size=latents.shape), jnp.float32)
    velocity = load_dit(config)(noise, jnp.full((1,), 999.0), Conditioning(context))
    # of nearly pure noise the caption alone tells the clip, and velocity is noise minus clip
    assert np.corrcoef((noise - velocity).ravel(), latents.ravel())[0, 1] > 0.8
