"""Exact search: order, ties, exclusion, too few records, folders of records."""

import numpy as np
import pytest

from ditmem_jax.bank import EMBEDDER_FILE, Bank, LexicalEmbedder, retrieve_for
from ditmem_jax.data.records import Entry, Meta, Record, RecordReader, RecordWriter
from ditmem_jax.errors import UserError

CAPTIONS = {
    "d": "a ball falls on zorvex",
    "a": "a ball falls on quindara",
    "c": "a block slides on zorvex",
    "b": "a block slides on quindara",
}


def make_bank(captions=CAPTIONS, sources=None):
    entries = [Entry(name, text, (sources or {}).get(name, name + ".mp4")) for name, text in captions.items()]
    return Bank(entries, LexicalEmbedder.fit(captions.values()))


def test_best_first_with_cosines():
    bank = make_bank()
    ids, scores = bank.search(["a ball falls on zorvex", "Quindara!"], 4)
    assert ids[0][0] == "d" and set(ids[1][:2]) == {"a", "b"}
    assert scores.shape == (2, 4) and scores[0, 0] == pytest.approx(1, abs=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    vectors = bank.embedder.documents(list(CAPTIONS.values()))
    np.testing.assert_allclose(sorted(vectors @ vectors[0]), sorted(scores[0]), atol=1e-5)


def test_ties_go_by_id_not_by_place():
    names = [f"clip-{number:03d}" for number in range(50)]
    shuffled = np.random.default_rng(0).permutation(names)
    captions = {str(name): "a ball falls on zorvex" for name in shuffled} | {"other": "a block slides"}
    ids, scores = make_bank(captions).search(["a ball on zorvex"] * 3, 7)
    assert ids == [names[:7]] * 3
    assert len(np.unique(scores)) == 1


def test_neither_itself_nor_its_source():
    bank = make_bank(sources={"d": "one.mp4", "a": "one.mp4"})
    ids, _ = bank.search([CAPTIONS["d"]] * 3, 2, exclude=[bank.entries[0], None, Entry("new", "", "")])
    assert ids[0] == ["c", "b"] and ids[1] == ids[2] and ids[1][0] == "d"
    elsewhere = Entry("elsewhere", CAPTIONS["c"], "c.mp4")
    assert "c" not in bank.search([CAPTIONS["c"]], 3, exclude=[elsewhere])[0][0]


def test_an_empty_source_is_no_common_source():
    bank = make_bank(sources=dict.fromkeys(CAPTIONS, ""))
    ids, _ = bank.search([CAPTIONS["d"]], 3, exclude=[bank.entries[0]])
    assert sorted(ids[0]) == ["a", "b", "c"]


def test_in_parts_as_at_once(monkeypatch):
    bank = make_bank()
    whole = bank.search(list(CAPTIONS.values()), 2, exclude=bank.entries)
    monkeypatch.setattr("ditmem_jax.bank.search._SCORES_AT_ONCE", 4)
    parts = bank.search(list(CAPTIONS.values()), 2, exclude=bank.entries)
    assert whole[0] == parts[0]
    np.testing.assert_array_equal(whole[1], parts[1])


@pytest.mark.parametrize("k", [-1, 0, 4])
def test_too_many_or_none_wanted(k):
    bank = make_bank()
    with pytest.raises(UserError, match="1 to 3: the bank holds 4, 1 of them"):
        bank.search([CAPTIONS["d"]], k, exclude=[bank.entries[0]])


def test_bad_banks_and_prompts():
    with pytest.raises(UserError, match="empty"):
        make_bank({})
    twice = [Entry("a", "x", "1"), Entry("a", "y", "2")]
    with pytest.raises(UserError, match="'a' twice"):
        Bank(twice, LexicalEmbedder.fit(["x"]))
    with pytest.raises(UserError, match="no words"):
        make_bank().search(["?!"], 1)


def test_version_changes_with_content_only():
    assert make_bank().version == make_bank().version
    assert make_bank().version != make_bank(sources={"a": "other.mp4"}).version
    assert make_bank().version != make_bank(CAPTIONS | {"e": "new"}).version


@pytest.fixture
def folder(tmp_path):
    with RecordWriter(tmp_path / "bank", Meta((1, 1, 1, 1), 2, "float32"), shard_size=3) as writer:
        for name, text in CAPTIONS.items():
            latents, text_embedding = np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 2), np.float32)
            writer.add(Record(name, text, f"{name}.mp4", latents=latents, text_embedding=text_embedding))
    return tmp_path / "bank"


def test_retrieval_for_training(folder):
    matches = retrieve_for(RecordReader(folder), Bank.from_records(folder), 1)
    np.testing.assert_array_equal(matches, np.asarray([[1], [0], [3], [2]]))  # two words in common, not one


def test_the_stored_embedder_is_used(folder):
    own = Bank.from_records(folder)
    LexicalEmbedder.fit(["a ball"] * 9 + list(CAPTIONS.values())).save(folder / EMBEDDER_FILE)
    stored = Bank.from_records(folder)
    assert stored.embedder.captions == 13 and stored.version != own.version
    assert Bank.from_records(folder, own.embedder).version == own.version
