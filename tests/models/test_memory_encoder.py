"""The memory encoder: multiplicities, absent videos, symmetries, names, errors.

The golden vectors of the released encoder are compared in tests/test_parity.py.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ditmem_jax.config import MemoryConfig, MeshConfig
from ditmem_jax.convert.engine import assign, load, targets
from ditmem_jax.convert.memory import table
from ditmem_jax.errors import UserError
from ditmem_jax.models import memory_encoder as m
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.state import abstract
from ditmem_jax.parallel.mesh import make_mesh
from tests.parity.golden import GoldenFile
from tests.tiny import random_arrays

TESTS = Path(__file__).parents[1]
TINY = dict(
    dim=16,
    in_dim=3,
    stages=((8, 3, 1, 2), (8, 3, 1, 1)),
    latent_grid=(5, 4, 4),
    num_heads=2,
    filter="radial",
    norm="group",
    tokens=(2, 1, 2),
    dropout=0.0,
)


@partial(nnx.jit, static_argnames="training")
def run(encoder, latents, present=None, training=False):
    return encoder(latents, present, training=training)


def make(**changes) -> MemoryEncoder:
    structure, shapes = abstract(lambda: MemoryEncoder(MemoryConfig(**TINY | changes), rngs=nnx.Rngs(0)))
    arrays = {name: np.abs(x) if name.endswith("var") else x for name, x in random_arrays(shapes).items()}
    return structure.merge(jax.tree.map(jnp.asarray, arrays))


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def group():
    return make()


@pytest.fixture(scope="module")
def batch():
    """Batch norm, and two time steps for five nominal tokens: rows stand for 2, 1 and 2 of them."""
    return make(norm="batch", tokens=5)


@pytest.mark.parametrize(
    ("grid", "kernel", "stride"),
    [((6, 5, 7), 3, 1), ((9, 8, 11), 7, 4), ((3, 2, 2), 3, 1), ((5, 7, 7), 7, 4)],
)
def test_convolution(grid, kernel, stride):
    conv, x = m.Conv3d(2, 3, kernel, stride, rngs=nnx.Rngs(0), dtype=jnp.float32), noise(2, *grid, 2)
    pad = [(kernel // 2, kernel // 2)] * 3
    layout = ("NTHWC", "THWIO", "NTHWC")
    want = jax.lax.conv_general_dilated(x, conv.kernel[...], (stride,) * 3, pad, dimension_numbers=layout)
    np.testing.assert_allclose(conv(x), want, atol=1e-5)


def test_adaptive_bins_by_hand():
    np.testing.assert_allclose(
        m.adaptive_bins(5, 3),
        [[1 / 2, 1 / 2, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 1 / 2, 1 / 2]],
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("length", "bins", "counts"),
    [(1, 100, [100]), (2, 10, [5, 5]), (3, 10, [3, 1, 2, 1, 3]), (7, 3, [1, 1, 1])],
)
def test_equal_bins_are_counted(length, bins, counts):
    rows, found = m.distinct_bins(length, bins)
    np.testing.assert_array_equal(found, counts)
    np.testing.assert_array_equal(np.repeat(rows, found, axis=0), m.adaptive_bins(length, bins))


def test_max_pool_leaves_out_what_fills_no_block():
    x = jnp.arange(3 * 2 * 5, dtype=jnp.float32).reshape(1, 3, 2, 5, 1)
    np.testing.assert_array_equal(m._max_pool(x, 2).ravel(), [16, 18])


@pytest.mark.slow
def test_max_pool_passes_on_the_whole_gradient(monkeypatch):
    """Inside a compiled encoder, where comparing values with their maximum was off by a tenth."""
    encoder = make(stages=((16, 3, 1, 1), (16, 3, 1, 2)), latent_grid=(3, 4, 4), tokens=(1, 1, 1))
    graph, params = nnx.split(encoder)

    def gradient(params, x):
        return jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(x, training=True).tokens).sum())(params)

    def window(x, size):
        return nnx.max_pool(x, (size,) * 3, (size,) * 3)

    x = noise(8, 3, 3, 4, 4, 3)
    got = jax.jit(lambda params, x: gradient(params, x))(params, x)
    monkeypatch.setattr(m, "_max_pool", window)
    want = jax.jit(lambda params, x: gradient(params, x))(params, x)
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(want))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)


@pytest.mark.slow
def test_attention_with_multiplicities_is_that_over_repeated_rows(group):
    x, counts = noise(2, 5, 16), np.array([3, 1, 2, 1, 3])
    bias = jnp.tile(jnp.log(jnp.asarray(counts, jnp.float32))[None], (2, 1))
    want = group.self_attention(jnp.repeat(x, counts, axis=1), jnp.zeros((2, counts.sum())))
    got = jnp.repeat(group.self_attention(x, bias), counts, axis=1)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_rows_and_bias(norm, request):
    memory = run(request.getfixturevalue(norm), noise(2, 3, 5, 4, 4, 3))
    counts = [1, 1, 1, 1] if norm == "group" else [2, 1, 2]
    assert memory.tokens.shape == (2, 2 * 3 * len(counts), 16)
    np.testing.assert_allclose(jnp.exp(memory.bias), np.tile(counts, (2, 6)), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "training"), [("group", False), ("batch", True)])
def test_an_absent_video_changes_nothing(norm, training, request):
    encoder = nnx.clone(request.getfixturevalue(norm))
    x = noise(2, 2, 5, 4, 4, 3)
    absent = jnp.full((2, 1, 5, 4, 4, 3), jnp.nan)
    other = nnx.clone(encoder)
    want = run(other, x, training=training)
    present = jnp.array([[True, False, True]] * 2)
    got = run(encoder, jnp.concatenate([x[:, :1], absent, x[:, 1:]], 1), present, training=training)
    tokens = got.tokens.reshape(2, 2, 3, -1, 16)[:, :, ::2].reshape(want.tokens.shape)
    bias = got.bias.reshape(2, 2, 3, -1)
    np.testing.assert_allclose(tokens, want.tokens, atol=2e-5)
    np.testing.assert_array_equal(bias[:, :, ::2].reshape(want.bias.shape), want.bias)
    assert (bias[:, :, 1] == -jnp.inf).all()
    assert jnp.isfinite(got.tokens).all()
    for ours, theirs in zip(
        *(jax.tree.leaves(nnx.state(e, nnx.BatchStat)) for e in (encoder, other)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_without_any_video_everything_stays_finite(norm, request):
    graph, params, rest = nnx.split(request.getfixturevalue(norm), nnx.Param, ...)

    @jax.jit
    def step(params, rest, x):
        def loss(params):
            encoder = nnx.merge(graph, params, rest, copy=True)
            memory = encoder(x, jnp.zeros((2, 2), bool), training=True)
            return jnp.square(memory.tokens).sum(), (memory.bias, nnx.state(encoder, nnx.BatchStat))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, (bias, statistics)), grads = step(params, rest, noise(2, 2, 5, 4, 4, 3))
    assert (bias == -jnp.inf).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads, statistics)))
    before = nnx.filter_state(rest, nnx.BatchStat)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(statistics), strict=True):
        np.testing.assert_array_equal(old, new)


def test_videos_in_another_order_give_rows_in_another_order(group):
    x = noise(1, 3, 5, 4, 4, 3)
    order = np.array([2, 0, 1])
    rows, permuted = (run(group, x[:, o]).tokens.reshape(2, 3, -1, 16) for o in (np.arange(3), order))
    np.testing.assert_allclose(permuted, rows[:, order], atol=1e-5)


def test_shuffle_keeps_each_video_with_its_mark():
    ids = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    latents, present = m.shuffle_videos(ids[:, :, None, None, None, None], ids % 3 == 0, jax.random.key(0))
    latents = latents[..., 0, 0, 0, 0]
    np.testing.assert_array_equal(latents % 3 == 0, present)
    np.testing.assert_array_equal(jnp.sort(latents, axis=1), ids)
    assert len({tuple(row % 6) for row in np.asarray(latents)}) > 1


def test_batch_norm_by_hand():
    norm = m.BatchNorm(1)
    x = jnp.array([[1.0, 3.0], [5.0, 7.0], [100.0, 100.0]]).reshape(3, 1, 1, 2, 1)
    y = norm(x, jnp.array([True, True, False]), training=True)
    np.testing.assert_allclose(y[:2].ravel(), np.array([-3, -1, 1, 3]) / np.sqrt(5 + 1e-5), rtol=1e-5)
    np.testing.assert_allclose([norm.mean[0], norm.var[0]], [0.4, 0.9 + 0.1 * 20 / 3], rtol=1e-6)


@pytest.mark.slow
def test_statistics_of_a_sharded_batch_are_those_of_the_whole(batch):
    x = noise(8, 1, 5, 4, 4, 3)
    mesh = make_mesh(MeshConfig(data=8))
    one, many = nnx.clone(batch), nnx.clone(batch)
    want = run(one, x, training=True)
    got = run(many, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), training=True)
    np.testing.assert_allclose(got.tokens, want.tokens, atol=1e-5)
    for ours, theirs in zip(
        *(jax.tree.leaves(nnx.state(e, nnx.BatchStat)) for e in (many, one)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_bfloat16_runs_on_float32_weights():
    encoder = nnx.eval_shape(
        lambda: MemoryEncoder(MemoryConfig(**TINY), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    )
    assert {leaf.dtype for leaf in targets(encoder).values()} == {jnp.dtype(jnp.float32)}
    x = jax.ShapeDtypeStruct((1, 2, 5, 4, 4, 3), jnp.bfloat16)
    leaves = nnx.eval_shape(lambda encoder, x: jax.tree.leaves(encoder(x, training=False)), encoder, x)
    assert [leaf.dtype for leaf in leaves] == [jnp.bfloat16, jnp.float32]


def test_dropout_is_drawn_anew_for_each_generator():
    encoder, x = make(dropout=0.5), noise(1, 1, 5, 4, 4, 3)
    draw = nnx.jit(lambda encoder, key: encoder(x, training=True, rngs=nnx.Rngs(dropout=key)).tokens)
    first, second = (draw(encoder, jax.random.key(seed)) for seed in (0, 1))
    assert jnp.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, draw(encoder, jax.random.key(0)))
    nnx.eval_shape(
        lambda encoder: encoder(x, training=False).tokens, encoder
    )  # none is drawn, so none is needed


def test_radial_filters_take_any_grid(group):
    assert run(group, noise(1, 1, 7, 6, 5, 3)).tokens.shape == (1, 8, 16)


@pytest.mark.slow
def test_a_learned_strength_is_a_bias_of_its_own_per_band():
    encoder = make(strength=0.5)
    latents = noise(1, 2, *encoder.config.latent_grid, encoder.config.in_dim)
    outputs = []
    for strengths in ([1.0, 1.0], [0.5, 0.25]):
        encoder.log_strength[...] = jnp.log(jnp.array(strengths))
        outputs.append(encoder(latents, jnp.array([[True, False]]), training=False))
    before, after = outputs
    half = before.bias.shape[1] // 2
    np.testing.assert_array_equal(after.tokens, before.tokens)
    np.testing.assert_allclose(after.bias[:, :half], before.bias[:, :half] + np.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(after.bias[:, half:], before.bias[:, half:] + np.log(0.25), rtol=1e-6)


def test_full_size_names_and_shapes():
    manifest = json.loads((TESTS / "manifests" / "dit_mem_1.3b.json").read_text())
    sizes = {name: tuple(shape) for name, shape in manifest["tensors"].items()}
    config = MemoryConfig(dim=1536)
    assert config.feature_grid == (1, 3, 6)
    encoder = nnx.eval_shape(lambda: MemoryEncoder(config, rngs=nnx.Rngs(0)))
    for prefix in ("", "dit_mem.", "pipe.dit_mem."):
        for left_out in (".cnn.", ".conv_block", None):
            names = {
                prefix + name: shape for name, shape in sizes.items() if not (left_out and left_out in name)
            }
            assignments, equal = assign(table(config), names, targets(encoder))
            assert len(assignments) == len(targets(encoder))
            assert len(equal) == (0 if left_out else 28)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(encoder, nnx.Param)))
    assert parameters == 78_777_856


@pytest.mark.parametrize(
    "changes", [dict(), dict(filter="released", norm="batch", tokens=5), dict(strength=0.1)]
)
def test_the_table_covers_every_variant(changes):
    config = MemoryConfig(**TINY | changes)
    wanted = targets(nnx.eval_shape(lambda: MemoryEncoder(config, rngs=nnx.Rngs(0))))
    assert sorted(rule.target for rule in table(config).rules) == sorted(wanted)


def test_aliases_that_differ_are_named():
    golden = GoldenFile.read(TESTS / "golden" / "encoder_one_step.safetensors")
    config = MemoryConfig(
        dim=48, in_dim=4, stages=((8, 7, 4, 2), (12, 3, 1, 2)), latent_grid=(21, 28, 44), tokens=10
    )
    encoder = nnx.eval_shape(lambda: MemoryEncoder(config, rngs=nnx.Rngs(0)))
    tensors = golden.under("w/")
    tensors["high_pass_module.cnn.0.conv.bias"] = tensors["high_pass_module.conv_block1.conv.bias"] + 1
    with pytest.raises(UserError, match=r"cnn\.0\.conv\.bias .* differ"):
        load(encoder, table(config), tensors)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        (dict(), (1, 1, 5, 4, 4, 2), "3 channels"),
        (dict(), (1, 1, 5, 4, 1, 3), "pools the latents away"),
        (dict(dropout=0.1), (1, 1, 5, 4, 4, 3), "generator"),
        (dict(filter="released"), (1, 1, 5, 6, 4, 3), r"feature grid of \(5, 4, 4\)\n.*\(5, 6, 4\)"),
        (dict(tokens=(3, 1, 1)), (1, 1, 5, 4, 4, 3), r"at most \(2, 2, 2\)"),
    ],
)
def test_bad_input_is_named(changes, shape, message):
    def call():
        encoder = MemoryEncoder(MemoryConfig(**TINY | changes), rngs=nnx.Rngs(0))
        return encoder(jnp.zeros(shape), training=True).tokens

    with pytest.raises(UserError, match=message):
        jax.eval_shape(call)


def test_a_filter_for_another_grid_is_pooled_to_the_built_one():
    config = MemoryConfig(**TINY | dict(filter="released", tokens=5))

    def call():
        encoder = MemoryEncoder(config, rngs=nnx.Rngs(0), filter_grid=(8, 8, 6))
        return encoder(jnp.zeros((1, 2, 8, 8, 6, 3)), training=False).tokens

    assert jax.eval_shape(call).shape == (1, 2 * 2 * 3, 16)
