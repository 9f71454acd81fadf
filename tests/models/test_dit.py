"""The transformer: published sizes, exactness of absent memory, options that change nothing."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import dit as names
from convert.engine import assign, targets
from ditmem_jax.config import DIT_PRESETS, DiTConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.dit import DiT, _patchify, _unpatchify
from ditmem_jax.models.state import abstract
from ditmem_jax.types import Memory
from tests.tiny import random_arrays

MANIFESTS = Path(__file__).parents[1] / "manifests"
CONFIG = DiTConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=3, in_dim=4, out_dim=4, text_dim=8, text_len=6, freq_dim=16
)
B, M = 2, 5


@pytest.fixture(scope="module")
def network():
    """Structure and arrays of a small transformer with random weights."""
    structure, shapes = abstract(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))
    return structure, {name: jnp.asarray(x) for name, x in random_arrays(shapes).items()}


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    latents, context = jax.random.normal(keys[0], (B, 3, 4, 6, 4)), jax.random.normal(keys[1], (B, 6, 8))
    memory = Memory(jax.random.normal(keys[2], (B, M, 24)), jnp.zeros((B, M)))
    return latents, jnp.array([900.0, 20.0]), context, memory


def run(network, *inputs, **options):
    structure, arrays = network
    return jax.jit(lambda arrays, *inputs: structure.merge(arrays)(*inputs, **options))(arrays, *inputs)


@pytest.mark.parametrize(("preset", "file"), [("wan2.1-t2v-1.3b", "1.3b"), ("wan2.1-t2v-14b", "14b")])
def test_presets_have_the_published_tensors(preset, file):
    manifest = json.loads((MANIFESTS / f"wan2.1_t2v_{file}.json").read_text())
    wanted = targets(nnx.eval_shape(lambda: DiT(DIT_PRESETS[preset], rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))
    shapes = {name: tuple(shape) for name, shape in manifest["tensors"].items()}
    assignments, _ = assign(names.table(), shapes, wanted)
    used = [source for assignment in assignments.values() for source in assignment.sources]
    assert sorted(used) == sorted(shapes)
    assert sum(x.size for x in wanted.values()) == manifest["elements"]
    assert {x.dtype for x in wanted.values()} == {jnp.dtype(jnp.bfloat16)}


def test_patches_by_hand():
    x = jnp.arange(1 * 2 * 4 * 2).reshape(1, 1, 2, 4, 2)  # [B, T, H, W, C]
    patches = _patchify(x.astype(jnp.float32), (1, 2, 2))
    np.testing.assert_array_equal(patches, [[[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]])
    np.testing.assert_array_equal(_unpatchify(patches, (1, 1, 2), (1, 2, 2)), x)


def test_memory_changes_the_velocity(network, inputs):
    *plain, memory = inputs
    assert np.abs(run(network, *plain) - run(network, *plain, memory)).max() > 1e-3


def test_a_memory_of_absent_rows_is_no_memory_to_the_last_bit(network, inputs):
    *plain, memory = inputs
    absent = Memory(memory.tokens, jnp.full((B, M), -jnp.inf))
    np.testing.assert_array_equal(run(network, *plain, absent), run(network, *plain))


def test_an_absent_row_is_a_row_left_out(network, inputs):
    *plain, memory = inputs
    absent = Memory(memory.tokens, memory.bias.at[:, 2].set(-jnp.inf))
    kept = np.array([0, 1, 3, 4])
    left_out = Memory(memory.tokens[:, kept], memory.bias[:, kept])
    np.testing.assert_allclose(run(network, *plain, absent), run(network, *plain, left_out), atol=1e-5)


def test_memory_rows_have_no_order(network, inputs):
    *plain, memory = inputs
    turned = Memory(memory.tokens[:, ::-1], memory.bias[:, ::-1])
    np.testing.assert_allclose(run(network, *plain, turned), run(network, *plain, memory), atol=1e-5)


def test_each_sample_is_its_own(network, inputs):
    latents, time, context, memory = inputs
    whole = run(network, *inputs)
    last = run(network, latents[1:], time[1:], context[1:], Memory(memory.tokens[1:], memory.bias[1:]))
    np.testing.assert_allclose(whole[1:], last, atol=1e-5)


def test_remat_and_unrolling_change_nothing(network, inputs):
    structure, arrays = network

    def value_and_gradient(**options):
        def loss(memory):
            return jnp.square(structure.merge(arrays)(*inputs[:3], memory, **options)).mean()

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(inputs[3]))

    plain = value_and_gradient()
    for options in ({"remat": "products"}, {"remat": "blocks"}, {"unroll": True}):
        for got, want in zip(value_and_gradient(**options), plain, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_wrong_channels_and_widths_are_named(network, inputs):
    latents, time, context, memory = inputs
    model = network[0].merge(network[1])
    with pytest.raises(UserError, match="4 channels"):
        model(latents[..., :3], time, context)
    with pytest.raises(UserError, match="width 24"):
        model(latents, time, context, Memory(memory.tokens[..., :12], memory.bias))
