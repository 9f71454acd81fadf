"""Embedders by name: what they store of themselves leads back to them, and to nothing else. Without any model."""

import sys

import numpy as np
import pytest

from ditmem_jax.bank.embedders import load_embedder, make_embedder
from ditmem_jax.errors import UserError

CAPTIONS = ["a ball falls", "a block slides"]


def test_lexical():
    made = make_embedder("lexical", CAPTIONS)
    again = load_embedder(made.describe(), made.frequency)
    np.testing.assert_array_equal(again.queries(CAPTIONS), made.documents(CAPTIONS))
    assert make_embedder("lexical", CAPTIONS[::-1]).describe() == made.describe()
    for other in (CAPTIONS[:1], ["a ball falls", "a block falls"]):
        assert make_embedder("lexical", other).describe() != made.describe()


def test_given_vectors():
    made = make_embedder("vectors:mine", [], dim=3)
    assert load_embedder(made.describe()).describe() == made.describe()
    assert make_embedder("vectors:other", [], dim=3).describe() != made.describe()
    with pytest.raises(UserError, match=r"made elsewhere.*\n.*a ball falls\n.*vector of 3 numbers"):
        made.queries(CAPTIONS)


def test_vectors_that_a_model_has_made_need_no_model():
    about = {
        "kind": "sentence-transformers",
        "name": "some/model",
        "revision": "1",
        "normalised": True,
        "dim": 3,
    }
    assert load_embedder(about, embeds=False).describe() == about


def test_bad_names():
    for name in ("word2vec", "lexical:x", "sentence-transformers:", ""):
        with pytest.raises(UserError, match="unknown embedder"):
            make_embedder(name, CAPTIONS)
    with pytest.raises(UserError, match="needs vectors"):
        make_embedder("vectors", CAPTIONS)
    with pytest.raises(UserError, match="kind 'newer'"):
        load_embedder({"kind": "newer"})


def test_word_counts_of_another_bank():
    made = make_embedder("lexical", CAPTIONS)
    with pytest.raises(UserError, match="not the one that the bank was built with"):
        load_embedder(made.describe(), {"ball": 1})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"ditmem_jax\[retrieval\]"):
        make_embedder("sentence-transformers:some/model", CAPTIONS)
