"""Norms, embeddings and feed-forward against hand-written arrays."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.models.layers import (
    FeedForward,
    LayerNorm,
    RMSNorm,
    layer_norm,
    rotary_table,
    rotate,
    sinusoidal_embedding,
)
from ditmem_jax.models.quantised import Int8Linear, to_int8


def test_layer_norm():
    x = jnp.array([[1.0, 3.0], [-2.0, 2.0]])
    np.testing.assert_allclose(layer_norm(x, 0.0), [[-1, 1], [-1, 1]])
    norm = LayerNorm(2, 0.0)
    norm.scale[...], norm.bias[...] = jnp.array([2.0, 3.0]), jnp.array([10.0, 20.0])
    np.testing.assert_allclose(norm(x), [[8, 23], [8, 23]])


def test_rms_norm():
    norm = RMSNorm(2, 0.0)
    norm.scale[...] = jnp.array([1.0, 10.0])
    np.testing.assert_allclose(norm(jnp.array([[3.0, 4.0]])) * np.sqrt(12.5), [[3, 40]], rtol=1e-6)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norms_compute_in_float32(norm):
    x = (1000 + jax.random.normal(jax.random.key(0), (4, 256))).astype(jnp.bfloat16)
    half, full = norm(256, 1e-6, dtype=jnp.bfloat16)(x), norm(256, 1e-6)(x.astype(jnp.float32))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), full, rtol=2**-8)


def test_sinusoidal_embedding():
    got = sinusoidal_embedding(jnp.array([0.0, 100.0]), 4)
    # frequencies 1 and 1/100
    want = [[1, 1, 0, 0], [np.cos(100), np.cos(1), np.sin(100), np.sin(1)]]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_rotary_angles_split_a_head_of_128_as_44_42_42():
    cos, sin = np.asarray(rotary_table((2, 3, 4), 128)).reshape(2, 2, 3, 4, 64)
    np.testing.assert_array_equal(cos[0, 0, 0], 1)
    np.testing.assert_array_equal(np.flatnonzero(sin[1, 0, 0]), np.arange(22))
    np.testing.assert_array_equal(np.flatnonzero(sin[0, 1, 0]), np.arange(22, 43))
    np.testing.assert_array_equal(np.flatnonzero(sin[0, 0, 1]), np.arange(43, 64))
    np.testing.assert_allclose(sin[0, 2, 3, [22, 43]], np.sin([2, 3]), rtol=1e-6)  # the first frequency is 1
    np.testing.assert_allclose(cos[1, 0, 0, 1], np.cos(10000 ** (-2 / 44)), rtol=1e-6)


def test_a_program_holds_the_rotary_embedding_of_each_axis_only():
    """Tokens of a clip of 720p: 21 x 45 x 80, of which the table would be 38 MB."""
    text = jax.jit(lambda: rotary_table((21, 45, 80), 128)).lower().compile().as_text()
    sizes = [
        math.prod(map(int, found.split(",")))
        for found in re.findall(r"f32\[([\d,]+)\][^=]* constant\(", text)
    ]
    assert max(sizes) <= 2 * 80 * 22


def test_rotation_of_pairs():
    x = jnp.array([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    got = rotate(x, jnp.array([[[0.0, -1.0]], [[1.0, 0.0]]]))  # by 90 and 180 degrees
    np.testing.assert_allclose(got.ravel(), [0, 1, 0, -2], atol=1e-6)


def test_rotated_products_depend_on_distance_only():
    query, key = (jax.random.normal(jax.random.key(i), (1, 1, 1, 12)) for i in (0, 1))
    table = rotary_table((1, 1, 10), 12)

    def score(i, j):
        return (rotate(query, table[:, i : i + 1]) * rotate(key, table[:, j : j + 1])).sum()

    np.testing.assert_allclose(score(2, 5), score(6, 9), rtol=1e-4)


def test_feed_forward_uses_the_tanh_gelu():
    layer = FeedForward(1, 1, 1, rngs=nnx.Rngs(0))
    for linear in (layer.up, layer.down):
        linear.kernel[...], linear.bias[...] = jnp.ones((1, 1)), jnp.zeros(1)
    x = np.float32(0.7)
    want = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(layer(jnp.full((1, 1), x)), [[want]], rtol=1e-5)


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_a_matrix_in_8_bits_multiplies_like_the_matrix_that_it_stands_for(dtype, bound):
    rng = np.random.default_rng(0)
    rounded, scale = to_int8(
        rng.standard_normal((64, 5)).astype(np.float32) * np.array([1, 1, 1, 1, 0], np.float32)
    )
    layer = Int8Linear(64, 5, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    layer.kernel[...], layer.scale[...], layer.bias[...] = rounded, scale, jnp.arange(5, dtype=dtype)
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    matrix = np.concatenate(
        [rounded[:32] * scale[0].astype(np.float32), rounded[32:] * scale[1].astype(np.float32)]
    )
    want, got = x @ matrix + np.arange(5), layer(jnp.asarray(x))
    assert got.dtype == dtype
    assert np.linalg.norm(got.astype(np.float32) - want) < bound * np.linalg.norm(want)
