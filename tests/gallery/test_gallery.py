"""The page without a browser: what it shows, plays, adds and refuses."""

import html.parser
import shutil
from pathlib import Path

import numpy as np
import pytest

from ditmem_jax.bank.embedders import make_embedder
from ditmem_jax.bank.rows import rows_of_records
from ditmem_jax.bank.search import Bank
from ditmem_jax.bank.table import Table
from ditmem_jax.data.record import Entry
from ditmem_jax.data.records import RecordReader
from ditmem_jax.data.sources import Videos
from ditmem_jax.data.video import read_video
from ditmem_jax.encode.dataset import encode_dataset
from ditmem_jax.encode.engines import Local
from ditmem_jax.errors import UserError
from ditmem_jax.gallery import gallery as gallery_module
from ditmem_jax.gallery.actions import Actions
from ditmem_jax.gallery.clips import Clips, below
from ditmem_jax.gallery.gallery import Gallery
from ditmem_jax.gallery.map import CATEGORIES, SCALE, UNKNOWN, colour, project
from tests.gallery.small import COUNT, NASTY, config, load_random, make_bank, with_networks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of the bank beside its videos and records, with random networks behind every config."""
    load_random(monkeypatch, made)
    shutil.copytree(made / "bank", tmp_path / "bank")
    for name in ("videos", "records"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


@pytest.fixture
def gallery(folder):
    return Gallery.open(str(folder / "bank"), videos=str(folder / "videos"))


@pytest.fixture
def actions(gallery):
    return Actions(gallery)


class Text(html.parser.HTMLParser):
    """Tags and text of markup, as a browser would read it."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.text, self.attributes = [], [], []
        self.feed(markup)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append(dict(attributes))

    def handle_data(self, data):
        self.text.append(data)


def ids(cards):
    return [attributes["data-id"] for attributes in Text(cards).attributes if "data-id" in attributes]


@pytest.mark.slow
def test_a_search_gives_the_nearest_with_scores(gallery):
    found = gallery.search("a red ball falls on zorvex", k=3)
    assert found.rows[0]["id"] == "red zorvex.mp4" and len(found.rows) == 3 and found.left == COUNT
    assert found.scores == sorted(found.scores, reverse=True)
    assert (
        found.scores
        == Bank.open(gallery.about().uri).search(["a red ball falls on zorvex"], 3).scores[0].tolist()
    )


@pytest.mark.parametrize("prompt", ["", "  ", "ball"])
def test_a_filter_leaves_some_and_more_are_not_asked_for(actions, prompt):
    told, cards = actions.search(prompt, "motion > 0.5", 60, None)
    assert sorted(ids(cards)) == ["blue quindara.mp4", "red quindara.mp4"]
    assert "2 of 2 videos that pass the filter" in told
    assert ("1.000" in "".join(Text(cards).text).split("motion")[0]) == (
        prompt == "ball"
    )  # a score was given
    told, cards = actions.search(prompt, "motion > 5", 3, None)
    assert "No video passes this filter." in told and ids(cards) == []


@pytest.mark.parametrize("where", ["motio > 0.5", "motion >", "'", "motion > 'x' OR"])
def test_a_bad_filter_is_a_sentence_with_the_columns(actions, where):
    told, cards = actions.search("ball", where, 3, None)
    assert 'role="alert"' in told and "motion" in told and "caption" in told and cards is None


def test_a_prompt_without_words_is_told(actions):
    assert 'role="alert"' in actions.search("?!", "", 3, None)[0]


def test_changes_of_others_are_seen_at_once(actions, gallery):
    actions.search("ball", "", 5, None)
    other = Bank.open(gallery.about().uri)
    other.remove(["red zorvex.mp4"])
    assert "red zorvex.mp4" not in ids(actions.search("ball", "", 60, None)[1])
    told, cards = actions.remove("red zorvex.mp4", "ball", "", 60, None)
    assert 'role="alert"' in told and len(ids(cards)) == COUNT - 1
    assert 'role="alert"' in actions.point("red zorvex.mp4", None)


def test_the_last_video_can_go_and_an_empty_bank_can_be_looked_at(actions, gallery):
    Bank.open(gallery.about().uri).remove(where="id != 'red zorvex.mp4'")
    told, cards = actions.remove("red zorvex.mp4", "ball", "", 12, None)
    assert "Removed red zorvex.mp4." in told and "The bank is empty." in told and ids(cards) == []
    assert "<circle" not in actions.map("motion", None)
    assert "<b>0</b> videos" in actions.heading(None)


def test_an_old_version_is_as_it_was_and_cannot_be_changed(actions, gallery, folder):
    first = gallery.about().version
    assert "Removed" in actions.remove("red zorvex.mp4", "", "", 60, None)[0]
    assert "red zorvex.mp4" in ids(actions.search("", "", 60, first)[1])
    assert 'data-action="remove"' in actions.search("", "", 60, None)[1]
    assert 'data-action="remove"' not in actions.search("", "", 60, first)[1]
    assert "read-only" in actions.heading(first) and "read-only" not in actions.heading(None)
    assert "cannot be changed" in actions.remove("blue zorvex.mp4", "", "", 5, first)[0]
    told, worked = actions.add(str(folder / "videos" / "red zorvex.mp4"), "ball", first)
    assert "cannot be changed" in told and not worked
    listed = gallery.versions()
    assert [one.change for one in listed] == ["1 removed", f"built with {COUNT}"] and listed[
        0
    ].rows == COUNT - 1
    assert gallery.about().rows == COUNT - 1
    assert 'role="alert"' in actions.heading(99) and 'role="alert"' in actions.search("", "", 5, 99)[0]


@pytest.mark.parametrize("caption", NASTY, ids=range(len(NASTY)))
def test_captions_are_shown_as_text_whatever_they_hold(folder, caption):
    rows = rows_of_records([folder / "records"]).slice(0, 1)
    nasty = caption[:200]
    rows = rows.set_column(0, "id", [[nasty]]).set_column(1, "caption", [[caption]])
    Table.create(folder / "nasty", make_embedder("lexical", [caption]), rows)
    actions = Actions(Gallery.open(str(folder / "nasty")))
    _, cards = actions.search("ball", "", 5, None)
    plain = Text(cards)
    assert set(plain.tags) <= {
        "div",
        "article",
        "p",
        "b",
        "span",
        "details",
        "summary",
        "button",
        "dl",
        "dt",
        "dd",
    }
    shown = "".join(plain.text).replace(" …", "").replace(" ", "")
    assert caption.replace(" ", "") in shown
    assert nasty in [attributes.get("data-key") for attributes in plain.attributes]
    assert "script" not in Text(actions.map("motion", None)).tags
    assert ids(actions.point(nasty, None)) == [nasty]
    assert "The bank is empty." in actions.remove(nasty, "ball", "", 5, None)[0]


def test_only_videos_below_the_folder_are_played(tmp_path):
    for name in ("in/deep/a.mp4", "in/notes.txt", "out.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "in" / "link.mp4").symlink_to(tmp_path / "in" / "deep" / "a.mp4")
    (tmp_path / "in" / "away.mp4").symlink_to(tmp_path / "out.mp4")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    for name in ("deep/a.mp4", "link.mp4", "deep/../deep/a.mp4", "up/in/deep/a.mp4"):
        assert below(tmp_path / "in", name) == tmp_path / "in" / "deep" / "a.mp4"
    refused = (
        "../out.mp4",
        "away.mp4",
        "up/out.mp4",
        str(tmp_path / "out.mp4"),
        "/etc/passwd",
        "../../etc/passwd",
    )
    for name in (*refused, "notes.txt", "deep", "", "gone.mp4", "a\0.mp4", "x" * 5000):
        with pytest.raises(UserError):
            below(tmp_path / "in", name)


def test_a_clip_that_cannot_be_played_says_what_would(gallery, folder):
    row = gallery.row("red zorvex.mp4")
    assert gallery.clips.file(row) == (folder / "videos" / "red zorvex.mp4").resolve()
    plain = Clips(None, folder / "bank" / "added", None)
    with pytest.raises(UserError, match=r"--videos.*--config"):
        plain.file(row)
    leaves = dict(row, source="../records/index.json")
    assert "outside" in gallery.clips.missing(leaves) or "no video" in gallery.clips.missing(leaves)


def test_latents_are_decoded_once_and_only_if_they_are_the_right_ones(folder, monkeypatch):
    gallery = Gallery.open(str(folder / "bank"), config=config(folder), cache=str(folder / "cache"))
    row = gallery.row("red zorvex.mp4")
    path = gallery.clips.file(row)
    assert path.is_relative_to(folder / "cache") and read_video(path).frames.shape == (5, 16, 16, 3)
    written = path.stat().st_mtime_ns
    assert gallery.clips.file(row) == path and path.stat().st_mtime_ns == written
    for other in (
        dict(checksum="0" * 32),
        dict(row=99, checksum="2" * 32),
        dict(records=str(folder / "gone"), checksum="1" * 32),
    ):
        with pytest.raises(UserError):
            gallery.clips.file(dict(row, **other))
    load_random(monkeypatch, folder, seed=1)
    other = Gallery.open(str(folder / "bank"), config=config(folder), cache=str(folder / "cache"))
    with pytest.raises(UserError, match="another VAE"):
        other.clips.file(row)


def test_what_is_added_is_encoded_as_encode_does_and_played(folder):
    gallery = Gallery.open(str(folder / "bank"), config=config(folder), cache=str(folder / "cache"))
    video = folder / "videos" / "red zorvex.mp4"
    told, worked = Actions(gallery).add(str(video), "a “red” ball\nhops", None)
    assert worked and "Added as red zorvex.mp4#2." in told
    row = gallery.row("red zorvex.mp4#2")
    assert gallery.search("hops", k=1).rows == [row] and row["caption"] == "a “red” ball\nhops"
    assert gallery.clips.file(row).read_bytes() == video.read_bytes()
    entry = Entry("red zorvex.mp4", "a “red” ball\nhops", "red zorvex.mp4")
    rows = Videos([folder / "videos"]).rows([(entry, entry.source)])
    encode_dataset(rows, folder / "again", config(folder), Local(with_networks(folder)), batch=1)
    got, want = RecordReader(row["records"])[row["row"]], RecordReader(folder / "again")[0]
    np.testing.assert_array_equal(got.latents, want.latents)
    np.testing.assert_array_equal(got.text_embedding, want.text_embedding)
    assert gallery.versions()[0].change == "1 added"


def test_what_cannot_be_added_leaves_nothing_behind(folder, monkeypatch):
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("no video")
    actions = Actions(Gallery.open(str(folder / "bank"), config=config(folder)))
    video = str(folder / "videos" / "red zorvex.mp4")
    for name, caption in (
        (str(folder / "broken.mp4"), "a"),
        (str(folder / "notes.txt"), "a"),
        (video, " \n"),
        (None, "a"),
    ):
        told, worked = actions.add(name, caption, None)
        assert 'role="alert"' in told and not worked
    load_random(monkeypatch, folder, seed=1)
    told, worked = Actions(Gallery.open(str(folder / "bank"), config=config(folder))).add(
        video, "a ball", None
    )
    assert "another config" in told and not worked
    assert list((folder / "bank" / "added").iterdir()) == []
    assert actions.gallery.about().rows == COUNT
    told, worked = Actions(Gallery.open(str(folder / "bank"))).add(video, "a ball", None)
    assert "--config" in told and not worked


def test_the_map_shows_where_vectors_differ_most():
    plane = np.random.default_rng(0).normal(size=(200, 2)) * [3, 1]
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0][:2]
    points = project((plane @ turn + 5).astype(np.float32))
    for axis in (0, 1):
        assert abs(np.corrcoef(points[:, axis], plane[:, axis])[0, 1]) > 0.99
        assert points[:, axis].min() == pytest.approx(-1) and points[:, axis].max() == pytest.approx(1)
    np.testing.assert_array_equal(points, project((plane @ turn + 5).astype(np.float32)))
    for few in (1, 2, 3):
        assert np.isfinite(project(np.ones((few, 8), np.float32))).all()
        assert project(np.eye(8, dtype=np.float32)[:few]).shape == (few, 2)


def test_colours_tell_numbers_names_and_nothing_apart():
    low, high = ("#{:02x}{:02x}{:02x}".format(*SCALE[end]) for end in (0, -1))
    numbers = colour([1.0, 3, None, 2.0, float("nan")])
    assert numbers.of[:3] == [low, high, UNKNOWN] and numbers.of[4] == UNKNOWN and numbers.ends == (1.0, 3.0)
    names = colour(["b", "a", None, "b"])
    assert names.of == [CATEGORIES[1], CATEGORIES[0], UNKNOWN, CATEGORIES[1]]
    assert names.names == ((CATEGORIES[0], "a"), (CATEGORIES[1], "b"), (UNKNOWN, "other"))
    assert len(set(colour([f"name {i}" for i in range(20)]).of)) == len(CATEGORIES) + 1
    assert colour([None, None]).of == [UNKNOWN] * 2 and len(set(colour([2.0, 2.0]).of)) == 1


def test_a_large_bank_is_mapped_by_a_sample(gallery, monkeypatch):
    whole = gallery.map("motion")
    assert sorted(whole.ids) == sorted(row["id"] for row in gallery.search("", k=60).rows)
    monkeypatch.setattr(gallery_module, "POINTS", 3)
    sample = gallery.map("motion")
    assert len(sample.ids) == len(sample.points) == len(sample.colours.of) == 3 and sample.total == COUNT
    assert sample.ids == gallery.map("motion").ids
    assert "sample of 3 of" in Actions(gallery).map("motion", None)
    assert 'role="alert"' in Actions(gallery).map("gone", None)


def test_what_is_missing_is_told(folder):
    with pytest.raises(UserError, match="no bank"):
        Gallery.open(str(folder / "gone"))
    with pytest.raises(UserError, match="no folder"):
        Gallery.open(str(folder / "bank"), videos=str(Path("gone")))
