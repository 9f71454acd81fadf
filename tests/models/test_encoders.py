"""Every kind of memory encoder: what it returns, what trains, and that its configuration is saved with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.config import EncoderConfig, FreeTokensConfig, MemoryConfig, build, to_dict
from ditmem_jax.config.strict import dataclasses_of
from ditmem_jax.errors import UserError
from ditmem_jax.models.encoders import ENCODERS, Encoder, VideoEncoder, new_encoder, per_video
from ditmem_jax.models.state import abstract, split
from ditmem_jax.storage.encoders import encoder_metadata, load_encoder, save_encoder
from tests.tiny import random_arrays

KINDS = {
    "dit_mem": MemoryConfig(
        dim=48, in_dim=4, stages=((16, 3, 1, 2),), latent_grid=(3, 4, 4), filter="radial", tokens=(1, 1, 1),
        num_heads=4, norm="group", dropout=0.0, strength=0.5,
    ),
    "free_tokens": FreeTokensConfig(dim=48, tokens=3, sources=("Aron", "Brux", "Cyta"), strength=0.5),
}  # fmt: skip


def samples():
    """References of two samples, and their sources."""
    latents = np.random.default_rng(0).standard_normal((2, 2, 3, 4, 4, 4)).astype(np.float32)
    return jnp.asarray(latents), jnp.ones((2, 2), bool), jnp.array([2, 0])


def make(kind):
    structure, shapes = abstract(lambda: new_encoder(KINDS[kind], rngs=nnx.Rngs(0), dtype=jnp.float32))
    return structure, random_arrays(shapes)


def test_every_kind_is_listed_and_tried_here():
    assert set(ENCODERS) == set(dataclasses_of(EncoderConfig)) == set(map(type, KINDS.values()))
    assert [config.kind for config in KINDS.values()] == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_references_become_tokens_with_a_bias_and_every_array_learns(kind):
    structure, arrays = make(kind)
    assert isinstance(structure.merge(arrays), Encoder)

    @jax.jit
    def both(arrays):
        def total(arrays):
            memory = structure.merge(arrays)(*samples(), training=True)
            return (memory.tokens**2).sum() + (memory.bias**2).sum(), memory

        return jax.value_and_grad(total, has_aux=True)(arrays)

    (_, memory), gradients = both(arrays)
    batch, tokens, dim = memory.tokens.shape
    assert (batch, dim) == (2, 48) and memory.bias.shape == (2, tokens)
    assert np.isfinite(memory.bias).all()
    assert np.abs(memory.tokens[0] - memory.tokens[1]).max() > 1e-3
    still = [path for path, x in gradients.items() if np.abs(x).max() < 1e-9]
    assert still in ([], ["self_attention.k.bias"])  # a bias of all keys changes no softmax


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_an_encoder_tells_its_kind(kind, tmp_path):
    _, arrays = make(kind)
    save_encoder(tmp_path / "encoder.safetensors", arrays, KINDS[kind], {"step": 3})
    assert encoder_metadata(tmp_path / "encoder.safetensors") == (KINDS[kind], {"step": 3})
    loaded = load_encoder(tmp_path / "encoder.safetensors")
    assert type(loaded) is ENCODERS[type(KINDS[kind])]
    for path, x in split(loaded)[1].items():
        np.testing.assert_array_equal(x, arrays[path])


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_there_and_back_through_json(kind):
    assert build(EncoderConfig, to_dict(KINDS[kind]), "memory") == KINDS[kind]


def test_a_configuration_without_a_kind_is_that_of_dit_mem():
    values = to_dict(KINDS["dit_mem"])
    del values["kind"]
    assert build(EncoderConfig, values, "memory") == KINDS["dit_mem"]
    with pytest.raises(UserError, match=r"memory.kind(.|\n)*\['dit_mem', 'free_tokens'\](.|\n)*'lora'"):
        build(EncoderConfig, {"kind": "lora", "dim": 48}, "memory")
    with pytest.raises(UserError, match=r"unknown config key memory.stages"):
        build(EncoderConfig, {"kind": "free_tokens", "dim": 48, "stages": []}, "memory")


def test_only_encoders_of_videos_work_video_by_video():
    videos, free = (structure.merge(arrays) for structure, arrays in map(make, KINDS))
    assert per_video(videos) is videos and isinstance(videos, VideoEncoder)
    with pytest.raises(UserError, match=r"nothing from single videos(.|\n)*memory.kind = free_tokens"):
        per_video(free)


def test_free_tokens_are_those_of_the_sources_with_the_strength_as_bias():
    structure, arrays = make("free_tokens")
    memory = structure.merge(arrays)(source=samples()[2], training=False)
    np.testing.assert_array_equal(memory.tokens, arrays["tokens"][[2, 0]])
    np.testing.assert_allclose(memory.bias, np.full((2, 3), arrays["log_strength"]))
    fresh = new_encoder(KINDS["free_tokens"], rngs=nnx.Rngs(0), dtype=jnp.float32)
    np.testing.assert_allclose(fresh.log_strength[...], np.log(0.5), rtol=1e-6)
    with pytest.raises(UserError, match="no source is given"):
        structure.merge(arrays)(*samples()[:2], training=False)
    with pytest.raises(UserError, match=r"memory.sources names no source"):
        new_encoder(FreeTokensConfig(dim=48), rngs=nnx.Rngs(0), dtype=jnp.float32)
