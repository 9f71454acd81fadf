"""The text encoder: golden vectors, full-size names and shapes, masks, position buckets by hand."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.config import UMT5Config
from ditmem_jax.convert.engine import assign, targets
from ditmem_jax.convert.umt5 import table
from ditmem_jax.errors import UserError
from ditmem_jax.models.wan.umt5 import UMT5, position_buckets
from tests.parity import umt5 as parity
from tests.parity.golden import GoldenFile

TESTS = Path(__file__).parents[2]
TINY = UMT5Config(
    dim=16, dim_attn=24, dim_ffn=32, num_heads=4, num_layers=2, vocab=50, num_buckets=8, max_dist=16
)


@pytest.fixture(scope="module")
def golden():
    return GoldenFile.read(TESTS / "golden" / "text_encoder.safetensors")


def test_golden(golden):
    assert parity.recognise(golden) == "text_encoder"
    for check in parity.check(golden):
        assert check.ok, f"{check.name}: {check.error:.2e}"


def test_full_size_names_and_shapes():
    manifest = json.loads((TESTS / "manifests" / "umt5_xxl_encoder.json").read_text())
    wanted = targets(nnx.eval_shape(lambda: UMT5(UMT5Config(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))
    assignments, _ = assign(
        table(), {name: tuple(shape) for name, shape in manifest["tensors"].items()}, wanted
    )
    used = [source for assignment in assignments.values() for source in assignment.sources]
    assert sorted(used) == sorted(manifest["tensors"])
    assert sum(leaf.size for leaf in wanted.values()) == manifest["elements"]


def test_each_prompt_is_independent_of_its_padding_and_of_the_batch(golden):
    umt5 = parity.build(golden)
    run = nnx.jit(UMT5.__call__)
    ids = np.asarray([[3, 4, 1, 0, 0, 0], [5, 6, 7, 8, 9, 1]], np.int32)
    mask = np.asarray([[True] * 3 + [False] * 3, [True] * 6])
    both = run(umt5, ids, mask)
    np.testing.assert_array_equal(both[0, 3:], 0)
    np.testing.assert_allclose(both[0, :3], run(umt5, ids[:1, :3], mask[:1, :3])[0], atol=2e-5)
    ids[0, 4] = 33
    np.testing.assert_allclose(both, run(umt5, ids, mask), atol=2e-5)


def test_each_layer_has_its_own_positions(golden):
    first, second = parity.build(golden).blocks.positions.embedding[...]
    assert not np.array_equal(first, second)


def test_bfloat16_throughout():
    umt5 = nnx.eval_shape(lambda: UMT5(TINY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in targets(umt5).values()} == {jnp.dtype(jnp.bfloat16)}
    shape = jax.ShapeDtypeStruct((1, 4), jnp.int32), jax.ShapeDtypeStruct((1, 4), bool)
    assert nnx.eval_shape(UMT5.__call__, umt5, *shape).dtype == jnp.bfloat16


def test_position_buckets_by_hand():
    # 0 to 3 look back, 4 to 7 ahead; distances 0 and 1 stand alone, 2 to 5 share one, 6 and more the last.
    row = position_buckets(20, num_buckets=8, max_dist=16)[10]
    np.testing.assert_array_equal(row, [3, 3, 3, 3, 3, 2, 2, 2, 2, 1, 0, 5, 6, 6, 6, 6, 7, 7, 7, 7])


def test_boundaries_of_the_released_buckets():
    row = position_buckets(200, num_buckets=32, max_dist=128)[:, 0]
    assert [int(row[d]) for d in (7, 8, 11, 12, 15, 16, 31, 32, 63, 64, 91, 128, 199)] == [
        7, 8, 8, 9, 9, 10, 11, 12, 13, 14, 15, 15, 15
    ]  # fmt: skip


def test_heads_must_divide():
    with pytest.raises(UserError, match="dim_attn"):
        UMT5(UMT5Config(dim_attn=10, num_heads=4), rngs=nnx.Rngs(0))
