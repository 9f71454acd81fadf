"""A memory that each block reads in its own way: gates over noise levels, additions of low rank, ranges of blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.config import DiTConfig, MemoryConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.memory_encoder import KNOTS, MemoryEncoder
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.types import Compute, Conditioning, Memory, Reading
from tests.tiny import random_arrays

CONFIG = DiTConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=3, in_dim=4, out_dim=4, text_dim=8, text_len=6, freq_dim=16
)
B, M, RANK = 2, 4, 2
SIGMA = np.array([0.75, 0.2])  # between two knots, and on one
FACTORS = jnp.zeros((3, 24, RANK)), jnp.zeros((3, RANK, 24))


@functools.cache
def network(**compute):
    structure, shapes = abstract(lambda: DiT(CONFIG, compute=Compute(**compute), rngs=nnx.Rngs(0)))
    return structure, jax.tree.map(jnp.asarray, random_arrays(shapes))


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    latents, text = jax.random.normal(keys[0], (B, 3, 4, 6, 4)), jax.random.normal(keys[1], (B, 6, 8))
    memory = Memory(jax.random.normal(keys[2], (B, M, 24)), jnp.zeros((B, M)))
    return latents, jnp.asarray(1000 * SIGMA, jnp.float32), Conditioning(text), memory


@functools.cache
def compiled(method, **compute):
    structure, _ = network(**compute)
    return jax.jit(lambda arrays, *inputs: getattr(structure.merge(arrays), method)(*inputs))


def run(inputs, memory, method="__call__", **compute):
    return np.asarray(compiled(method, **compute)(network(**compute)[1], *inputs[:3], memory))


@pytest.mark.slow
def test_a_reading_of_zeros_is_none(inputs):
    memory = inputs[3]
    plain = run(inputs, memory)
    zeros = memory._replace(reading=Reading(jnp.zeros((3, 2, KNOTS)), FACTORS, FACTORS))
    np.testing.assert_allclose(run(inputs, zeros), plain, atol=1e-6)


def test_a_gate_is_a_bias_by_band_and_noise_level(inputs):
    memory = inputs[3]
    knots = np.arange(KNOTS) / (KNOTS - 1)
    curves = np.stack([2 * knots, -3 * knots])  # high and low band; linear, so exact between knots
    gated = memory._replace(reading=Reading(jnp.asarray(np.tile(curves, (3, 1, 1)), jnp.float32)))
    bias = np.repeat(np.stack([2 * SIGMA, -3 * SIGMA], axis=1), M // 2, axis=1)
    expected = run(inputs, memory._replace(bias=jnp.asarray(bias, jnp.float32)))
    np.testing.assert_allclose(run(inputs, gated), expected, atol=1e-5)
    assert np.abs(expected - run(inputs, memory)).max() > 1e-3


def test_an_absent_token_stays_absent_behind_a_gate(inputs):
    memory = inputs[3]
    absent = Memory(memory.tokens, jnp.full((B, M), -jnp.inf), Reading(jnp.full((3, 2, KNOTS), 9.0)))
    np.testing.assert_array_equal(run(inputs, absent), run(inputs, None))


def test_additions_of_low_rank_are_other_projections_of_memory_tokens_only(inputs):
    structure, arrays = network()
    layer = {name.removeprefix("blocks."): x[1] for name, x in arrays.items() if name.startswith("blocks.")}
    rng = np.random.default_rng(0)
    down, up, other = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((24, 2), (2, 24), (2, 24))
    )
    attend = structure.merge(arrays).blocks.self_attention
    graph, state = nnx.split(attend)
    block = nnx.merge(graph, jax.tree.map(lambda x: x[1], state))
    tokens = inputs[3].tokens
    key, value = block.key_value(tokens, Reading(None, (down, up), (down, other)))
    block.k.kernel[...] += down @ up
    block.v.kernel[...] += down @ other
    expected = block.key_value(tokens)
    np.testing.assert_allclose(key, expected[0], atol=1e-5)
    np.testing.assert_allclose(value, expected[1], atol=1e-5)
    assert layer


@pytest.mark.parametrize("blocks", [(0, 2), (1, 1), (1, 2), (0, 0)])
def test_only_the_blocks_that_are_named_read(inputs, blocks):
    first, last = blocks
    memory = inputs[3]
    closed = np.full((3, 2, KNOTS), -1e4, np.float32)
    closed[first : last + 1] = 0.5
    expected = run(inputs, memory._replace(reading=Reading(jnp.asarray(closed))))
    own = memory._replace(reading=Reading(jnp.asarray(closed[first : last + 1])))
    np.testing.assert_allclose(run(inputs, own, memory_blocks=blocks), expected, atol=1e-5)


@pytest.mark.slow
def test_blocks_before_the_first_one_need_no_backward_pass(inputs):
    def operations(**compute):
        structure, arrays = network(unroll=True, **compute)

        def loss(memory, arrays):
            return jnp.square(structure.merge(arrays)(*inputs[:3], memory)).mean()

        return jax.jit(jax.grad(loss)).lower(inputs[3], arrays).compile().cost_analysis()["flops"]

    whole, last = operations(), operations(memory_blocks=(2, 2))
    assert last < 0.75 * whole  # three passes forward, and one backward in place of three


@pytest.mark.slow
def test_the_share_of_attention_that_a_memory_takes(inputs):
    memory = inputs[3]._replace(bias=jnp.full((B, M), -5.0))
    odds = run(inputs, memory, "memory_share")
    assert odds.shape == (3, 2) and (odds > 0).all() and (odds < 0.1).all()
    twice = run(inputs, memory._replace(bias=memory.bias + np.log(2)), "memory_share")
    np.testing.assert_allclose(twice, 2 * odds, rtol=0.02)
    np.testing.assert_allclose(run(inputs, memory, "memory_share", memory_blocks=(1, 2)), odds[1:], rtol=1e-5)


@pytest.mark.slow
def test_an_encoder_gives_its_memory_a_reading():
    config = MemoryConfig(
        dim=24, in_dim=4, stages=((8, 3, 1, 1),), latent_grid=(3, 4, 4), filter="radial", tokens=(1, 1, 1),
        norm="group", num_heads=4, num_layers=3, blocks=(1, 2), gate="learned", reading=RANK,
    )  # fmt: skip
    memory = MemoryEncoder(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 2, 3, 4, 4, 4)), training=False)
    assert memory.tokens.shape[1] == 4
    assert memory.reading.gate.shape == (2, 2, KNOTS)
    assert [x.shape for x in memory.reading.key] == [(2, 24, RANK), (2, RANK, 24)]
    assert (memory.reading.value[1] == 0).all() and (memory.reading.value[0] != 0).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(gate="learned"), "memory.num_layers"),
        (dict(blocks=(2, 1)), "memory.blocks"),
        (dict(blocks=(1, 3), num_layers=3), "memory.blocks"),
        (dict(gate="fixed", num_layers=3, strength=0.1), "memory.strength"),
        (dict(reading=-1, num_layers=3), "memory.reading"),
    ],
)
def test_impossible_readings_are_named(values, message):
    with pytest.raises(UserError, match=message):
        MemoryConfig(dim=24, **values)
