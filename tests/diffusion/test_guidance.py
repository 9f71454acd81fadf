"""Guidance by hand: which branch is given what, and how the two are combined."""

import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.diffusion.guidance import guided
from ditmem_jax.types import Conditioning, Memory

X = jnp.arange(16.0).reshape(2, 1, 2, 2, 2)
POSITIVE, NEGATIVE = (Conditioning(jnp.array([[[a]], [[b]]])) for a, b in ((1.0, 2.0), (3.0, 5.0)))
MEMORY = Memory(jnp.array([[[7.0], [100.0]], [[11.0], [13.0]]]), jnp.array([[0.0, -jnp.inf], [0.0, 0.0]]))


def backbone(latents, timestep, conditioning, memory):
    """Latents, timestep, text and the sum of the tokens that are there: a place of the decimals for each."""
    assert timestep.shape == latents.shape[:1]
    tokens = 0.0 if memory is None else (jnp.exp(memory.bias)[..., None] * memory.tokens).sum((1, 2))
    told = 0.001 * timestep + 0.01 * conditioning.text[:, 0, 0] + tokens
    return latents + told[:, None, None, None, None]


@pytest.mark.parametrize("memory", [None, MEMORY])
@pytest.mark.parametrize("in_negative", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_guidance_by_hand(memory, in_negative, scale):
    tokens = np.array([0.0, 0.0] if memory is None else [7.0, 24.0])
    positive = 0.5 + 0.01 * np.array([1, 2]) + tokens
    negative = 0.5 + 0.01 * np.array([3, 5]) + tokens * in_negative
    expected = np.asarray(X) + (negative + scale * (positive - negative)).reshape(-1, 1, 1, 1, 1)
    velocity = guided(backbone, POSITIVE, NEGATIVE, memory, scale, memory_in_negative=in_negative)
    np.testing.assert_allclose(velocity(X, jnp.float32(0.5)), expected, rtol=1e-5)


def test_the_memory_goes_to_both_branches_unless_told_otherwise():
    x, sigma = X[:1, ..., :1], jnp.float32(0.25)
    given = (
        backbone,
        *(Conditioning(c.text[:1]) for c in (POSITIVE, NEGATIVE)),
        Memory(MEMORY.tokens[:1], MEMORY.bias[:1]),
    )
    both = guided(*given, 2.0, memory_in_negative=True)(x, sigma)
    np.testing.assert_array_equal(guided(*given, 2.0)(x, sigma), both)


def test_without_guidance_the_transformer_runs_once():
    calls = []

    def counting(*given):
        calls.append(1)
        return backbone(*given)

    guided(counting, POSITIVE, NEGATIVE, MEMORY, 1.0)(X, jnp.float32(0.5))
    assert len(calls) == 1
