"""Where a gate begins."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.config.networks import TRAIN_STEPS
from ditmem_jax.diffusion.flow import add_noise, target
from ditmem_jax.models.ditmem import Networks, encode
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.train.calibration import make_start
from ditmem_jax.train.step import make_encoder
from ditmem_jax.types import Batch, Conditioning, Reading
from tests.tiny import random_arrays, replace, tiny_config


@pytest.mark.slow
def test_every_block_begins_at_the_share_that_is_wanted_and_at_the_error_of_the_clean_estimate():
    config = tiny_config("unused")
    gate = dict(gate="learned", gate_share=0.02, num_layers=config.dit.num_layers, strength=None)
    config = replace(config, "memory", **gate)
    parts = [abstract(lambda: DiT(config.dit, rngs=nnx.Rngs(0))), abstract(lambda: make_encoder(config))]
    networks = Networks(*(structure for structure, _ in parts))
    backbone, encoder = (jax.tree.map(jnp.asarray, random_arrays(shapes)) for _, shapes in parts)
    encoder = encoder | {"reader.gate": jnp.zeros_like(encoder["reader.gate"])}
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    shape = config.latent_shape
    text = Conditioning(random(3, config.dit.text_len, config.dit.text_dim))
    batch = Batch(random(3, *shape), text, random(3, 2, *shape), jnp.ones((3, 2), bool))
    start = np.asarray(jax.jit(make_start(config, networks))(backbone, encoder, batch))

    dit, memory = networks.dit.merge(backbone), encode(networks.encoder.merge(encoder), batch)
    noise = random(3, *shape)

    @jax.jit
    def measure(sigma, bias):
        levels = jnp.full((3,), sigma)
        noisy = add_noise(batch.latents, noise, levels)
        error = jnp.square(dit(noisy, TRAIN_STEPS * levels, text) - target(batch.latents, noise)).mean()
        biased = memory._replace(bias=memory.bias + bias, reading=None)
        return sigma * jnp.sqrt(error), dit.memory_share(noisy, TRAIN_STEPS * levels, text, biased)

    for block in range(config.dit.num_layers):
        bias = jnp.repeat(jnp.asarray(start[block, :, -1]), memory.bias.shape[1] // 2)[None]
        share = float(np.mean([measure(sigma, bias)[1][block].sum() for sigma in (0.2, 0.5, 0.8)]))
        assert 0.01 < share < 0.04  # the batch's own mean is 0.02, its tokens and levels differ
    ratio = measure(0.5, 0.0)[0] / measure(1.0, 0.0)[0]
    np.testing.assert_allclose(start[:, :, 5] - start[:, :, 10], np.log(ratio), atol=0.1)
    assert isinstance(networks.encoder.merge(encoder).reader(), Reading)
    assert dataclasses.is_dataclass(config)
