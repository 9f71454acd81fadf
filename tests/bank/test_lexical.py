"""Weights of words in a caption: rare words, numbers as wholes; the same on every machine."""

import math

import numpy as np
import pytest

from ditmem_jax.bank.lexical import LexicalEmbedder, words
from ditmem_jax.worlds.captions import caption
from ditmem_jax.worlds.laws import PHENOMENA, splits
from ditmem_jax.worlds.simulate import Clip, sample_scene

NO_VIDEO, NO_PATH = np.zeros((0, 0, 0, 3), np.uint8), np.zeros((0, 1, 2))


def test_words():
    assert words("On Zorvex, g = 6.2 m/s^2: 3 balls.") == [
        "on",
        "zorvex",
        "g",
        "6.2",
        "m",
        "s",
        "2",
        "3",
        "balls",
    ]


def test_unit_vectors():
    embedder = LexicalEmbedder.fit(["a ball", "a block"], dim=64)
    vectors = embedder.documents(["a ball", "the ball ball", "..."])
    assert vectors.dtype == np.float32 and vectors.shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0], atol=1e-6)


def test_cosine_by_hand():
    # Long vectors, so that no two of these words overlap. a: 2 of 2 captions; ball: 1; block: 1.
    embedder = LexicalEmbedder.fit(["a ball", "a block"], dim=1 << 16)
    common, rare = math.log(3 / 2.5) ** 2, math.log(3 / 1.5) ** 2
    ball, block = embedder.documents(["a ball", "a block"])
    assert ball @ block == pytest.approx(common**2 / (common**2 + rare**2), abs=1e-6)


def test_order_and_case_do_not_count():
    embedder = LexicalEmbedder.fit(["a ball falls on zorvex"])
    first, second = embedder.documents(["A ball falls on Zorvex", "on zorvex falls, a ball"])
    np.testing.assert_array_equal(first, second)


def test_the_hash_is_fixed():
    vector = LexicalEmbedder.fit(["ball"], dim=32).queries(["ball"])[0]
    np.testing.assert_array_equal(np.flatnonzero(vector), np.array([0, 2, 5, 15, 16, 20, 21, 22]))


@pytest.mark.parametrize("clips", [2, 6])
def test_the_planet_outweighs_everything_else(clips):
    rng = np.random.default_rng(0)
    worlds, captions = [], []
    for world in splits(0).unseen:
        for phenomenon in PHENOMENA:
            for _ in range(clips):
                scene = sample_scene(rng, world, phenomenon)
                captions.append(caption(Clip(NO_VIDEO, scene, NO_PATH), world.name))
                worlds.append(world.name)
    vectors = LexicalEmbedder.fit(captions).documents(captions)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -1)
    nearest = np.argsort(-scores, axis=1)[:, :5]
    share = (np.array(worlds)[nearest] == np.array(worlds)[:, None]).mean()
    assert share > 0.99
