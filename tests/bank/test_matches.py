"""References of a training set: none that leaks, each with its reason; pointers that hold, and those that do not."""

import pickle
import zlib

import numpy as np
import pyarrow as pa
import pytest

from ditmem_jax.bank import matches
from ditmem_jax.bank.rows import rows_of_records
from ditmem_jax.bank.sketches import sketch
from ditmem_jax.bank.verify import check
from ditmem_jax.data.record import Record
from ditmem_jax.data.records import Meta, RecordReader, RecordWriter
from ditmem_jax.data.references import References
from ditmem_jax.errors import UserError
from ditmem_jax.sample.retrieval import retrieve
from tests.tiny import make_bank, replace, tiny_config

SHAPE = (1, 4, 4, 2)


def write(folder, captions, sources=None, values=None, shape=SHAPE):
    with RecordWriter(folder, Meta(shape, 2, "float32"), shard_size=3) as writer:
        for id, caption in captions.items():
            value = (values or {}).get(id, zlib.crc32(f"{folder.name}/{id}".encode()))
            rng = np.random.default_rng(int(value))  # what the video looks like; the fraction is noise
            latents = (rng.normal(size=shape) + (value % 1) * rng.normal(size=shape)).astype(np.float32)
            source = (sources or {}).get(id, f"{id}.mp4")
            writer.add(Record(id, caption, source, latents, np.zeros((1, 2), np.float32)))
    return RecordReader(folder)


LIBRARY = {
    "itself": "a ball falls on zorvex slowly",
    "cut": "a ball falls on zorvex slowly and bounces",
    "copy": "a ball falls on zorvex slowly at night",
    "twin": "a ball falls on zorvex slowly by day",
    "near": "A ball, falls: on zorvex slowly!",
    "good": "a ball rolls slowly on zorvex",
    "far": "a block slides on quindara",
} | {f"other{i}": f"the lorry no. {i} turns left" for i in range(6)}


@pytest.fixture
def library(tmp_path):
    write(tmp_path / "library", LIBRARY, {"cut": "one.mp4"}, {"itself": 1, "copy": 7, "twin": 7.01})
    return make_bank(tmp_path / "bank", tmp_path / "library")


def test_nothing_leaks_and_it_is_counted(library, tmp_path):
    records = write(tmp_path / "records", {"itself": LIBRARY["itself"]}, {"itself": "one.mp4"}, {"itself": 7})
    found = matches.find(records, library, 1)
    assert found.table["matches"].to_pylist() == [["good"]]
    assert found.left_out == dict.fromkeys(matches.REASONS, 1)
    assert found.version == library.version
    loose = matches.find(records, library, 2, threshold=1.0)
    assert loose.table["matches"].to_pylist() == [["near", "good"]] and loose.left_out["near duplicate"] == 0
    blind = matches.find(records, library, 2, latents=1.0)
    assert "twin" in blind.table["matches"].to_pylist()[0] and blind.left_out["looks the same"] == 0
    with pytest.raises(
        UserError, match=r"cannot give 9 references for 'itself'(.|\n)*1 to 8.*1 near duplicate"
    ):
        matches.find(records, library, 9)


def test_sketches_are_means_over_a_grid():
    latents = np.arange(7 * 16 * 3 * 2, dtype=np.float32).reshape(7, 16, 3, 2)
    found = sketch(latents).reshape(6, 8, 3, 2)
    np.testing.assert_allclose(found[0, 0], latents[0, :2].mean(0), rtol=1e-3)
    np.testing.assert_allclose(found[-1, -1], latents[5:, 14:].mean((0, 1)), rtol=1e-3)
    assert sketch(latents[:2]).shape == (2 * 8 * 3 * 2,)


def test_references_that_share_no_word_are_counted(library, tmp_path):
    found = matches.find(write(tmp_path / "records", {"r": "submarine"}), library, 2)
    assert found.wordless == 2


def test_empty_sources_are_no_common_source(tmp_path):
    records = write(tmp_path / "library", LIBRARY, dict.fromkeys(LIBRARY, ""))
    found = matches.find(records, make_bank(tmp_path / "bank", tmp_path / "library"), 3)
    assert found.left_out["same source"] == 0 and found.left_out["itself"] == len(LIBRARY)


def test_references_are_the_records_that_were_matched(library, tmp_path):
    write(tmp_path / "more", {"more": "a ball falls on quindara"})
    library.add(rows_of_records([tmp_path / "more"]))
    captions = {f"r{i}": text for i, text in enumerate([*LIBRARY.values(), "a ball falls on quindara"] * 40)}
    records = write(tmp_path / "records", captions)
    found = matches.find(records, library, 2, threshold=1.0)
    found.save(tmp_path / "matches.parquet")
    again = matches.Matches.load(tmp_path / "matches.parquet")
    assert again == found or again.table.equals(found.table)
    for k in (1, 2):
        references, index = pickle.loads(pickle.dumps(again.references(k)))  # grain's workers get them so
        assert index.shape == (len(records), k) and len(references) <= len(LIBRARY) + 1
        names = [[references[i].id for i in row] for row in index]
        assert names == [ids[:k] for ids in found.table["matches"].to_pylist()]
    assert {p.records.rsplit("/", 1)[1] for p in references.pointers} == {"library", "more"}


def test_stale_matches_say_so(library, tmp_path, capsys):
    found = matches.find(write(tmp_path / "records", {"a": "a ball"}), library, 1)
    found.warn_if_stale()
    assert "note" not in capsys.readouterr().out
    library.remove(["far"])
    found.warn_if_stale()
    assert "matched with version 1 of the bank" in capsys.readouterr().out


def test_a_prompt_finds_what_a_record_of_that_caption_is_given(library, tmp_path):
    """But for what would give the record away; and videos without a record are no references for either."""
    library.add(pa.table({name: [f"{name} of a vector"] for name in ("id", "caption", "source")}))
    captions = {f"r{i}": caption for i, caption in enumerate(LIBRARY.values())} | {
        "r99": "caption of a vector"
    }
    found = matches.find(write(tmp_path / "records", captions), library, 3, threshold=1.0)
    config = tiny_config(tmp_path)
    config = replace(config, "data", bank=library.table.uri, references=3)
    for row, caption in zip(found.table.to_pylist(), captions.values(), strict=True):
        asked = retrieve(config, caption)
        assert [video["id"] for video in asked.videos] == row["matches"]
        np.testing.assert_array_equal(np.float32(asked.scores), np.float32(row["scores"]))
    assert library.search(["caption of a vector"], 1).ids == [["id of a vector"]]
    library.remove(where="records IS NOT NULL")
    with pytest.raises(UserError, match=r"no video of the bank .* has a record, only vectors"):
        retrieve(config, "a ball")


@pytest.mark.parametrize("altered", ["other", "gone", "fewer", "list"])
def test_records_that_are_gone_or_altered_are_named(library, tmp_path, altered):
    rows = library.table.by_id(["good"]).to_pylist()
    references = References.of(rows)
    assert references[0].caption == LIBRARY["good"] and check(library.table, deep=True) == []
    folder = tmp_path / "library"
    for path in folder.iterdir():
        path.unlink()
    if altered == "gone":
        folder.rmdir()
    elif altered == "fewer":
        write(folder, {"itself": "a ball"}, values={"itself": 1})
    else:
        reader = write(folder, LIBRARY, values={"good": 3})
        if altered == "list":  # it tells of what was there
            path = folder / "records-00001.jsonl"
            path.write_text(path.read_text().replace(reader.checksums[5], rows[0]["checksum"]))
    if altered == "list":
        for deep in (False, True):
            assert any("was altered" in line for line in check(library.table, deep=deep))
        with pytest.raises(UserError, match="was altered"):
            References.of(rows)[0]
    else:
        assert len(check(library.table)) >= 1
        with pytest.raises(
            UserError, match="no folder of records" if altered == "gone" else "not the reference video"
        ):
            References.of(rows)


def test_references_that_do_not_go_together(library, tmp_path):
    write(tmp_path / "wide", {"wide": "a wide ball"}, shape=(1, 2, 4, 1))
    library.add(rows_of_records([tmp_path / "wide"]))
    with pytest.raises(UserError, match="do not fit the others"):
        References.of(library.table.by_id(["good", "wide"]).to_pylist())
    with pytest.raises(UserError, match="'good' has no record"):
        References.of([library.table.by_id(["good"]).to_pylist()[0] | {"records": None}])
