"""The transformer: published sizes, kinds, exactness of absent memory, options that change nothing."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.config import DiTConfig, MeshConfig
from ditmem_jax.config.presets import DIT_PRESETS
from ditmem_jax.convert import dit as names
from ditmem_jax.convert.engine import assign, targets
from ditmem_jax.errors import UserError
from ditmem_jax.models.backbone import Experts, with_expert
from ditmem_jax.models.layers import layer_norm, rotary_table, rotate
from ditmem_jax.models.placement import sharding_for
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import Block, DiT, _patchify, _unpatchify
from ditmem_jax.parallel.mesh import make_mesh
from ditmem_jax.types import Compute, Conditioning, Memory
from tests.tiny import random_arrays

MANIFESTS = Path(__file__).parents[2] / "manifests"
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
    return latents, jnp.array([900.0, 20.0]), Conditioning(context), memory


def run(network, *inputs):
    structure, arrays = network
    return jax.jit(lambda arrays, *inputs: structure.merge(arrays)(*inputs))(arrays, *inputs)


FILES = {
    "wan2.1-t2v-1.3b": "wan2.1_t2v_1.3b",
    "wan2.1-t2v-14b": "wan2.1_t2v_14b",
    "wan2.1-i2v-14b": "wan2.1_i2v_14b",
    "wan2.2-t2v-a14b": "wan2.1_t2v_14b",  # the experts have the tensors of the 2.1 model
    "wan2.2-i2v-a14b": "wan2.2_i2v_a14b_expert",
    "wan2.2-ti2v-5b": "wan2.2_ti2v_5b",
    "wan2.1-flf2v-14b": "wan2.1_i2v_14b",  # and the tensor below
}
FURTHER = {"wan2.1-flf2v-14b": {"img_emb.emb_pos": (1, 514, 1280)}}  # positions of the tokens of two images


@pytest.mark.parametrize("preset", DIT_PRESETS)
def test_presets_have_the_published_tensors(preset):
    manifest = json.loads((MANIFESTS / f"{FILES[preset]}.json").read_text())
    wanted = targets(nnx.eval_shape(lambda: DiT(DIT_PRESETS[preset], rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))
    shapes = {name: tuple(shape) for name, shape in manifest["tensors"].items()}
    further = FURTHER.get(preset, {})
    shapes |= further
    assignments, _ = assign(names.table(DIT_PRESETS[preset]), shapes, wanted)
    used = [source for assignment in assignments.values() for source in assignment.sources]
    assert sorted(used) == sorted(shapes)
    assert sum(x.size for x in wanted.values()) == manifest["elements"] + sum(
        map(math.prod, further.values())
    )
    assert {x.dtype for x in wanted.values()} == {jnp.dtype(jnp.bfloat16)}


def test_patches_by_hand():
    x = jnp.arange(1 * 2 * 4 * 2).reshape(1, 1, 2, 4, 2)  # [B, T, H, W, C]
    patches = _patchify(x.astype(jnp.float32), (1, 2, 2))
    np.testing.assert_array_equal(patches, [[[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]])
    np.testing.assert_array_equal(_unpatchify(patches, (1, 1, 2), (1, 2, 2)), x)


@pytest.mark.slow
def test_memory_changes_the_velocity(network, inputs):
    *plain, memory = inputs
    assert np.abs(run(network, *plain) - run(network, *plain, memory)).max() > 1e-3


def test_a_memory_of_absent_rows_is_no_memory(network, inputs):
    """To the last bit where one program computes both; a program without memory may be rounded otherwise."""
    *plain, memory = inputs
    bias = jnp.full((B, M), -jnp.inf)
    absent = run(network, *plain, Memory(memory.tokens, bias))
    np.testing.assert_array_equal(absent, run(network, *plain, Memory(2 - memory.tokens, bias)))
    np.testing.assert_allclose(absent, run(network, *plain), rtol=1e-5, atol=1e-5)


def test_an_absent_row_is_a_row_left_out(network, inputs):
    *plain, memory = inputs
    absent = Memory(memory.tokens, memory.bias.at[:, 2].set(-jnp.inf))
    kept = np.array([0, 1, 3, 4])
    left_out = Memory(memory.tokens[:, kept], memory.bias[:, kept])
    np.testing.assert_allclose(run(network, *plain, absent), run(network, *plain, left_out), atol=1e-5)


@pytest.mark.slow
def test_memory_rows_have_no_order(network, inputs):
    *plain, memory = inputs
    turned = Memory(memory.tokens[:, ::-1], memory.bias[:, ::-1])
    np.testing.assert_allclose(run(network, *plain, turned), run(network, *plain, memory), atol=1e-5)


@pytest.mark.slow
def test_each_sample_is_its_own(network, inputs):
    whole = run(network, *inputs)
    last = run(network, *jax.tree.map(lambda x: x[1:], inputs))
    np.testing.assert_allclose(whole[1:], last, atol=1e-5)


@pytest.mark.slow
def test_remat_and_unrolling_change_nothing(network, inputs):
    def value_and_gradient(**options):
        structure, _ = abstract(lambda: DiT(CONFIG, compute=Compute(**options), rngs=nnx.Rngs(0)))

        def loss(memory):
            return jnp.square(structure.merge(network[1])(*inputs[:3], memory)).mean()

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(inputs[3]))

    plain = value_and_gradient()
    remats = [{"remat": remat} for remat in ("products", "attention", "blocks", "offload")]
    for options in (*remats, {"unroll": True}):
        for got, want in zip(value_and_gradient(**options), plain, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_wrong_channels_and_widths_are_named(network, inputs):
    latents, time, context, memory = inputs
    model = network[0].merge(network[1])
    with pytest.raises(UserError, match=r"latents.*\n.*width 4"):
        model(latents[..., :3], time, context)
    with pytest.raises(UserError, match=r"memory rows.*\n.*width 24"):
        model(latents, time, context, Memory(memory.tokens[..., :12], memory.bias))


def test_an_image_is_given_exactly_to_the_kinds_that_want_one(network, inputs):
    latents, time, context, _ = inputs
    frames, image = jnp.zeros((B, 3, 4, 6, 2)), jnp.zeros((B, 7, 5))
    config = dataclasses.replace(CONFIG, in_dim=6, image_dim=5)
    model = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))

    def shape(model, **given):
        given = context._replace(**given)
        return jax.eval_shape(lambda model, given: model(latents, time, given), model, given).shape

    assert shape(model, frames=frames, image=image) == latents.shape
    with pytest.raises(UserError, match=r"given frames.*\n.*width 2.*\n.*nothing"):
        shape(model, image=image)
    with pytest.raises(UserError, match=r"image tokens.*\n.*width 5.*\n.*7, 4"):
        shape(model, frames=frames, image=image[..., :4])
    with pytest.raises(UserError, match=r"image tokens.*\n.*nothing"):
        shape(network[0].merge(network[1]), image=image)


def test_timesteps_that_do_not_divide_the_tokens(network, inputs):
    latents, _, context, _ = inputs
    with pytest.raises(UserError, match="divides its 18 tokens"):
        network[0].merge(network[1])(latents, jnp.zeros((B, 4)), context)


@pytest.mark.slow
@pytest.mark.parametrize("runs", [3, 18], ids=["frame", "token"])
def test_equal_timesteps_of_all_frames_or_tokens_are_one(network, inputs, runs):
    latents, time, context, memory = inputs
    times = jnp.repeat(time[:, None], runs, axis=1)
    got, want = (run(network, latents, t, context, memory) for t in (times, time))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_memory_rows_are_modulated_like_the_noisy_frames():
    """One block with a given frame, against all rows joined, each with the modulation of its own timestep."""
    rng, (frames, patches, dim) = np.random.default_rng(0), (3, 4, CONFIG.dim)
    structure, shapes = abstract(lambda: Block(CONFIG, rngs=nnx.Rngs(0)))
    block = structure.merge(jax.tree.map(jnp.asarray, random_arrays(shapes)))
    x, tokens, context, time = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((B, frames * patches, dim), (B, M, dim), (B, 6, dim), (B, 2, 6, dim))
    )
    clean, noisy = time[:, :1], time[:, 1:]
    rotary = rotary_table((frames, 2, 2), CONFIG.head_dim)
    attention = block.self_attention

    def joined(x, tokens):
        rows = jnp.concatenate([jnp.repeat(clean, patches, 1), jnp.repeat(noisy, 2 * patches + M, 1)], axis=1)
        shift, scale, gate = (rows[:, :, i] + block.modulation[...][None, None, i] for i in range(3))
        h = layer_norm(jnp.concatenate([x, tokens], axis=1), CONFIG.eps) * (1 + scale) + shift
        key, value = attention.key_value(h)
        count = x.shape[1]
        query = rotate(attention.query(h[:, :count]), rotary)
        key = jnp.concatenate([rotate(key[:, :count], rotary), key[:, count:]], axis=1)
        weights = jax.nn.softmax(jnp.einsum("BSNK,BJNK->BNSJ", query, key) * CONFIG.head_dim**-0.5)
        return x + attention.out(jnp.einsum("BNSJ,BJNK->BSNK", weights, value)) * gate[:, :count]

    # without cross-attention and feed-forward, what is left of the block is its self-attention
    for part in (block.cross_attention.o, block.feed_forward.down):
        part.kernel[...], part.bias[...] = jnp.zeros_like(part.kernel[...]), jnp.zeros_like(part.bias[...])
    per_frame = jnp.concatenate([clean, noisy, noisy], axis=1)
    got = block(x, context, None, per_frame, rotary, Memory(tokens, jnp.zeros((B, M))), noisy)
    np.testing.assert_allclose(got, joined(x, tokens), atol=1e-5)


def test_the_memory_takes_the_highest_timestep(network):
    model = network[0].merge(network[1])
    times = jnp.array([[0.0, 700.0, 300.0], [500.0, 0.0, 0.0]])
    _, modulation, highest = model._embed_time(times, tokens=18)
    np.testing.assert_array_equal(highest[:, 0], jnp.stack([modulation[0, 1], modulation[1, 0]]))


def test_timesteps_are_embedded_in_float32():
    structure, shapes = abstract(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))
    half, _ = abstract(lambda: DiT(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in random_arrays(shapes).items()}
    full = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    times = jnp.array([[999.0], [998.0]])
    got, want = (x._embed_time(times, tokens=18) for x in (half.merge(arrays), structure.merge(full)))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("high", [True, False])
def test_one_of_two_experts_serves(network, inputs, high):
    structure, arrays = network
    other = structure.merge({name: 1.1 * x for name, x in arrays.items()})
    graph, state = nnx.split(Experts(structure.merge(arrays), other))
    got = jax.jit(
        lambda state, high, *inputs: with_expert(nnx.merge(graph, state), high, lambda dit: dit(*inputs))
    )(state, high, *inputs)
    expected = run(network, *inputs) if high else jax.jit(lambda *inputs: other(*inputs))(*inputs)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_the_sum_of_blocks_is_float32():
    """In bfloat16 it would be rounded three times a block: 0.014 here instead of 0.007."""
    config = dataclasses.replace(CONFIG, num_layers=24)
    structure, shapes = abstract(lambda: DiT(config, rngs=nnx.Rngs(0)))
    half, _ = abstract(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in random_arrays(shapes).items()}
    keys = jax.random.split(jax.random.key(0), 2)
    inputs = (
        jax.random.normal(keys[0], (B, 3, 4, 6, 4)),
        jnp.array([900.0, 20.0]),
        Conditioning(jax.random.normal(keys[1], (B, 6, 8))),
    )
    want = run((structure, {name: x.astype(jnp.float32) for name, x in arrays.items()}), *inputs)
    error = jnp.linalg.norm(run((half, arrays), *inputs) - want) / jnp.linalg.norm(want)
    assert error < 0.01


@pytest.mark.slow
def test_8_bits_on_a_mesh(inputs):
    structure, shapes = abstract(lambda: DiT(CONFIG, int8=True, rngs=nnx.Rngs(0)))
    arrays = random_arrays({name: x for name, x in shapes.items() if x.dtype != jnp.int8})
    rng = np.random.default_rng(0)
    for name, x in shapes.items():
        if x.dtype == jnp.int8:
            arrays[name] = rng.integers(-127, 127, x.shape, np.int8)
            arrays[name.replace("kernel", "scale")] *= 0.001
    one = run((structure, arrays), *inputs)
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    with jax.set_mesh(mesh):
        divided = {name: jax.device_put(x, sharding_for(name, x.shape, mesh)) for name, x in arrays.items()}
        np.testing.assert_allclose(run((structure, divided), *inputs), one, rtol=1e-5, atol=1e-5)
