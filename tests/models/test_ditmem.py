"""Memory and transformer together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.config import MemoryConfig, MeshConfig
from ditmem_jax.config.presets import DIT_PRESETS
from ditmem_jax.models import ditmem
from ditmem_jax.models.ditmem import compute_for, keep_only, with_strength
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.parallel.mesh import make_mesh
from ditmem_jax.types import Batch, Compute, Conditioning, Memory
from tests.tiny import random_arrays, replace, tiny_config

velocity, encode = nnx.jit(ditmem.velocity), nnx.jit(ditmem.encode)


@pytest.fixture(scope="module")
def parts():
    config, rng = tiny_config("unused"), np.random.default_rng(0)
    networks = []
    for create in (
        lambda: DiT(config.dit, rngs=nnx.Rngs(0)),
        lambda: MemoryEncoder(config.memory, rngs=nnx.Rngs(0)),
    ):
        structure, shapes = abstract(create)
        networks.append(structure.merge(jax.tree.map(jnp.asarray, random_arrays(shapes))))

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    grid = 3, 4, 4, 4
    batch = Batch(
        random(2, *grid), Conditioning(random(2, 5, 16)), random(2, 2, *grid), jnp.ones((2, 2), bool)
    )
    noise = random(2, *grid)
    return *networks, batch, jnp.array([0.3, 0.8]), noise


# What a memory with bias -inf holds changes no bit. A network without any is another program, which the compiler may
# round otherwise.


def test_a_sample_that_lost_its_memory_is_one_without(parts):
    dit, encoder, batch, sigma, noise = parts
    alone, memory = velocity(dit, None, batch, sigma, noise), encode(encoder, batch)
    some, other = (
        velocity(dit, keep_only(each, jnp.array([True, False])), batch, sigma, noise)
        for each in (memory, Memory(2 - memory.tokens, memory.bias))
    )
    np.testing.assert_array_equal(some[1], other[1])
    np.testing.assert_allclose(some[1], alone[1], rtol=1e-5, atol=1e-5)
    assert jnp.abs(some[0] - alone[0]).max() > 1e-3


def test_strength_zero_is_no_memory_and_one_changes_nothing(parts):
    dit, encoder, batch, sigma, noise = parts
    memory = encode(encoder, batch)
    alone, full = velocity(dit, None, batch, sigma, noise), velocity(dit, memory, batch, sigma, noise)
    silent, other = (
        velocity(dit, with_strength(each, 0.0), batch, sigma, noise)
        for each in (memory, Memory(2 - memory.tokens, memory.bias))
    )
    np.testing.assert_array_equal(silent, other)
    np.testing.assert_allclose(silent, alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(velocity(dit, with_strength(memory, 1.0), batch, sigma, noise), full)


def test_strength_two_is_every_row_twice(parts):
    dit, encoder, batch, sigma, noise = parts
    memory = encode(encoder, batch)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), memory)
    got, want = (velocity(dit, m, batch, sigma, noise) for m in (with_strength(memory, 2.0), twice))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_memory_that_is_absent_has_no_gradient(parts):
    dit, encoder, batch, sigma, noise = parts
    memory = encode(encoder, batch)

    def total(tokens):
        kept = keep_only(Memory(tokens, memory.bias), jnp.array([True, False]))
        return jnp.square(ditmem.velocity(dit, kept, batch, sigma, noise)).sum()

    gradient = jax.jit(jax.grad(total))(memory.tokens)
    assert jnp.isfinite(gradient).all() and (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_ten_memory_rows_cost_the_full_size_transformer_next_to_nothing():
    """The released encoder's memory of 5 videos against none, by XLA's count; two blocks stand for all thirty."""
    preset = DIT_PRESETS["wan2.1-t2v-1.3b"]
    config = type(preset)(**(vars(preset) | {"num_layers": 2}))
    encoder = MemoryConfig(dim=config.dim)
    compute = Compute(unroll=True)
    structure, weights = abstract(lambda: DiT(config, compute=compute, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))

    def encode_videos():
        memory = MemoryEncoder(encoder, rngs=nnx.Rngs(0))(jnp.zeros((1, 5, 21, 60, 104, 16)), training=False)
        return memory.tokens, memory.bias

    rows = jax.eval_shape(encode_videos)
    assert rows[0].shape == (1, 10, config.dim)

    def forward(weights, latents, timestep, context, *rows):
        memory = Memory(*rows) if rows else None
        return structure.merge(weights)(latents, timestep, Conditioning(context), memory)

    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 21, 60, 104, 16), (1,), (1, 512, 4096))
    ]
    without, with_memory = (
        jax.jit(forward).lower(weights, *inputs, *memory).cost_analysis()["flops"] for memory in ((), rows)
    )
    assert without < with_memory <= 1.002 * without


def test_how_a_transformer_computes_is_what_the_config_says():
    config = replace(replace(tiny_config("nowhere"), "run", remat="blocks"), "memory", blocks=(1, 1))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert compute_for(config, mesh, training=True) == Compute("xla", "blocks", memory_blocks=(1, 1))
    assert compute_for(config, mesh) == Compute("xla", "none", memory_blocks=(1, 1))


@pytest.mark.slow
def test_a_given_frame_stays_clean_and_counts_in_no_error(parts):
    """The loss and its gradient are those of the released program: the frame put in, at timestep 0, and left out."""
    dit, encoder, batch, sigma, noise = parts
    memory = encode(encoder, batch)
    held = ditmem.give_first_frame(batch, jax.random.key(0), 1.0)
    first = (jnp.arange(3) == 0)[None]
    np.testing.assert_array_equal(held.conditioning.given, jnp.repeat(first, 2, axis=0))

    def by_hand(tokens, noise):
        spread = sigma[:, None, None, None, None]
        noisy = (1 - spread) * batch.latents + spread * noise
        noisy = jnp.concatenate([batch.latents[:, :1], noisy[:, 1:]], axis=1)
        times = jnp.where(first, 0.0, 1000 * sigma[:, None])
        predicted = dit(noisy, times, batch.conditioning, memory._replace(tokens=tokens))
        return jnp.square(predicted - (noise - batch.latents))[:, 1:].mean(axis=(1, 2, 3, 4))

    def ours(tokens, noise):
        return ditmem.per_sample_mse(dit, memory._replace(tokens=tokens), held, sigma, noise)

    def both(error):
        return jax.jit(jax.value_and_grad(lambda *inputs: error(*inputs).sum(), argnums=(0, 1)))

    (value, slopes), (want, expected) = (both(each)(memory.tokens, noise) for each in (ours, by_hand))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, slope in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(got, slope, atol=1e-6)
    assert not slopes[1][:, 0].any()  # no noise reaches the frame
    assert np.abs(slopes[0]).max() > 1e-4


def test_a_first_frame_is_given_as_often_as_it_should(parts):
    batch = parts[2]
    many = batch._replace(latents=jnp.zeros((2000, 3, 1, 1, 1)))
    given = ditmem.give_first_frame(many, jax.random.key(0), 0.3).conditioning.given
    assert float(given[:, 0].mean()) == pytest.approx(0.3, abs=0.04)
    assert not given[:, 1:].any()
    assert ditmem.give_first_frame(batch, jax.random.key(0), 0.0) is batch
