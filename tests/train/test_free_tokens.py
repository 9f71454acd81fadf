"""Free tokens of sources from records to clips, and where they are refused."""

import dataclasses

import jax
import numpy as np
import pytest

from ditmem_jax.bank import matches
from ditmem_jax.bank.features import make_features
from ditmem_jax.bank.table import Table
from ditmem_jax.config import FreeTokensConfig
from ditmem_jax.convert.export import export_encoder
from ditmem_jax.data.record import Entry
from ditmem_jax.data.records import RecordReader
from ditmem_jax.data.references import majority_source
from ditmem_jax.errors import UserError
from ditmem_jax.sample.clips import make_clips
from ditmem_jax.sample.retrieval import retrieve
from ditmem_jax.sample.sampler import Sampler
from ditmem_jax.storage.encoders import encoder_metadata
from ditmem_jax.train.loop import train_memory
from ditmem_jax.train.setup import Setup, with_sources
from tests.tiny import CAPTIONS, make_tiny, replace

PROMPT = "A ball falls on planet Brux"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = make_tiny(tmp_path_factory.mktemp("tiny"))
    config = dataclasses.replace(config, memory=FreeTokensConfig(dim=48, tokens=2))
    config = replace(config, "data", validation=config.data.records)
    config = replace(config, "optim", learning_rate=0.1)
    return replace(replace(config, "run", steps=2, validate_every=2), "sample", steps=2)


@pytest.fixture(scope="module")
def encoder(config):
    return train_memory(config)


def entry(source, **extra):
    return Entry("id", "caption", source, extra=extra)


def test_a_samples_source_is_that_of_most_of_its_references():
    assert majority_source([entry("b"), entry("a"), entry("a")], "source") == "a"
    assert majority_source([entry("b"), entry("a")], "source") == "b"
    assert majority_source([entry("a", world="Aron"), entry("b", world="Brux")], "world") == "Aron"
    with pytest.raises(UserError, match=r"no column 'worl'(.|\n)*one of: world, source"):
        majority_source([entry("a", world="Aron")], "worl")


@pytest.mark.slow
def test_samples_train_the_tokens_of_their_own_source(config):
    records = RecordReader(config.data.records)
    videos, index = matches.read(records, config.data.bank, 2).references(2)
    setup = Setup(replace(config, "run", out=config.run.out + "_other"))
    assert set(setup.config.memory.sources) == {videos.entries[row[0]].source for row in index}
    batch = next(setup.batches())
    places = {record.id: number for number, record in enumerate(records.entries)}
    for id, number in zip(batch.ids, batch.source, strict=True):
        best = videos.entries[index[places[id]][0]]  # no two videos of the bank have one source
        assert setup.config.memory.sources[number] == best.source
    for held_out in setup.held_out:
        known = held_out.other.present.any(axis=1)
        assert known.any() and (held_out.right.source != held_out.other.source)[known].all()
    state = setup.initial_state()
    with jax.set_mesh(setup.mesh):
        step, _ = setup.compile()
        before = np.array(state.params["tokens"])
        state, _ = step(state, setup.backbone, setup.put(batch))
    moved = {
        number for number in range(len(before)) if (state.params["tokens"][number] != before[number]).any()
    }
    assert moved and moved <= set(batch.source.tolist())


@pytest.mark.slow
def test_a_run_keeps_the_names_with_the_tokens_and_clips_take_them(config, encoder, tmp_path, capsys):
    memory, notes = encoder_metadata(encoder)
    assert memory.sources == tuple(sorted(memory.sources)) and len(memory.sources) > 1
    assert {"gain", "gain_wrong"} <= notes["gains"].keys()
    sampler = Sampler.load(config, encoder, prompts=[PROMPT])
    plain = sampler.latents([PROMPT], [0])
    first, second = (sampler.latents([PROMPT], [0], sources=[name]) for name in memory.sources[:2])
    assert np.abs(first - plain).max() > 1e-4 and np.abs(first - second).max() > 1e-4
    np.testing.assert_array_equal(
        sampler.latents([PROMPT], [0], strength=0.0, sources=memory.sources[:1]), plain
    )
    with pytest.raises(UserError, match=r"the source 'Atlantis'(.|\n)*one of memory.sources"):
        sampler.latents([PROMPT], [0], sources=["Atlantis"])
    with pytest.raises(UserError, match="nothing from single videos"):
        sampler.latents([PROMPT], [0], retrieve(config, PROMPT).latents[None])

    caption = next(
        text for text in CAPTIONS if retrieve(config, text).videos[0]["source"] == memory.sources[0]
    )
    make_clips(config, caption, tmp_path / "clip.mp4", encoder)
    assert f"the free tokens of {memory.sources[0]}" in capsys.readouterr().out


def test_what_needs_videos_is_refused(config, encoder, tmp_path):
    with pytest.raises(UserError, match="nothing from single videos"):
        make_features(Table.open(config.data.bank), encoder, tmp_path / "tokens")
    with pytest.raises(UserError, match=r"no place for the encoder(.|\n)*memory.kind = free_tokens"):
        export_encoder(encoder, tmp_path / "released.safetensors")
    with pytest.raises(UserError, match="free tokens are made from no video"):
        make_clips(config, PROMPT, tmp_path / "clip.mp4", encoder, features=tmp_path)


def test_records_of_a_source_without_tokens_are_named(config):
    records = RecordReader(config.data.records)
    found = matches.read(records, config.data.bank, 2).references(2)
    few = replace(config, "memory", sources=("0.mp4",))
    with pytest.raises(UserError, match=r"no tokens were learned for the source(.|\n)*0.mp4"):
        with_sources(few, [found])
