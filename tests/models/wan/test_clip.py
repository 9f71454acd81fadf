"""CLIP's image encoder by its own terms; that it is transformers' is in tests/convert/test_peers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.config import CLIPConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.clip import MEAN, CLIPVision
from tests.tiny import random_arrays

CONFIG = CLIPConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=2, image_size=28)


def test_the_size_of_wan():
    structure, shapes = abstract(lambda: CLIPVision(CLIPConfig(), rngs=nnx.Rngs(0)))
    assert sum(x.size for x in shapes.values()) == pytest.approx(611e6, rel=0.01)
    pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    tokens = jax.eval_shape(lambda arrays, x: structure.merge(arrays)(x), shapes, pixels)
    assert tokens.shape == (1, 257, 1280)


def test_patches_and_colours_by_hand():
    """Without blocks' outputs, a token is the norm of its patch's embedding and position."""
    structure, shapes = abstract(lambda: CLIPVision(CONFIG, rngs=nnx.Rngs(0)))
    arrays = random_arrays(shapes)
    for name in ("attention.o", "feed_forward.down"):
        for leaf in ("kernel", "bias"):
            arrays[f"blocks.{name}.{leaf}"] *= 0
    clip = structure.merge({name: jnp.asarray(x) for name, x in arrays.items()})
    grey = jnp.asarray(MEAN, jnp.float32).reshape(1, 1, 1, 3) * 2 - 1
    pixels = jnp.broadcast_to(grey, (1, 28, 28, 3)).at[0, :14, 14:].set(1.0)  # the second patch is white
    tokens = np.asarray(clip(pixels))[0]

    def norm(x):
        x = (x - x.mean()) / np.sqrt(x.var() + CONFIG.eps)
        return x * arrays["norm.scale"] + arrays["norm.bias"]

    white = (1 - np.array(MEAN)) / np.array([0.26862954, 0.26130258, 0.27577711])
    patch = np.tile(white, 14 * 14) @ arrays["patch_embedding.kernel"]
    rows = [arrays["class_token"], 0, patch, 0, 0]
    expected = [norm(row + position) for row, position in zip(rows, arrays["positions"], strict=True)]
    np.testing.assert_allclose(tokens, expected, atol=1e-4)


def test_sizes_that_cannot_be():
    with pytest.raises(UserError, match=r"clip\.dim must divide"):
        CLIPConfig(dim=15)
    with pytest.raises(UserError, match=r"clip\.image_size must divide"):
        CLIPConfig(image_size=225)
