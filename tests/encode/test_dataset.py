"""Encoding of videos and captions: records, continuation, broken videos, bad tables, the command itself."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from ditmem_jax.bank.embedders import make_embedder
from ditmem_jax.bank.rows import rows_of_records
from ditmem_jax.bank.table import Table
from ditmem_jax.config import UMT5Config, VAEConfig, VideoConfig, to_dict
from ditmem_jax.data.record import Entry
from ditmem_jax.data.records import ArrayRecordWriter, RecordReader
from ditmem_jax.data.sources import Videos, cut, read_table
from ditmem_jax.data.video import fit, read_video, to_unit, write_video
from ditmem_jax.encode.dataset import encode_dataset
from ditmem_jax.encode.engines import Local
from ditmem_jax.encode.shards import embed
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import abstract, split
from ditmem_jax.models.wan.tokenizer import Tokenizer
from ditmem_jax.models.wan.umt5 import UMT5
from ditmem_jax.models.wan.vae import VAE, encode
from ditmem_jax.storage.weights import FORMAT, VERSION
from experiments.tiny_wan.tokenizer import train_tokenizer
from tests.tiny import tiny_config, write_config

ROOT = Path(__file__).parents[2]
COUNT = 11


def config(folder):
    return tiny_config(
        folder,
        video=VideoConfig(frames=5, height=16, width=16, fps=8),
        vae=VAEConfig(4, 4, (1, 1), 1, (True,), mean=(0.0,) * 4, std=(1.0,) * 4),  # quick to compile
        text=UMT5Config(dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=1, vocab=64),
    )


def random_network(create, seed):
    """A network of small random numbers from numpy: its own initialisation would be compiled for each shape."""
    structure, shapes = abstract(create)
    draw = np.random.default_rng(seed).normal
    return structure.merge({path: jnp.asarray(draw(0, 0.1, x.shape), x.dtype) for path, x in shapes.items()})


def networks(folder, seed=0):
    settings = config(folder)
    vae = random_network(lambda: VAE(settings.vae, rngs=nnx.Rngs(0)), seed)
    umt5 = random_network(lambda: UMT5(settings.text, rngs=nnx.Rngs(0)), seed)
    return vae, (umt5, Tokenizer(folder / "tokenizer.json", settings.dit.text_len))


def run(folder, out, entries=None, engine=Local, **options):
    """Encodes the table in `folder` with random networks, two clips at a time and four records a shard."""
    entries = read_table(folder / "captions.csv") if entries is None else entries
    rows = Videos([folder / "videos"]).rows(entries)
    options = dict(batch=2, shard_size=4) | options
    return encode_dataset(rows, out, config(folder), engine(networks(folder)), **options)


def run_until_killed(folder, out):
    """`run`, which dies from SIGKILL while it writes its third shard."""
    closed = 0

    class Deadly(ArrayRecordWriter):
        def close(self):
            nonlocal closed
            closed += 1
            if closed == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            super().close()

    sys.modules["ditmem_jax.data.records"].ArrayRecordWriter = Deadly
    run(folder, out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos, of which number 5 is broken and number 8 a single frame, a table and a tokenizer."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "videos").mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for i in range(COUNT):
        frames = generator.integers(0, 256, (1 if i == 8 else 6 + i, 20, 24, 3), np.uint8)
        write_video(folder / "videos" / f"{i}.mp4", frames, fps=8)
        rows.append({"video": f"{i}.mp4", "caption": f"ball {i}, falls", "planet": "Ørn"})
    (folder / "videos" / "5.mp4").write_text("broken")
    rows[9]["caption"] = " \t"
    rows.append(rows[0] | {"caption": "ball 0 again"})
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    train_tokenizer([row["caption"] for row in rows], folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def encoded(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "records"
    return out, run(folder, out)


def assert_same_records(got, want):
    for a, b in zip(RecordReader(got), RecordReader(want), strict=True):
        assert a.entry == b.entry
        # On a busy machine XLA divides products otherwise, and the last bits of two processes may differ.
        np.testing.assert_allclose(a.latents, b.latents, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(a.text_embedding, b.text_embedding, rtol=1e-5, atol=1e-5)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_folders(got, want):
    """The same records, and what lists them says the same but for digests of their bits."""
    assert_same_records(got, want)

    def lists(folder):
        for path in sorted(folder.iterdir()):
            text = path.read_text() if path.suffix in (".json", ".jsonl", ".csv") else ""
            yield path.name, re.sub(r'"(checksum|digest|prompts|sha256)": "\w+"', "", text)

    assert list(lists(got)) == list(lists(want))


@pytest.mark.slow
def test_records_hold_latents_and_trimmed_texts(folder, encoded):
    out, summary = encoded
    vae, (umt5, tokenizer) = networks(folder)
    reader = RecordReader(out)
    assert [entry.id for entry in reader.entries] == [
        *(f"{i}.mp4" for i in (0, 1, 2, 3, 4, 6, 7, 10)),
        "0.mp4#2",
    ]
    assert summary.made == 9 and summary.found == 0
    assert reader.meta.latents == (3, 8, 8, 4) and reader.meta.made_by["frames"] == 5
    record = reader[5]
    assert record.entry == Entry("6.mp4", "ball 6, falls", "6.mp4", extra={"planet": "Ørn"})
    frames = read_video(folder / "videos" / "6.mp4").frames[[0, 2, 5, 8, 11]]
    np.testing.assert_allclose(
        record.latents, encode(vae, jnp.asarray(to_unit(np.stack([fit(frames, 16, 16)] * 2))))[0], atol=1e-5
    )
    ids, mask = tokenizer([record.caption])
    assert len(record.text_embedding) == mask.sum() == 5  # three words, a comma, the end
    np.testing.assert_allclose(
        record.text_embedding, umt5(jnp.asarray(ids), jnp.asarray(mask))[0, :5], atol=1e-5
    )


def test_a_bank_of_records_can_be_asked_for_durations(folder, encoded, tmp_path):
    rows = rows_of_records([encoded[0]])
    table = Table.create(tmp_path / "bank", make_embedder("lexical", rows["caption"].to_pylist()), rows)
    assert table.rows("duration > 1.7")["id"].to_pylist() == ["10.mp4"]  # the next has 13 frames, at 8 fps
    assert table.by_id(["0.mp4", "10.mp4", "0.mp4#2"]).select(["duration", "frames", "fps"]).to_pylist() == [
        {"duration": frames / 8, "frames": frames, "fps": 8} for frames in (6, 16, 6)
    ]


def test_what_cannot_be_encoded_is_listed_with_the_reason(encoded):
    out, summary = encoded
    with open(out / "skipped.csv", newline="") as file:
        reasons = {row["video"]: row["reason"] for row in csv.DictReader(file)}
    assert list(reasons.items()) == summary.skipped
    assert list(reasons) == ["5.mp4", "8.mp4", "9.mp4"]
    assert "Invalid data" in reasons["5.mp4"]
    assert "at least 2 frames found: 1" in reasons["8.mp4"].replace(";", "")
    assert "caption is empty" in reasons["9.mp4"]


def test_prompts_for_sampling_are_stored(folder, encoded):
    _, text = networks(folder)
    (empty,) = embed(*text, [""])
    assert empty.shape == (1, 16)
    np.testing.assert_array_equal(RecordReader(encoded[0]).prompt(""), empty)


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_records(folder, encoded, tmp_path):
    code = f"from tests.encode.test_dataset import *; run_until_killed(Path({str(folder)!r}), Path({str(tmp_path)!r}))"
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="not complete"):
        RecordReader(tmp_path)
    summary = run(folder, tmp_path)
    assert (summary.made, summary.found) == (2, 7)
    assert_same_folders(tmp_path, encoded[0])


def test_a_run_continues_with_shards_that_were_finished_before_their_turn(folder, encoded, tmp_path):
    asked = []

    class Interrupted(Local):
        def run(self, shards, job):
            list(super().run(shards[1:], job))
            raise KeyboardInterrupt
            yield

    class Counting(Local):
        def run(self, shards, job):
            asked.extend(len(shard) for shard in shards)
            yield from super().run(shards, job)

    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path, engine=Interrupted)
    assert run(folder, tmp_path, engine=Counting).made == 9
    assert asked == [4]
    assert_same_folders(tmp_path, encoded[0])


def test_running_again_makes_nothing_and_added_rows_are_taken_up(folder, tmp_path):
    rows = read_table(folder / "captions.csv")
    assert run(folder, tmp_path, rows[:3]).made == 3
    before = snapshot(tmp_path)
    assert (lambda again: (again.made, again.found))(run(folder, tmp_path, rows[:3])) == (0, 3)
    assert snapshot(tmp_path) == before
    assert run(folder, tmp_path, rows[:5]).made == 2
    assert [entry.id for entry in RecordReader(tmp_path).entries] == [f"{i}.mp4" for i in range(5)]


def test_records_that_were_lost_are_not_taken_for_found(folder, tmp_path):
    rows = read_table(folder / "captions.csv")[:3]
    run(folder, tmp_path, rows)
    (tmp_path / "records-00000.array_record").unlink()
    with pytest.raises(UserError, match=r"records-00000\.array_record is not as it was written"):
        run(folder, tmp_path, rows)
    shutil.rmtree(tmp_path)  # as the error says
    assert run(folder, tmp_path, rows).made == len(RecordReader(tmp_path)) == 3


def test_a_prompt_file_that_was_lost_is_written_anew(folder, tmp_path):
    rows = read_table(folder / "captions.csv")[:1]
    run(folder, tmp_path, rows)
    (tmp_path / "prompts.safetensors").unlink()
    with pytest.raises(UserError, match="run the encoding once more"):
        RecordReader(tmp_path).prompt("")
    assert run(folder, tmp_path, rows).made == 0
    assert RecordReader(tmp_path).prompt("").shape == (1, 16)


def test_a_mended_video_leaves_the_list_of_skipped_ones(folder, encoded, tmp_path):
    rows = [(Entry(name, "ball", name), name) for name in ("0.mp4", "5.mp4")]
    videos = tmp_path / "videos"
    videos.mkdir()
    (tmp_path / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    (videos / "0.mp4").symlink_to(folder / "videos" / "0.mp4")
    assert run(tmp_path, tmp_path / "out", rows).skipped[0][0] == "5.mp4"
    (videos / "5.mp4").symlink_to(folder / "videos" / "1.mp4")
    assert not run(tmp_path, tmp_path / "out", rows).skipped
    assert not (tmp_path / "out" / "skipped.csv").exists()


def test_outputs_of_another_run_are_refused_and_left_alone(folder, encoded):
    out, _ = encoded
    rows = read_table(folder / "captions.csv")
    before = snapshot(out)
    settings, (vae, text) = config(folder), networks(folder)

    def attempt(message, entries=rows, settings=settings, vae=vae, text=text):
        with pytest.raises(UserError, match=message):
            encode_dataset(
                Videos([folder / "videos"]).rows(entries), out, settings, Local((vae, text)), batch=2
            )
        assert snapshot(out) == before

    attempt("made_by.vae", vae=networks(folder, seed=1)[0])
    attempt("made_by.text ", text=networks(folder, seed=1)[1])
    video = dataclasses.replace(settings.video, height=32, resize="crop")
    attempt("made_by.height = 32; made_by.resize = crop", settings=dataclasses.replace(settings, video=video))
    attempt("made_by.clips = middle; made_by.sampling = 8 fps", settings=dataclasses.replace(
        settings, video=dataclasses.replace(settings.video, sampling="rate")))  # fmt: skip
    attempt("another table\n.*rows for most of its 9 records\n.*none for 5", entries=rows[6:])


def test_only_what_has_changed_is_done_again(folder, tmp_path):
    """A mended caption, another column, a replaced file, one that was only touched, a row gone and a row added."""
    asked, texts = [], []

    class Watched(Local):
        def run(self, shards, job):
            asked.extend(row[0].id for shard in shards for row in shard)
            yield from super().run(shards, job)

        def embed(self, config, captions):
            texts.extend(captions)
            return super().embed(config, captions)

    shutil.copytree(folder / "videos", tmp_path / "videos")
    shutil.copy(folder / "tokenizer.json", tmp_path)
    names = [f"{i}.mp4" for i in (0, 1, 2, 3, 4, 6)]
    rows = [(Entry(name, f"ball {name}", name, extra={"planet": "x"}), name) for name in names]
    out = tmp_path / "records"
    assert run(tmp_path, out, rows).made == 6
    before = {record.id: record for record in RecordReader(out)}
    shutil.copy(folder / "videos" / "7.mp4", tmp_path / "videos" / "1.mp4")
    os.utime(tmp_path / "videos" / "2.mp4", ns=(1, 1))
    (tmp_path / "videos" / "6.mp4").unlink()  # its record stays
    rows[0] = dataclasses.replace(rows[0][0], caption="a mended ball"), "0.mp4"
    rows[3] = dataclasses.replace(rows[3][0], extra={"planet": "y"}), "3.mp4"
    rows[4] = Entry("10.mp4", "another ball", "10.mp4", extra={"planet": "x"}), "10.mp4"
    summary = run(tmp_path, out, rows, Watched)
    assert str(summary) == (
        "1 videos encoded, 2 found encoded, 1 encoded again, 2 with another caption or columns, 1 removed, 0 skipped"
    )
    assert asked == ["1.mp4", "10.mp4"] and texts == ["a mended ball"]
    after = {record.id: record for record in RecordReader(out)}
    assert list(after) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "6.mp4", "10.mp4"]
    run(tmp_path, tmp_path / "anew", [row for row in rows if row[1] != "6.mp4"])
    for record in RecordReader(tmp_path / "anew"):
        assert record.entry == after[record.id].entry
        np.testing.assert_array_equal(record.latents, after[record.id].latents)
        np.testing.assert_allclose(record.text_embedding, after[record.id].text_embedding, atol=1e-6)
    assert (before["1.mp4"].latents != after["1.mp4"].latents).any()
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(
        {line for line in names if not line.startswith("records-00000.")}
    )  # old shards are gone
    again = run(tmp_path, out, rows, Watched)
    assert (again.made, again.found, again.again, again.retold, len(asked)) == (0, 6, 0, 0, 2)


def test_a_replaced_file_that_cannot_be_read_is_skipped(folder, tmp_path):
    shutil.copytree(folder / "videos", tmp_path / "videos")
    shutil.copy(folder / "tokenizer.json", tmp_path)
    rows = [(Entry(name, f"ball {name}", name), name) for name in ("0.mp4", "1.mp4", "2.mp4")]
    run(tmp_path, tmp_path / "records", rows)
    (tmp_path / "videos" / "1.mp4").write_text("broken")
    summary = run(tmp_path, tmp_path / "records", rows)
    assert (summary.made, summary.found, summary.again) == (0, 2, 0) and summary.skipped[0][0] == "1.mp4"
    assert [entry.id for entry in RecordReader(tmp_path / "records").entries] == ["0.mp4", "2.mp4"]


def test_clips_of_films_are_windows_at_the_models_rate(folder, tmp_path):
    settings = config(folder)
    video = dataclasses.replace(settings.video, sampling="rate", clips="uniform:2", fps=4)
    settings = dataclasses.replace(settings, video=video)
    films = tmp_path / "films"
    films.mkdir()
    for name, frames in (("long", 24), ("short", 6)):
        write_video(films / f"{name}.mp4", np.full((frames, 20, 24, 3), 99, np.uint8), fps=8)
        (films / f"{name}.txt").write_text("a ball")
    rows = cut(Videos([films]).rows(), video.clips)
    summary = encode_dataset(rows, tmp_path / "records", settings, Local(networks(folder)), batch=2)
    reader = RecordReader(tmp_path / "records")
    assert [(e.id, e.source) for e in reader.entries] == [
        ("long.mp4", "long.mp4"), ("long.mp4@2", "long.mp4"), ("short.mp4", "short.mp4"),
    ]  # fmt: skip
    assert [facts.step for facts in reader.facts] == [0.25] * 3
    assert [facts.start for facts in reader.facts] == [0, 1.75, 0]
    assert "too short for clip 2" in dict(summary.skipped)["short.mp4@2"]
    assert reader.meta.made_by["sampling"] == "4 fps"


def test_a_table_without_a_single_good_video_is_an_error(folder, tmp_path):
    with pytest.raises(UserError, match="none of 1 videos could be encoded"):
        run(folder, tmp_path, read_table(folder / "captions.csv")[5:6])
    assert (tmp_path / "skipped.csv").exists()


def write_weights(folder):
    """The networks as the weights of the config, which is returned."""
    settings, (vae, (umt5, _)) = config(folder), networks(folder)
    weights = Path(settings.weights.path)
    weights.mkdir(exist_ok=True)
    for name, network in (("vae", vae), ("text", umt5)):
        arrays = {path: np.asarray(array) for path, array in split(network)[1].items()}
        safetensors.numpy.save_file(arrays, weights / f"{name}.safetensors")
    shutil.copy(folder / "tokenizer.json", weights)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "networks": {part: to_dict(getattr(settings, part)) for part in ("vae", "text")},
    }
    (weights / "config.json").write_text(json.dumps(index))
    return settings


def command(folder, out, *flags):
    """`python -m ditmem_jax.encode` as a user runs it, with weights and a config file in `folder`."""
    settings = write_weights(folder)
    write_config(folder / "config.py", settings)
    arguments = [
        f"--table={folder}/captions.csv",
        f"--videos={folder}/videos",
        f"--config={folder}/config.py",
    ]
    return subprocess.run(
        [sys.executable, "-m", "ditmem_jax.encode", *arguments, f"--out={out}", *flags],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_fails_under_strict_and_is_silent_about_tracebacks(folder, encoded, tmp_path):
    done = command(folder, tmp_path, "--strict", "--batch=2")
    assert done.returncode == 1
    assert "9 videos encoded, 0 found encoded, 3 skipped" in done.stdout
    assert done.stderr.splitlines()[-2:] == [
        "error: 3 videos were skipped",
        "  expected: none, since --strict was given",
    ]
    assert "Traceback" not in done.stderr
    assert_same_records(tmp_path, encoded[0])
