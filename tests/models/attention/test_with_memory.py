"""Attention against a softmax written out by hand, and what the bias of a memory row means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.models.attention.with_memory import attention

B, S, M, N, K = 2, 5, 3, 2, 4


@pytest.fixture
def rows():
    keys = jax.random.split(jax.random.key(0), 5)
    lengths = (S, S, S, M, M)
    return [jax.random.normal(key, (B, length, N, K)) for key, length in zip(keys, lengths, strict=True)]


def by_hand(query, key, value, bias):
    """float64, one query at a time."""
    query, key, value, bias = (np.asarray(x, np.float64) for x in (query, key, value, bias))
    out = np.zeros_like(query)
    for b, s, n in np.ndindex(*query.shape[:3]):
        logits = key[b, :, n] @ query[b, s, n] / np.sqrt(K) + bias[b]
        weights = np.exp(logits - logits.max())
        out[b, s, n] = weights @ value[b, :, n] / weights.sum()
    return out


def test_without_memory(rows):
    query, key, value, *_ = rows
    np.testing.assert_allclose(
        attention(query, key, value), by_hand(query, key, value, np.zeros((B, S))), atol=1e-6
    )


def test_two_keys_with_known_weights():
    query, key = jnp.ones((1, 1, 1, 1)), jnp.log(jnp.array([1.0, 3.0])).reshape(1, 2, 1, 1)
    value = jnp.array([0.0, 8.0]).reshape(1, 2, 1, 1)
    assert attention(query, key, value).item() == pytest.approx(6)  # (1 * 0 + 3 * 8) / 4
    extra = jnp.log(jnp.array([4.0])).reshape(1, 1, 1, 1), jnp.full((1, 1, 1, 1), 2.0)
    assert attention(query, key, value, *extra, jnp.zeros((1, 1))).item() == pytest.approx(
        4
    )  # (24 + 4 * 2) / 8
    assert attention(query, key, value, *extra, jnp.log(jnp.full((1, 1), 2.0))).item() == pytest.approx(
        40 / 12
    )


def test_memory_joins_the_softmax(rows):
    query, key, value, memory_key, memory_value = rows
    bias = jax.random.normal(jax.random.key(1), (B, M))
    got = attention(query, key, value, memory_key, memory_value, bias)
    joined = [np.concatenate(pair, axis=1) for pair in ((key, memory_key), (value, memory_value))]
    want = by_hand(query, *joined, np.concatenate([np.zeros((B, S)), bias], axis=1))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_log_multiplicity_is_repetition(rows):
    query, key, value, memory_key, memory_value = rows
    counts = np.array([1, 2, 7])
    bias = jnp.broadcast_to(jnp.log(jnp.asarray(counts, jnp.float32)), (B, M))
    repeated = [jnp.repeat(x, counts, axis=1) for x in (memory_key, memory_value)]
    got = attention(query, key, value, memory_key, memory_value, bias)
    want = attention(query, key, value, *repeated, jnp.zeros((B, counts.sum())))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_absent_rows_contribute_nothing(rows):
    query, key, value, memory_key, memory_value = rows
    none = attention(query, key, value, memory_key, memory_value, jnp.full((B, M), -jnp.inf))
    np.testing.assert_array_equal(none, attention(query, key, value))
    bias = jnp.zeros((B, M)).at[:, 1].set(-jnp.inf)
    one_less = attention(query, key, value, memory_key[:, ::2], memory_value[:, ::2], jnp.zeros((B, 2)))
    np.testing.assert_allclose(
        attention(query, key, value, memory_key, memory_value, bias), one_less, atol=1e-7, rtol=1e-6
    )


def test_no_rows_at_all(rows):
    query, key, value, memory_key, memory_value = rows
    got = attention(query, key, value, memory_key[:, :0], memory_value[:, :0], jnp.zeros((B, 0)))
    np.testing.assert_array_equal(got, attention(query, key, value))


@pytest.mark.slow
def test_gradients_stay_finite_with_absent_rows(rows):
    bias = jnp.full((B, M), -jnp.inf)
    grads = jax.grad(lambda *a: attention(*a, bias).sum(), argnums=(0, 1, 2, 3, 4))(*rows)
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_array_equal(grads[3], 0)
    np.testing.assert_array_equal(grads[4], 0)


def test_large_scores_do_not_overflow(rows):
    query, key, value, memory_key, memory_value = rows
    got = attention(1e3 * query, 1e3 * key, value, 1e3 * memory_key, memory_value, jnp.zeros((B, M)))
    assert np.isfinite(got).all()


def test_half_precision_in_and_out(rows):
    half = [x.astype(jnp.bfloat16) for x in rows]
    got = attention(*half, jnp.zeros((B, M)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), attention(*rows, jnp.zeros((B, M))), atol=0.05)
