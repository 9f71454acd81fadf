"""Search in memory: best first, ties by id, filters, what changes, and what an approximate index may miss."""

import numpy as np
import pytest

from ditmem_jax.bank.embedders import make_embedder
from ditmem_jax.bank.index import IVF
from ditmem_jax.bank.search import Bank
from ditmem_jax.bank.table import Table
from ditmem_jax.errors import UserError
from tests.bank.test_table import rows

CAPTIONS = {
    "d": "a ball falls on zorvex",
    "a": "a ball falls on quindara",
    "c": "a block slides on zorvex",
    "b": "a block slides on quindara",
}


def text_bank(path, captions=CAPTIONS, **columns):
    given = rows(*captions, **columns).set_column(1, "caption", [list(captions.values())])
    return Bank(Table.create(path, make_embedder("lexical", captions.values()), given))


def vector_bank(path, vectors, **options):
    given = rows(*(f"{i:05}" for i in range(len(vectors))), number=[str(i) for i in range(len(vectors))])
    return Bank(Table.create(path, make_embedder("vectors", [], vectors.shape[1]), given, vectors), **options)


def random(count, dim=16, seed=0):
    x = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_best_first_with_cosines(tmp_path):
    bank = text_bank(tmp_path)
    found = bank.search(["a ball falls on zorvex", "Quindara!"], 4)
    assert found.ids[0][0] == "d" and set(found.ids[1][:2]) == {"a", "b"}
    assert found.scores.shape == (2, 4) and found.scores[0, 0] == pytest.approx(1, abs=1e-5)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert [[row["caption"] for row in hits] for hits in found.rows] == [
        [CAPTIONS[i] for i in ids] for ids in found.ids
    ]


@pytest.mark.parametrize("queries", [1, 70])
def test_exact_in_blocks_with_a_filter(tmp_path, monkeypatch, queries):
    monkeypatch.setattr("ditmem_jax.bank.table.ROWS_AT_ONCE", 64)
    monkeypatch.setattr("ditmem_jax.bank.search.QUERIES_AT_ONCE", 32)
    vectors, asked = random(1000), random(queries, seed=1)
    bank = vector_bank(tmp_path, vectors)
    scores = asked @ vectors.T
    for where, allowed in ((None, np.arange(1000)), ("number >= 900", np.arange(900, 1000))):
        found = bank.search(asked, 7, where=where)
        best = allowed[np.argsort(-scores[:, allowed], axis=1)[:, :7]]
        assert found.ids == [[f"{i:05}" for i in row] for row in best]
        np.testing.assert_allclose(found.scores, np.take_along_axis(scores, best, 1), atol=1e-5)


def test_ties_go_by_id_not_by_place(tmp_path):
    names = [f"clip-{number:03d}" for number in range(50)]
    shuffled = np.random.default_rng(0).permutation(names)
    captions = {str(name): "a ball falls on zorvex" for name in shuffled} | {"other": "a block slides"}
    found = text_bank(tmp_path, captions).search(["a ball on zorvex"] * 3, 7)
    assert found.ids == [names[:7]] * 3
    assert len(np.unique(found.scores)) == 1


def test_a_query_alone_finds_what_it_finds_among_others(tmp_path):
    bank, asked = vector_bank(tmp_path, random(500)), random(20, seed=3)
    together = bank.search(asked, 5)
    for i, query in enumerate(asked):
        alone = bank.search(query[None], 5)
        assert alone.ids[0] == together.ids[i]
        np.testing.assert_array_equal(alone.scores[0], together.scores[i])


def test_what_is_added_and_removed_is_seen_at_once(tmp_path):
    bank, vectors = vector_bank(tmp_path, random(100)), random(100)
    assert bank.search(vectors[3:4], 1).ids == [["00003"]]
    bank.remove(["00003"])
    assert len(bank) == 99 and bank.search(vectors[3:4], 1).ids != [["00003"]]
    bank.add(rows("new", "newer"), np.stack([vectors[3], -vectors[3]]))
    found = bank.search(np.stack([vectors[3], -vectors[3], vectors[5]]), 1)
    assert found.ids == [["new"], ["newer"], ["00005"]] and len(bank) == 101
    assert [hits[0]["caption"] for hits in found.rows] == [
        "caption of new",
        "caption of newer",
        "caption of 00005",
    ]
    other = Bank.open(tmp_path)
    other.remove(where="number < 50")
    assert len(bank) == 101
    bank.refresh()
    assert len(bank) == len(Bank.open(tmp_path)) == 52 and bank.version == other.version
    Bank.open(tmp_path).remove(["00060"])
    with pytest.raises(UserError, match="no video 'never'"):
        bank.remove(["never"])  # which moves the table on, but not what is in memory
    bank.refresh()
    other.refresh()
    assert len(bank) == 51
    assert (
        bank.search(vectors, 5).ids
        == other.search(vectors, 5).ids
        == Bank.open(tmp_path).search(vectors, 5).ids
    )


def test_an_old_version_is_searched_as_it_was(tmp_path):
    bank = vector_bank(tmp_path, random(10))
    bank.remove(["00004"])
    assert Bank.open(tmp_path, version=1).search(random(10)[4:5], 1).ids == [["00004"]]


@pytest.mark.parametrize(("k", "where"), [(-1, None), (0, None), (5, None), (3, "id < 'c'")])
def test_too_many_or_none_wanted(tmp_path, k, where):
    with pytest.raises(
        UserError, match=f"cannot give {k} videos(.|\n)*the bank holds 4{', ' * (where is not None)}"
    ):
        text_bank(tmp_path).search([CAPTIONS["d"]], k, where=where)


def test_bad_queries_and_empty_banks(tmp_path):
    bank = text_bank(tmp_path)
    assert len(bank.search(["ball"]).ids[0]) == 4 and len(bank.search(["ball"], where="id < 'c'").ids[0]) == 2
    with pytest.raises(UserError, match=r"no video passes the filter(.|\n)*id = 'z'"):
        bank.search(["ball"], where="id = 'z'")
    with pytest.raises(UserError, match="nothing to search for"):
        bank.search([])
    with pytest.raises(UserError, match=r"nothing to search for(.|\n)*'\?!'"):
        bank.search(["ball", "?!"], 1)
    with pytest.raises(UserError, match="cannot be searched with these vectors"):
        bank.search(np.ones((2, 3), np.float32), 1)
    bank.remove(where="true")
    with pytest.raises(UserError, match="is empty"):
        bank.search(["ball"], 1)
    with pytest.raises(UserError, match="is empty"):
        Bank.open(tmp_path).search(["ball"], 1)


def test_many_videos_are_searched_by_faiss_and_said(tmp_path, capsys):
    rng = np.random.default_rng(0)
    centres = random(40, seed=4)
    vectors = centres[rng.integers(0, 40, 4000)] + 0.2 * random(4000)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    exact = vector_bank(tmp_path, vectors)
    assert "FAISS" not in capsys.readouterr().err
    bank = Bank.open(tmp_path, ivf_above=3999)
    assert isinstance(bank.index, IVF) and "4,000 videos" in capsys.readouterr().err
    asked = vectors[:100] + 0.1 * random(100, seed=5)
    found, best = bank.search(asked, 5), exact.search(asked, 5)
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found.ids, best.ids, strict=True)])
    assert 0.95 < recall, recall
    np.testing.assert_array_equal(bank.search(asked[:1], 5).scores, found.scores[:1])
    narrow = bank.search(asked[:3], 5, where="number < 8")  # in few lists
    assert narrow.ids == exact.search(asked[:3], 5, where="number < 8").ids
    bank.remove([found.ids[0][0]])
    bank.add(rows("new"), vectors[:1])
    assert bank.search(vectors[:1], 1).ids == [["00000"]] or found.ids[0][0] == "00000"
    assert (
        "new" in bank.search(vectors[:1], 3).ids[0]
        and found.ids[0][0] not in bank.search(asked[:1], 5).ids[0]
    )


def test_a_video_that_shares_no_word_is_no_match(tmp_path):
    bank = text_bank(tmp_path)
    found = bank.search(["zorvex", "submarine"], 4)
    assert (
        found.matched == [2, 0]
        and set(found.ids[0][:2]) == {"c", "d"}
        and found.ids[1] == ["a", "b", "c", "d"]
    )
    assert (found.scores[0, 2:] == 0).all() and (found.scores[1] == 0).all()
    assert bank.search(["a zorvex submarine"], 4).matched == [2]  # an "a" that all have is as good as nothing
    assert bank.unlike("a submarine dives in the sea", CAPTIONS["a"], 0.1)
    assert not bank.unlike("a ball falls", CAPTIONS["a"], 0.1)
    bank.add(rows("e").set_column(1, "caption", [["a submarine"]]))
    assert bank.search(["submarine"], 1).ids == [["e"]]
    bank.remove(["e"])
    assert bank.search(["submarine"], 1).matched == [0]
    assert bank.search(["zorvex"], 1, where="id < 'd'").ids == [["c"]]


def test_vectors_unlike_all_of_a_bank_are_told(tmp_path):
    vectors = random(50) + np.float32([3, *[0] * 15])
    bank = vector_bank(tmp_path, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    assert bank.unlike("", "", 0.1) and not bank.unlike("", "", 0.95)
