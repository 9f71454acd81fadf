"""Tables, folders, archives and input records: where videos are found, and what is refused."""

import datetime
import decimal
import io
import json
import tarfile
import unicodedata
import warnings
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy

from ditmem_jax.bank.rows import columns_of
from ditmem_jax.data.places import write_input_records
from ditmem_jax.data.record import Entry
from ditmem_jax.data.records import ArrayRecordWriter
from ditmem_jax.data.sources import (
    Videos,
    cut,
    expand,
    read_row,
    read_table,
)
from ditmem_jax.data.video import Part, read_clip, read_video, write_video
from ditmem_jax.errors import UserError

FILES = {"a.mp4": None, "a.txt": b"a ball\n", "deep/b.mp4": None, "deep/b.txt": "ein Käfer".encode()}
ROWS = [Entry("a.mp4", "a ball", "a.mp4"), Entry("deep/b.mp4", "ein Käfer", "deep/b.mp4")]
TABLE = [(entry, entry.source) for entry in ROWS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two videos with captions beside them; and the same in archives that lie beside the folder."""
    root = tmp_path_factory.mktemp("sources")
    folder = root / "videos"
    (folder / "deep").mkdir(parents=True)
    for number, (name, text) in enumerate(FILES.items()):
        if text is None:
            frames = np.random.default_rng(number).integers(0, 256, (3, 16, 16, 3), np.uint8)
            write_video(folder / name, frames, fps=8)
        else:
            (folder / name).write_bytes(text)
    (folder / "deep" / "._b.mp4").write_bytes(b"what Macs leave")
    for name, kind in (("stored.zip", zipfile.ZIP_STORED), ("deflated.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(root / name, "w", kind) as archive:
            archive.mkdir("deep")
            for file in FILES:
                archive.write(folder / file, file)
    with tarfile.open(root / "plain.tar", "w") as archive:
        archive.add(folder, ".")
    (root / "records").mkdir()
    entries = [Entry(e.id, e.caption, e.source, extra={"motion": "0.5"}) for e in ROWS]
    write_input_records(root / "records", [(e, (folder / e.source).read_bytes()) for e in entries], 1)
    return folder


@pytest.mark.parametrize("place", ["videos", "stored.zip", "deflated.zip", "plain.tar", "records"])
def test_every_place_gives_the_same_videos(folder, place):
    videos = Videos([folder.parent / place])
    rows = videos.rows()
    extra = {"motion": "0.5"} if place == "records" else {}
    assert [entry for entry, _ in rows] == [Entry(e.id, e.caption, e.source, extra=extra) for e in ROWS]
    for entry, found in [*rows, *videos.rows(TABLE)]:
        got = read_row((entry, found), dict(frames=3, height=16, width=16))
        video = read_video(folder / entry.source)
        np.testing.assert_array_equal(got.frames, video.frames)
        assert (got.facts.frames, got.facts.fps) == (len(video.frames), video.fps)


def test_archives_are_not_unpacked_and_their_folders_need_no_mention(folder):
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        "deflated.zip", "plain.tar", "records", "stored.zip", "videos",
    ]  # fmt: skip
    for name in ("stored.zip", "plain.tar"):
        assert Videos([folder.parent / name]).find("b.mp4").name == "deep/b.mp4"
    with pytest.raises(UserError, match=r"no videos are called b.mp4"):
        Videos([folder]).find("b.mp4")


@pytest.mark.parametrize(
    "source, message",
    [
        ("c.mp4", "no videos are called c.mp4\n.*expected: +one in .*plain.tar"),
        ("", "no videos are called"),
        ("../videos/a.mp4", "leaves the folder"),
        ("/etc/hostname", "leaves the folder"),
        ("a.mp4", "2 videos are called a.mp4\n.*\n.*found: +.*plain.tar/a.mp4, .*stored.zip/a.mp4"),
    ],
)
def test_what_is_not_one_video_of_the_places_is_told_of_its_row(folder, source, message):
    videos = Videos([folder.parent / "plain.tar", folder.parent / "stored.zip"])
    ((_, problem),) = videos.rows([(Entry("x", "a ball", source), source)])
    with pytest.raises(UserError, match=message):
        raise problem
    assert isinstance(read_row((Entry("x", "a ball", source), problem), {}), str)


def damaged(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    return bytes(data)


def flip(data, at):
    data[at] ^= 255


def test_damaged_archives_are_refused(folder, tmp_path):
    root = folder.parent
    with tarfile.open(root / "plain.tar") as archive:
        second = archive.getmember("./deep/b.mp4").offset
    broken = {
        "cut.zip": (root / "stored.zip").read_bytes()[:-40],
        "cut.tar": (root / "plain.tar").read_bytes()[: second + 700],
        "header.tar": damaged(root / "plain.tar", lambda data: flip(data, second + 10)),
        "squeezed.tar.gz": b"\x1f\x8b" + bytes(30),
        "nothing.tar": b"",
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            Videos([tmp_path / name])
    with pytest.raises(UserError, match=r"cannot read .*missing.zip"):
        Videos([tmp_path / "missing.zip"])


@pytest.mark.parametrize("name", ["stored.zip", "deflated.zip"])
def test_a_damaged_member_is_told_of_its_row(folder, tmp_path, name):
    info = zipfile.ZipFile(folder.parent / name).getinfo("a.mp4")
    (tmp_path / name).write_bytes(
        damaged(folder.parent / name, lambda data: flip(data, info.header_offset + 200))
    )
    (_, row) = (Videos([tmp_path / name]).rows(TABLE))[0]
    told = read_row((ROWS[0], row), dict(frames=3, height=16, width=16))
    assert "cannot read" in told or "is damaged" in told


@pytest.mark.parametrize("head", [b"", None], ids=["zeros", "a video and zeros"])
def test_a_member_that_claims_much_is_read_no_further_than_its_first_frames(
    folder, tmp_path, head, monkeypatch
):
    head = (folder / "a.mp4").read_bytes() if head is None else head
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.mp4", head + bytes(64 << 20))
        archive.writestr("a.txt", "a ball")
        archive.writestr("b.mp4", b"")
        archive.writestr("b.txt", bytes(4 << 20))
    read, plain = [], zipfile.ZipExtFile.read
    monkeypatch.setattr(
        zipfile.ZipExtFile, "read", lambda self, n=-1: read.append(len(found := plain(self, n))) or found
    )
    row = (ROWS[0], Videos([tmp_path / "bomb.zip"]).find("a.mp4"))
    clip = read_row(row, dict(frames=3, height=16, width=16))
    assert sum(read) < 16 << 20
    assert isinstance(clip, str) if not head else clip.facts.frames == 3
    _, (_, problem) = Videos([tmp_path / "bomb.zip"]).rows()
    assert "b.txt is no caption" in str(problem)


def test_members_of_the_same_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr("a.mp4", b"1")
        archive.writestr("a.mp4", b"2")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.mp4", "./a.mp4"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    for name in ("a.zip", "a.tar"):
        with pytest.raises(UserError, match=f"{name} has several members of the same name\n.*a.mp4"):
            Videos([tmp_path / name])


def test_without_a_table_names_are_unique_and_something_has_a_caption(folder, tmp_path):
    with pytest.raises(UserError, match=r"several videos are called a.mp4"):
        Videos([folder, folder.parent / "plain.tar"]).rows()
    with pytest.raises(UserError, match="no videos in"):
        Videos([tmp_path]).rows()
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UserError, match=r"has a caption\n.*--table"):
        Videos([tmp_path]).rows()
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"a.txt\n.*UTF-8"):
        Videos([tmp_path]).rows()


def test_damaged_input_records_are_refused(folder, tmp_path):
    shard = next((folder.parent / "records").iterdir())
    contents = (b"", shard.read_bytes()[:-9], damaged(shard, lambda data: flip(data, len(data) // 2)))
    for number, data in enumerate(contents):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "videos-00000.array_record").write_bytes(data)
        with pytest.raises(UserError, match=r"videos-00000.array_record"):
            Videos([folder]).rows()


def test_patterns_name_places(folder):
    root = folder.parent
    assert expand([str(root / "*.zip"), str(folder)]) == [root / "deflated.zip", root / "stored.zip", folder]
    with pytest.raises(UserError, match="no file or folder nothing"):
        expand(["nothing*.zip"])


def test_tables_of_all_kinds_say_the_same(tmp_path):
    rows = [
        {"video": "a.mp4", "caption": 'he said: "x",\nتفاحة 🙂', "motion": 0.5, "note": None},
        {"video": "a.mp4", "caption": "", "motion": 2.0, "note": "n"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    (tmp_path / "t.csv").write_text(
        'video,caption,motion,note\na.mp4,"he said: ""x"",\nتفاحة 🙂",0.5,\na.mp4,,2.0,n\n', encoding="utf-8"
    )
    want = [
        (Entry("a.mp4", rows[0]["caption"], "a.mp4", extra={"motion": "0.5", "note": ""}), "a.mp4"),
        (Entry("a.mp4#2", "", "a.mp4", extra={"motion": "2.0", "note": "n"}), "a.mp4"),
    ]
    for suffix in ("parquet", "jsonl", "csv"):
        assert read_table(tmp_path / f"t.{suffix}") == want, suffix


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("t.parquet", "PAR1", "cannot read .*t.parquet"),
        ("t.jsonl", '{"video"\n', "line 1 of .* is damaged"),
        ("t.jsonl", "[1]\n", "row 1 of .* is no JSON object"),
        ("t.json", "1", "t.json is no table\n.*a JSON array"),
        ("t.json", '[{"video": "a.mp4",]', "cannot read .*t.json\n.*a JSON array"),
        ("t.jsonl", '{"video": "a", "video": "b"}\n', "line 1 of .* has several values of video"),
        ("t.jsonl", '{"video": "a.mp4"}\n', "lacks the column caption"),
        ("t.jsonl", "", "lacks the column video\n.*\n.*an empty file"),
        ("t.xlsx", "", "no table that we read\n.*.csv, .tsv"),
    ],
)
def test_bad_tables_of_other_kinds_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / name)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "video,words\na.mp4,b\n",
            "lacks the column caption\n.*text, prompt.*\n.*found: +video, words\n.*--caption_column",
        ),
        ("film,caption\na.mp4,b\n", "lacks the column video\n.*\n.*found: +film, caption"),
        ("", "lacks the column video\n.*\n.*an empty file"),
        ("video,caption\n", "no rows"),
        ("video,caption\na.mp4,a ball, falling\n", "row 1 of .* more values"),
        ("video,caption\na.mp4,b\udcff\n", "row 1 of .* is not UTF-8"),
        ('video,caption\na.mp4,"b\n', "row 1 of .* is no CSV\n.*end of data"),
        ("video;caption\na.mp4;b\n", "separated by semicolons\n.*\n.*\n.*once more"),
        ("video\tcaption\na.mp4\tb\n", "separated by tabs\n.*\n.*\n.*.tsv"),
        ("video,caption,caption\na.mp4,b,c\n", "several columns caption"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "t.csv")


def test_values_that_python_does_not_have_are_told_with_their_column(tmp_path):
    odd = {"day": pyarrow.array([2**30], pyarrow.date32())}
    odd["time"] = pyarrow.array([0], pyarrow.timestamp("s", "Mars/Base"))
    for name, values in odd.items():
        pyarrow.parquet.write_table(
            pyarrow.table({"video": ["a"], "caption": ["x"], name: values}), tmp_path / "t.parquet"
        )
        with pytest.raises(UserError, match=f"the column {name} of .*t.parquet cannot be read"):
            read_table(tmp_path / "t.parquet")


def test_deep_json_is_told_with_its_line(tmp_path):
    (tmp_path / "t.jsonl").write_text("{}\n" + '{"video": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError, match=r"line 2 of .*t\.jsonl is damaged"):
        read_table(tmp_path / "t.jsonl")


def test_tables_as_spreadsheets_write_them(tmp_path):
    (tmp_path / "t.csv").write_bytes(
        '\ufeffvideo_path,caption\r\na b.mp4,"x, ""y"""\r\n\r\nc.mp4\r\n'.encode()
    )
    assert read_table(tmp_path / "t.csv") == [
        (Entry("a b.mp4", 'x, "y"', "a b.mp4"), "a b.mp4"),
        (Entry("c.mp4", "", "c.mp4"), "c.mp4"),
    ]


def test_a_column_tells_what_a_clip_was_cut_from(tmp_path):
    (tmp_path / "t.csv").write_text("video,caption,source,id\na.mp4,x,film,7\nb.mp4,y,,8\n")
    (entry, video), (other, _) = read_table(tmp_path / "t.csv")
    assert (entry.id, entry.source, video, other.source) == ("a.mp4", "film", "a.mp4", "b.mp4")
    assert entry.extra == {"id": "7"}
    assert columns_of([entry])["id"] == ["a.mp4"]
    with pytest.raises(UserError, match="no video can be called"):
        Videos([tmp_path]).find("x" * 300)
    with pytest.raises(UserError, match="No such file"):
        read_table(tmp_path / "nothing.csv")
    assert columns_of([entry])["id_"].to_pylist() == [7]


def test_input_records_of_frames_are_encoded_as_their_file_would_be(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (11, 20, 24, 3), np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps=8)
    video = read_video(tmp_path / "a.mp4")
    metadata = dict(id="a", caption="ball", source="a.mp4", extra='{"planet": "Ørn"}', fps="8.0")
    folder = tmp_path / "records"
    folder.mkdir()
    writer = ArrayRecordWriter(str(folder / "videos-00000.array_record"), "group_size:1,uncompressed")
    writer.write(safetensors.numpy.save({"frames": video.frames}, metadata))
    writer.write(safetensors.numpy.save({"frames": video.frames[:1]}, metadata | {"id": "b"}))
    writer.close()
    (entry, place), short = Videos([folder]).rows()
    assert entry == Entry("a", "ball", "a.mp4", extra={"planet": "Ørn"})
    for size, mode in ((5, "stretch"), (13, "crop")):
        want = read_clip(tmp_path / "a.mp4", size, 16, 16, mode)
        got = read_clip(place.open(), size, 16, 16, mode)
        np.testing.assert_array_equal(got.frames, want.frames)
        assert got.facts == want.facts
    with pytest.raises(UserError, match="at least 2 frames"):
        read_clip(short[1].open(), 5, 16, 16)
    with pytest.raises(UserError, match="decoded frames"):
        place.read()
    (folder / "videos.json").write_text('{"complete": false}')
    with pytest.raises(UserError, match="are not complete"):
        Videos([folder])


def test_bad_rows_are_told_by_number_and_the_others_read(tmp_path):
    many = "".join(f"{i}.mp4,clip {i}\n" for i in range(50))
    bad = b'x.mp4,"a 5" screen"\nx.mp4,un caf\xe9\nx.mp4,a,b\n'
    (tmp_path / "t.csv").write_bytes(b"video,caption\n" + many.encode() + bad + many.encode())
    rows = read_table(tmp_path / "t.csv")
    assert [entry.id for entry, _ in rows[:100:99]] == ["0.mp4", "49.mp4#2"]
    problems = [problem.in_one_line() for _, problem in rows[100:]]
    assert len(problems) == 3
    for number, cause, told in zip(
        (51, 52, 53), ("no CSV", "not UTF-8", "more values"), problems, strict=True
    ):
        assert f"row {number} of" in told and cause in told
    assert [read_row(row, {}) for row in Videos([tmp_path]).rows(rows[100:])] == problems
    lines = ['{"video": "a.mp4", "caption": "b"}', '{"video"', '{"video": "c.mp4", "caption": "d"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    good, other, problem = read_table(tmp_path / "t.jsonl")
    assert (good[0].id, other[0].id) == ("a.mp4", "c.mp4") and "line 2 of" in str(problem[1])


def test_rows_that_name_no_video_are_told_by_number(tmp_path):
    rows = [{"video": "a.mp4", "caption": "x"}, {"video": None, "caption": "y"}, {"caption": "z"}]
    rows += [{"video": "b.mp4", "caption": ["one", "two"]}, {"video": ["c.mp4"], "caption": "x"}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    good, *bad = read_table(tmp_path / "t.json")
    assert good[0].id == "a.mp4"
    for number, (entry, problem) in enumerate(bad, start=2):
        assert entry.id == f"row {number}" and f"row {number} of" in str(problem)


def test_a_zip_file_that_was_replaced_is_opened_anew(folder, tmp_path):
    states = []
    for name in ("a.mp4", "deep/b.mp4"):
        with zipfile.ZipFile(tmp_path / "new.zip", "w") as archive:
            archive.write(folder / name, "a.mp4")
        (tmp_path / "new.zip").replace(tmp_path / "v.zip")
        place = Videos([tmp_path / "v.zip"]).find("a.mp4")
        states.append(place.stamp())
        assert place.read() == (folder / name).read_bytes()
    assert states[0].modified != states[1].modified and states[0].digest != states[1].digest


def test_tables_in_other_spellings(tmp_path):
    want = [(Entry("a.mp4", "a ball", "a.mp4", extra={"motion": "0.5"}), "a.mp4")]
    (tmp_path / "t.tsv").write_text("file_name\ttext\tmotion\na.mp4\ta ball\t0.5\n", "utf-16")
    (tmp_path / "t.json").write_text('[{"video_path": "a.mp4", "prompt": "a ball", "motion": 0.5}]')
    (tmp_path / "u.json").write_text(
        '{"version": 1, "data": [{"path": "a.mp4", "text": "a ball", "motion": 0.5}]}'
    )
    (tmp_path / "l.json").write_text('{"video": "a.mp4", "caption": "a ball", "motion": 0.5}\n\n')
    (tmp_path / "caps.csv").write_text("File Name,Text,motion\na.mp4,a ball,0.5\n")
    for name in ("t.tsv", "t.json", "u.json", "l.json", "caps.csv"):
        assert read_table(tmp_path / name) == want, name
    (tmp_path / "n.csv").write_text("video,clipname,words,caption\n1,a.mp4,a ball,no\n")
    ((entry, video),) = read_table(tmp_path / "n.csv", video="clipname", caption="words")
    assert (entry.caption, video) == ("a ball", "a.mp4") and entry.extra == {"video": "1", "caption": "no"}
    with pytest.raises(UserError, match=r"lacks the column film\n.*\n.*\n.*--video_column"):
        read_table(tmp_path / "n.csv", video="film")


def test_dates_and_decimals_stay_what_they_are_and_nan_is_absent(tmp_path):
    row = {
        "video": "a.mp4", "caption": "b", "day": datetime.date(2024, 1, 31), "price": decimal.Decimal("1.10"),
        "at": datetime.datetime(2024, 1, 31, 12), "score": float("nan"), "big": 2**53 + 1, "yes": True,
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "t.parquet")
    ((entry, _),) = read_table(tmp_path / "t.parquet")
    assert entry.extra == {
        "day": "2024-01-31", "price": "1.10", "at": "2024-01-31T12:00:00", "score": "", "big": str(2**53 + 1),
        "yes": "true",
    }  # fmt: skip


def test_files_in_parquet(folder, tmp_path):
    held = {"bytes": (folder / "a.mp4").read_bytes(), "path": "clips/a.mp4"}
    nameless = {"bytes": held["bytes"], "path": None}
    rows = [
        {"video": held, "caption": "x"},
        {"video": nameless, "caption": "y"},
        {"video": None, "caption": "z"},
    ]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("video", kind), ("caption", pyarrow.string())])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema), tmp_path / "hf.parquet", row_group_size=1
    )
    plain = pyarrow.table({"mp4": pyarrow.array([held["bytes"]], pyarrow.binary()), "txt": ["x"]})
    pyarrow.parquet.write_table(plain, tmp_path / "b.parquet")
    found = read_table(tmp_path / "hf.parquet") + read_table(tmp_path / "b.parquet")
    assert [entry.id for entry, _ in found] == ["clips/a.mp4", "hf-2", "hf-3", "b-1"]
    rows, options = Videos([tmp_path]).rows(found), dict(frames=2, height=16, width=16)
    want = read_clip(folder / "a.mp4", **options)
    for number in (0, 1, 3):
        np.testing.assert_array_equal(read_row(rows[number], options).frames, want.frames)
    assert "holds no video" in read_row(rows[2], options)


@pytest.mark.parametrize(
    "video",
    [
        "{folder}/deep/b.mp4", "videos/deep/b.mp4", "deep\\b.mp4", "C:\\data\\videos\\deep\\b.mp4",
        "/elsewhere/videos/deep/b.mp4", "./deep/b.mp4",
    ],
)  # fmt: skip
def test_spellings_of_one_path(folder, video):
    found = Videos([folder]).find(video.format(folder=folder))
    assert (found.path, found.name) == (str(folder), "deep/b.mp4")


@pytest.mark.parametrize(
    "video", ["..\\videos\\a.mp4", "C:\\a.mp4", "/videos/../a.mp4", "videos/../../a.mp4"]
)
def test_paths_that_leave_the_folder(folder, video):
    with pytest.raises(UserError, match="leaves the folder"):
        Videos([folder]).find(video)


def test_accents_of_one_letter_or_two(folder, tmp_path):
    parts, whole = (unicodedata.normalize(form, "café.mp4") for form in ("NFD", "NFC"))
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / parts).write_bytes((folder / "a.mp4").read_bytes())
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as z, tarfile.open(tmp_path / "v.tar", "w") as t:
        z.write(tmp_path / "v" / parts, parts), t.add(tmp_path / "v" / parts, parts)
    (tmp_path / "v" / whole.replace("mp4", "txt")).write_text("a café")
    assert [entry.caption for entry, _ in Videos([tmp_path / "v"]).rows()] == ["a café"]
    for place in ("v", "v.zip", "v.tar"):
        assert Videos([tmp_path / place]).find(whole).name == parts
        assert Videos([tmp_path / place]).find(parts).name == parts


def test_folders_without_a_table(folder, tmp_path):
    """Linked folders, in a ring too; other suffixes; captions that cannot be read; what is left out."""
    ring, here, far = tmp_path / "here" / "ring", tmp_path / "here", tmp_path / "far"
    here.mkdir(), far.mkdir()
    ring.symlink_to(here)
    (here / "link").symlink_to(far)
    (here / "own").mkdir()
    (here / "again").symlink_to(here / "own")
    names = ("a.mp4", "c.TS", "link/b.mp4", "own/d.mp4", "bad.mp4", "j.mp4")
    for name in names:
        (here / name).write_bytes(b"")
        (here / name).with_suffix(".txt").write_bytes(b"it\x92s" if name == "bad.mp4" else name.encode())
    (here / "j.txt").unlink()
    (here / "j.json").write_text('{"caption": "from json", "motion": 0.5, "tags": ["x"]}')
    for name in ("notes.pdf", "alone.txt", ".hidden"):
        (here / name).touch()
    videos = Videos([here])
    rows = {entry.id: (entry, place) for entry, place in videos.rows()}
    assert sorted(rows) == sorted(names)
    assert "bad.txt" in str(rows["bad.mp4"][1]) and rows["link/b.mp4"][0].caption == "link/b.mp4"
    assert rows["j.mp4"][0].caption == "from json" and rows["j.mp4"][0].extra == {
        "motion": "0.5",
        "tags": '["x"]',
    }
    assert videos.left_out == ["alone.txt", "notes.pdf"]


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_as_webdataset_writes_them(folder, tmp_path, mode, capsys):
    for shard in (0, 1):
        with tarfile.open(tmp_path / f"part-{shard:03d}.tar.{mode}", f"w:{mode}") as archive:
            for suffix, data in (
                ("mp4", (folder / "a.mp4").read_bytes()),
                ("json", b'{"text": "x", "n": 1}'),
            ):
                info = tarfile.TarInfo(f"{shard:05d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    places = expand([str(tmp_path / ("part-{000..001}.tar." + mode))])
    rows, options = Videos(places).rows(), dict(frames=2, height=16, width=16)
    assert [(entry.id, entry.caption, entry.extra) for entry, _ in rows] == [
        (f"0000{i}.mp4", "x", {"n": "1"}) for i in (0, 1)
    ]
    np.testing.assert_array_equal(
        read_row(rows[1], options).frames, read_clip(folder / "a.mp4", **options).frames
    )
    assert capsys.readouterr().err.count("unpacked") == 2


def test_start_and_end_name_a_part_and_clips_are_windows(folder, tmp_path):
    (tmp_path / "t.csv").write_text(
        "video,caption,start,end\na.mp4,x,0.125,\na.mp4,x,0:00:00,0:00.25\na.mp4,x,,soon\na.mp4,x,9,\n"
    )
    rows = Videos([folder]).rows(read_table(tmp_path / "t.csv"))
    options = dict(frames=2, height=16, width=16)
    first, second, third, fourth = (read_row(row, options) for row in rows)
    assert (first.facts.frames, first.facts.start, second.facts.frames) == (2, 0.125, 2)
    assert "end is no time" in third and "no such part" in fourth
    assert [row[0].source for row in rows] == ["a.mp4"] * 4
    clips = cut(rows[:1] + rows[2:3], "uniform:2")
    assert [entry.id for entry, _ in clips] == ["a.mp4", "a.mp4@2", "a.mp4#3"] and clips[1][
        0
    ].source == "a.mp4"
    assert clips[1][1].part == Part(0.125, None, window=(1, 2))
    assert read_row(clips[0], options | {"fps": 16}).facts.step == 1 / 16
    assert "too short for clip 2" in read_row(clips[1], options | {"fps": 8})
    with pytest.raises(UserError, match="in no way 'all'"):
        cut(rows, "all")
