"""The set-up of a run: what is loaded, what does not fit together, and the batches to validate on."""

import dataclasses
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from ditmem_jax.bank import matches
from ditmem_jax.bank.matches import FILE, Matches
from ditmem_jax.config import MeshConfig
from ditmem_jax.data.records import RecordReader, RecordWriter
from ditmem_jax.errors import UserError
from ditmem_jax.parallel.mesh import make_mesh
from ditmem_jax.storage.encoders import encoder_metadata, save_encoder
from ditmem_jax.train.setup import Setup, check, load_networks, with_first_frames
from ditmem_jax.types import Batch, Conditioning
from tests.tiny import make_bank, make_tiny, replace, tiny_config, with_experts
from tests.train.test_step import first_state


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_of_two_experts_only_the_one_that_trains_is_loaded_and_named_in_the_file(config, tmp_path):
    config, mesh = with_experts(config, tmp_path / "weights", "high"), make_mesh(MeshConfig())
    high = safetensors.numpy.load_file(tmp_path / "weights" / "dit_high.safetensors")
    _, backbone = load_networks(config, mesh)
    assert backbone.keys() == high.keys()
    np.testing.assert_array_equal(backbone["head.kernel"], high["head.kernel"])
    setup = types.SimpleNamespace(config=config, mesh=mesh, folder=tmp_path, fingerprint="abc")
    file = Setup.export(setup, "encoder.safetensors", jax.device_put(first_state(config)), 7, {})
    video = {"frames": 9, "height": 32, "width": 32}
    told = {"step": 7, "gains": {}, "backbone": "abc", "expert": "high", "video": video}
    assert encoder_metadata(file)[1] == told


def test_a_run_that_cannot_begin_leaves_nothing(config, tmp_path):
    config = replace(config, "run", out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="at least 50 references"):
        Setup(replace(config, "data", references=50))
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_references_it_began_with(config, tmp_path, capsys):
    folder = shutil.copytree(config.data.records, tmp_path / "records")
    bank = make_bank(tmp_path / "bank", Path(config.data.bank).with_name("library"))
    config = replace(config, "data", records=str(folder), bank=bank.table.uri, validation="")
    config = replace(config, "run", out=str(tmp_path / "run"))

    def match():
        matches.find(RecordReader(folder), bank, 2).save(folder / FILE)

    match()
    first = next(Setup(config).batches())
    began = Matches.load(tmp_path / "run" / FILE)
    bank.remove(began.table["matches"][0].as_py())
    match()
    assert "note" not in capsys.readouterr().out
    np.testing.assert_array_equal(next(Setup(config).batches()).references, first.references)
    assert "matched with version 1 of the bank" in capsys.readouterr().out
    other = Setup(replace(config, "run", out=str(tmp_path / "other")))
    assert (next(other.batches()).references != first.references).any()


def test_a_run_goes_on_with_records_and_a_bank_at_other_places(config, tmp_path):
    """They are told by their content; other records, or a bank of other videos under the same ids, are not them."""
    config = replace(replace(config, "data", validation=""), "run", out=str(tmp_path / "run"))
    first = next(Setup(config).batches())
    library = Path(config.data.bank).with_name("library")
    for name, folder in (("library", library), ("records", config.data.records)):
        shutil.copytree(folder, tmp_path / name)
    moved = make_bank(tmp_path / "bank", tmp_path / "library").table.uri
    setup = Setup(replace(config, "data", records=str(tmp_path / "records"), bank=moved))
    assert {key: now for key, (_, now) in setup.changes.items()} == {
        "data.records": str(tmp_path / "records"),
        "data.bank": moved,
    }
    np.testing.assert_array_equal(next(setup.batches()).references, first.references)
    pointers = Matches.load(tmp_path / "run" / FILE).references(2)[0].pointers
    assert {pointer.records for pointer in pointers} == {str(tmp_path / "library")}
    with pytest.raises(UserError, match=r"matches in .*run.* are not of these records"):
        Setup(replace(config, "data", records=config.data.bank.replace("bank", "library")))
    with RecordWriter(tmp_path / "others", RecordReader(library).meta) as writer:
        for record in RecordReader(library):
            writer.add(dataclasses.replace(record, latents=-record.latents))
    others = make_bank(tmp_path / "bank of others", tmp_path / "others").table.uri
    with pytest.raises(UserError, match="holds another video under 'video2_"):
        Setup(replace(config, "data", bank=others))


def test_missing_and_unfit_matches_name_the_command(config, tmp_path):
    records = RecordReader(config.data.records)
    with pytest.raises(UserError, match=r"of these records and this bank(.|\n)*match .*--k 50"):
        matches.read(records, config.data.bank, 50)
    with pytest.raises(UserError, match="of these records and this bank"):
        matches.read(records, str(tmp_path), 2)
    shutil.copytree(records.folder, tmp_path / "records", ignore=shutil.ignore_patterns(FILE))
    with pytest.raises(UserError, match="have not been matched"):
        matches.read(RecordReader(tmp_path / "records"), config.data.bank, 2)


def test_a_run_begins_from_a_trained_encoder(config, tmp_path, capsys):
    state, memory = first_state(config), config.memory
    arrays = {name: np.asarray(x) + 1 for name, x in (state.params | state.rest).items()}
    path = tmp_path / "encoder.safetensors"

    def read(memory=memory, **about):
        save_encoder(path, arrays, memory, about)
        begun = replace(config, "run", init_from=str(path))
        setup = types.SimpleNamespace(
            config=begun, folder=tmp_path / "run", fingerprint="abc", state_layout=state
        )
        return Setup._read_init_from(setup)

    found = read(dataclasses.replace(memory, dropout=0.1), backbone="abc")
    assert not capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, found, arrays)
    read(backbone="xyz")
    assert "was trained with another transformer" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"init_from(.|\n)*memory.num_heads = 4(.|\n)*memory.num_heads = 2"):
        read(dataclasses.replace(memory, num_heads=2))
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    assert read() is None  # the run goes on


def test_records_and_meshes_that_do_not_fit_are_named(config):
    records = RecordReader(config.data.records)
    bank = [matches.read(records, config.data.bank, 2).references(2)[0]]
    mesh = make_mesh(MeshConfig())
    check(config, mesh, bank, records)
    with pytest.raises(UserError, match=r"batch_size does not divide"):
        check(replace(config, "data", batch_size=6), mesh, bank, records)
    with pytest.raises(UserError, match=r"records do not fill a batch"):
        check(replace(config, "data", batch_size=24), mesh, bank, records)
    with pytest.raises(UserError, match=r"library do not fit(.|\n)*latents \[5, 4, 4, 4\]"):
        check(replace(config, "video", frames=17), mesh, bank, records)
    with pytest.raises(UserError, match=r"mesh.context"):
        check(config, make_mesh(MeshConfig(data=1, context=8)), bank, records)


def held_out(config, out, monkeypatch, devices):
    """Of each sample the bytes of its latents, of its references, and of another's."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    monkeypatch.setattr("ditmem_jax.train.setup.make_mesh", lambda _: mesh)
    samples, latents = {}, {record.id: record.latents for record in RecordReader(config.data.validation)}
    for right, wrong, entries in Setup(replace(config, "run", out=str(out))).held_out:
        np.testing.assert_array_equal(right.latents, wrong.latents)
        assert [latents[x.id].tobytes() for x in entries] == [x.tobytes() for x in np.asarray(right.latents)]
        for number, ours in enumerate(np.asarray(right.latents)):
            videos = ([x.tobytes() for x in np.asarray(each.references[number])] for each in (right, wrong))
            samples[ours.tobytes()] = tuple(videos)
    return samples


def test_another_memory_is_of_another_planet_whatever_the_batch_size(config, tmp_path, monkeypatch):
    """In batches of eight over eight devices, and of one: nothing is taken from the batch."""
    eight = held_out(config, tmp_path / "eight", monkeypatch, 8)
    single = replace(replace(config, "data", batch_size=1), "run", validation_batches=8)
    assert held_out(single, tmp_path / "one", monkeypatch, 1) == eight
    folders = config.data.validation, Path(config.data.bank).with_name("library")
    planets = {x.latents.tobytes(): x.caption.split()[5] for folder in folders for x in RecordReader(folder)}
    assert len(eight) == 8
    for latents, (ours, theirs) in eight.items():
        assert {planets[x] for x in ours} == {planets[latents]}
        assert planets[latents] not in {planets[x] for x in theirs}


def test_a_validation_gives_the_same_samples_their_first_frame():
    config = replace(tiny_config("nowhere"), "objective", first_frame=0.5)
    latents = np.ones((40, 3, 1, 1, 1), np.float32)
    ids = np.array([f"video{i}" for i in range(40)])
    batch = Batch(
        latents,
        Conditioning(np.zeros((40, 1, 1), np.float32)),
        latents[:, None],
        latents[:, :1, 0, 0, 0] > 0,
        ids,
    )
    given = with_first_frames(batch, config).conditioning.given
    assert 10 < given[:, 0].sum() < 30 and not given[:, 1:].any()
    again = batch._replace(ids=ids[::-1])
    np.testing.assert_array_equal(with_first_frames(again, config).conditioning.given, given[::-1])
    assert with_first_frames(batch, tiny_config("nowhere")) is batch
