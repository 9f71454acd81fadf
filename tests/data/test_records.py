"""Records as bytes, shards on disk, and every way in which a folder of them can be wrong."""

import dataclasses
import json
import pickle
import re

import ml_dtypes
import numpy as np
import pytest

from ditmem_jax.data import records
from ditmem_jax.data.record import Record, checksum, from_bytes, to_bytes
from ditmem_jax.data.records import FORMAT, Meta, RecordReader, RecordWriter
from ditmem_jax.data.video import Facts
from ditmem_jax.errors import UserError
from ditmem_jax.storage.digests import sealed

META = Meta(latents=(2, 4, 4, 3), text_dim=6, dtype="float32", made_by={"vae": "abc", "video": {"frames": 5}})


def record(index, meta=META):
    generator = np.random.default_rng(index)
    return Record(
        id=f"clip-{index}",
        caption=f"a ball – no. {index}\u2028 “falls”",
        source=f"videos/{index}.mp4",
        extra={"world": "Ørn"},
        latents=generator.standard_normal(meta.latents, np.float32),
        text_embedding=generator.standard_normal((1 + index % 3, meta.text_dim), np.float32),
    )


def write(folder, count, start=0, meta=META, shard_size=4):
    with RecordWriter(folder, meta, shard_size) as writer:
        for index in range(start, count):
            writer.add(record(index, meta))


def assert_equal(got, want):
    assert got.entry == want.entry
    np.testing.assert_array_equal(got.latents, want.latents)
    np.testing.assert_array_equal(got.text_embedding, want.text_embedding)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_bytes_round_trip(dtype):
    original = record(3)
    original = Record(
        **vars(original.entry),
        latents=original.latents.astype(dtype),
        text_embedding=original.text_embedding.astype(dtype),
    )
    back = from_bytes(to_bytes(original))
    assert back.latents.dtype == back.text_embedding.dtype == dtype and back.facts is None
    assert_equal(back, original)
    known = dataclasses.replace(original, facts=Facts(81, 29.97))
    assert from_bytes(to_bytes(known)).facts == known.facts


def test_bytes_of_something_else_are_refused():
    for data in (b"", b"nonsense", to_bytes(record(0))[:-1]):
        with pytest.raises(ValueError):
            from_bytes(data)


def test_folder_round_trip(tmp_path):
    write(tmp_path / "r", 10)
    reader = RecordReader(tmp_path / "r")
    assert len(reader) == 10 and reader.meta == META
    assert reader.captions()[7] == record(7).caption and reader.entries[7] == record(7).entry
    for index, got in enumerate(reader):
        assert_equal(got, record(index))
    assert_equal(pickle.loads(pickle.dumps(reader))[9], record(9))  # grain's workers get it so
    with pytest.raises(IndexError):
        reader[10]


def test_checksums_are_of_the_latents_alone(tmp_path):
    write(tmp_path, 6)
    reader = RecordReader(tmp_path)
    assert reader.checksums == [checksum(got.latents) for got in reader] and len(set(reader.checksums)) == 6
    assert RecordWriter(tmp_path, META).entries == reader.entries
    x = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    others = [x + 1, x.reshape(1, 3, 2, 4), x.astype(ml_dtypes.bfloat16), x.view(np.int32)]
    assert len({checksum(y) for y in [x, *others]}) == 5
    assert checksum(x) == checksum(x.copy()) == checksum(np.asfortranarray(x))


def test_facts_of_videos_are_listed_where_they_are_known(tmp_path):
    known = [Facts(81, 16.0), None, Facts(3, None)]
    with RecordWriter(tmp_path, META, shard_size=2) as writer:
        for index, facts in enumerate(known):
            writer.add(dataclasses.replace(record(index), facts=facts))
    reader = RecordReader(tmp_path)
    assert reader.facts == [got.facts for got in reader] == known
    assert reader.entries == [record(index).entry for index in range(3)]
    assert [facts and facts.duration for facts in known] == [81 / 16, None, None]


def test_folders_of_format_2_are_read_and_continued(tmp_path):
    write(tmp_path, 2)
    index = json.loads((tmp_path / "index.json").read_text())
    older = {name: index[name] for name in ("complete", "meta")} | {"format": 2}  # without digests
    older["shards"] = [
        {name: shard[name] for name in ("name", "records", "bytes")} for shard in index["shards"]
    ]
    (tmp_path / "index.json").write_text(json.dumps(older))
    assert RecordReader(tmp_path).facts == [None, None]
    write(tmp_path, 5, start=2)
    assert len(RecordReader(tmp_path).entries) == 5
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["format"] == FORMAT and all(shard["digest"] for shard in index["shards"])


def test_numbers_are_stored_in_the_type_of_the_folder(tmp_path):
    write(tmp_path, 1, meta=Meta((2, 4, 4, 3), 6, "bfloat16"))
    stored = RecordReader(tmp_path)[0]
    assert stored.latents.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stored.latents, record(0).latents.astype(ml_dtypes.bfloat16))


def test_prompts(tmp_path):
    with RecordWriter(tmp_path, META) as writer:
        writer.add(record(0))
        writer.add_prompts({"": np.zeros((1, 6), np.float32), "ugly": np.ones((2, 6), np.float32)})
    reader = RecordReader(tmp_path)
    np.testing.assert_array_equal(reader.prompt("ugly"), np.ones((2, 6)))
    assert reader.prompt("").shape == (1, 6)
    with pytest.raises(UserError, match="'ugli' is not in"):
        reader.prompt("ugli")


def test_an_interrupted_writer_is_continued_after_its_last_full_shard(tmp_path):
    write(tmp_path / "whole", 10)
    with pytest.raises(KeyboardInterrupt), RecordWriter(tmp_path / "r", META, shard_size=4) as writer:
        for index in range(6):
            writer.add(record(index))
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="not complete"):
        RecordReader(tmp_path / "r")
    with RecordWriter(tmp_path / "r", META, shard_size=4) as writer:
        assert [entry.id for entry in writer.entries] == [f"clip-{i}" for i in range(4)]
        for index in range(4, 10):
            writer.add(record(index))
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    for got, want in zip(RecordReader(tmp_path / "r"), RecordReader(tmp_path / "whole"), strict=True):
        assert_equal(got, want)


def test_a_complete_folder_can_grow(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 8, start=5)
    assert [entry.id for entry in RecordReader(tmp_path).entries] == [f"clip-{i}" for i in range(8)]


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    write(tmp_path, 2)
    before = snapshot(tmp_path)
    other = Meta(META.latents, META.text_dim, "bfloat16", {"vae": "abc", "video": {"frames": 9}})
    with pytest.raises(UserError) as caught:
        RecordWriter(tmp_path, other)
    assert "made_by.video.frames = 9" in str(caught.value) and "made_by.video.frames = 5" in str(caught.value)
    assert "vae" not in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something else"):
        RecordWriter(tmp_path, META)
    with pytest.raises(UserError, match="is a file"):
        RecordWriter(tmp_path / "thesis.tex", META)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_records_of_another_shape_and_empty_folders_are_refused(tmp_path):
    with (
        pytest.raises(UserError, match="'clip-1' does not fit"),
        RecordWriter(tmp_path / "a", META) as writer,
    ):
        writer.add(record(1, Meta((1, 4, 4, 3), 6, "float32")))
    with pytest.raises(UserError, match="no record was written"), RecordWriter(tmp_path / "b", META):
        pass


def reseal(path, **changed):
    index = json.loads(path.read_text()) | changed
    path.write_text(json.dumps(sealed({name: value for name, value in index.items() if name != "sha256"})))


def damage(path, change):
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip(data):
    data[len(data) // 100] ^= 0xFF
    return data


@pytest.mark.parametrize("name", ["records-00000.array_record", "records-00001.jsonl"])
@pytest.mark.parametrize("cut", [None, 10, 700])
@pytest.mark.parametrize("complete", [True, False])
def test_damaged_folders_do_not_grow(tmp_path, name, cut, complete):
    write(tmp_path, 10)
    reseal(tmp_path / "index.json", complete=complete)
    if cut is None:
        (tmp_path / name).unlink()
    else:
        damage(tmp_path / name, lambda data: data[:-cut])
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"{name} (is|was)|read .*{name}") as caught:
        RecordWriter(tmp_path, META)
    assert f"delete {tmp_path}" in str(caught.value)
    assert snapshot(tmp_path) == before


def test_damaged_folders_are_named(tmp_path):
    def fresh(name):
        write(tmp_path / name, 5)
        return tmp_path / name

    shard = "records-00000.array_record"
    folder = fresh("truncated")
    damage(folder / shard, lambda data: data[:-100])
    with pytest.raises(UserError, match="not as it was written"):
        RecordReader(folder)

    folder = fresh("missing")
    (folder / shard).unlink()
    with pytest.raises(UserError, match="no such file"):
        RecordReader(folder)

    folder = fresh("altered")
    damage(folder / shard, flip)
    with pytest.raises(UserError, match="is damaged"):
        list(RecordReader(folder))

    folder = fresh("swapped")
    lines = (folder / "records-00000.jsonl").read_text().split("\n")
    (folder / "records-00000.jsonl").write_text("\n".join(lines[1::-1] + lines[2:]))
    with pytest.raises(UserError, match="was altered"):
        RecordReader(folder)[0]
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["digest"] = None
    reseal(folder / "index.json", shards=index["shards"])
    with pytest.raises(UserError, match="not the one that its list names"):
        RecordReader(folder)[0]

    folder = fresh("cut list")
    damage(folder / "records-00000.jsonl", lambda data: data[:-100])
    with pytest.raises(UserError, match="was altered"):
        RecordReader(folder).captions()

    folder = fresh("cut index")
    damage(folder / "index.json", lambda data: data[:-100])
    with pytest.raises(UserError, match="is damaged"):
        RecordReader(folder)

    folder = fresh("newer")
    reseal(folder / "index.json", format=FORMAT + 1)
    for use in (RecordReader, lambda folder: RecordWriter(folder, META)):
        with pytest.raises(UserError, match="another format"):
            use(folder)

    with pytest.raises(UserError, match="no folder of records"):
        RecordReader(tmp_path / "nowhere")


def test_metadata_are_in_one_order():
    """That of names: a hash map of the safetensors library would give another in each process."""
    data = to_bytes(record(3))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == ["caption", "extra", "id", "source"]
    assert from_bytes(data).entry == record(3).entry


def refused(folder):
    reader = RecordReader(folder)
    list(reader), reader.facts, reader.prompts


@pytest.mark.parametrize(
    "name", ["index.json", "records-00000.jsonl", "records-00000.array_record", "prompts.safetensors"]
)
def test_an_altered_byte_of_any_file_is_refused(tmp_path, name):
    with RecordWriter(tmp_path, META) as writer:
        writer.add(dataclasses.replace(record(0), facts=Facts(81, 16.0)))
        writer.add_prompts({"": np.zeros((1, 6), np.float32)})
    refused(tmp_path)
    content = (tmp_path / name).read_bytes()
    start, stop = 0, len(content)
    if name.endswith("array_record"):  # beside the record there is nothing but padding
        start = content.index(b"__metadata__")
        stop = start + len(to_bytes(record(0)))
    for place in range(start, stop, (stop - start) // 40):
        if content[place : place + 1].strip():
            (tmp_path / name).write_bytes(
                content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            )
            with pytest.raises(UserError, match=tmp_path.name):
                refused(tmp_path)


@pytest.mark.parametrize("lacks", ["format", "complete", "meta", "shards"])
def test_an_index_of_an_earlier_version_that_lacks_something_is_damaged(tmp_path, lacks):
    write(tmp_path, 2)
    index = json.loads((tmp_path / "index.json").read_text())
    del index["sha256"], index[lacks]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        RecordReader(tmp_path)


def test_a_writer_that_cannot_write_says_what_is_kept(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("write() failed: No space left on device; writing x")

    with pytest.raises(UserError) as caught, RecordWriter(tmp_path / "r", META, shard_size=4) as writer:
        for index in range(4):
            writer.add(record(index))
        monkeypatch.setattr(records, "ArrayRecordWriter", full)
        for index in range(4, 8):
            writer.add(record(index))
    assert re.search(r"cannot write .*records-00001(.|\n)*No space(.|\n)*continues after", str(caught.value))
    monkeypatch.undo()
    write(tmp_path / "r", 8, start=4)
    assert len(RecordReader(tmp_path / "r")) == 8
