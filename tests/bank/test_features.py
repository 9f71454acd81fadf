"""Rows of videos stored once: clips are the same within rounding, and rows of anything else are refused."""

import dataclasses
import subprocess
import sys
from functools import partial

import jax.numpy as jnp
import lancedb
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.bank.features import Features, make_features
from ditmem_jax.bank.table import Table
from ditmem_jax.config import MemoryConfig
from ditmem_jax.data.video import read_video
from ditmem_jax.errors import UserError
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.state import abstract
from ditmem_jax.sample.clips import make_clips
from ditmem_jax.sample.retrieval import retrieve
from ditmem_jax.sample.sampler import Sampler
from ditmem_jax.storage.encoders import load_encoder, save_encoder
from tests.tiny import make_tiny, random_arrays, replace

PROMPT = "A ball falls on planet Brux"
KINDS = {
    "radial, group norm, grid": dict(tokens=(1, 2, 2), norm="group", filter="radial"),
    "released, batch norm, repeated rows": dict(tokens=5, norm="batch", filter="released"),
    "learned strength": dict(tokens=(1, 1, 1), norm="batch", filter="radial", strength=0.3),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return replace(make_tiny(tmp_path_factory.mktemp("tiny")), "sample", steps=2)


@pytest.fixture(scope="module")
def bank(config):
    return Table.open(config.data.bank)


def encoder_of(config, path, seed=0, **changes):
    memory = MemoryConfig(**vars(config.memory) | changes)
    arrays = random_arrays(abstract(lambda: MemoryEncoder(memory, rngs=nnx.Rngs(0)))[1], seed)
    arrays = {name: np.abs(x) if name.endswith("var") else x for name, x in arrays.items()}
    save_encoder(path, arrays, memory, {})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_clips_are_the_same_within_rounding(config, bank, tmp_path, kind):
    encoder = encoder_of(config, tmp_path / "encoder.safetensors", **KINDS[kind])
    summary = make_features(bank, encoder, tmp_path / "tokens")
    assert (summary.made, summary.found) == (len(bank), 0)
    found = retrieve(config, PROMPT)
    sampler = Sampler.load(dataclasses.replace(config, memory=load_encoder(encoder).config), encoder)
    stored = (Features.open(tmp_path / "tokens", encoder).rows(found.checksums)[None],)
    fresh = sampler.rows(found.latents[None])
    np.testing.assert_allclose(stored[0], fresh[0], rtol=1e-5, atol=1e-6)
    plain, *clips = (
        np.asarray(sampler.latents([PROMPT], [0], given)) for given in (None, stored, found.latents[None])
    )
    np.testing.assert_allclose(*clips, rtol=1e-4, atol=1e-5)
    assert np.abs(clips[0] - plain).max() > 1e-3

    network = load_encoder(encoder)
    whole = nnx.jit(partial(MemoryEncoder.__call__, training=False))(
        network, jnp.asarray(found.latents[None])
    )
    mixed = network.mix(jnp.asarray(stored[0]), jnp.ones((1, len(found.videos)), bool))
    for got, want in zip(mixed[:2], whole[:2], strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.fixture(scope="module")
def encoder(config, tmp_path_factory):
    return encoder_of(config, tmp_path_factory.mktemp("encoder") / "encoder.safetensors")


@pytest.fixture(scope="module")
def store(bank, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "tokens"
    make_features(bank, encoder, out)
    return out


@pytest.mark.slow
def test_the_command_line_way(config, encoder, store, tmp_path, capsys, monkeypatch):
    (latents,) = make_clips(config, PROMPT, tmp_path / "latents.mp4", encoder)
    printed = capsys.readouterr().out
    monkeypatch.setattr("ditmem_jax.sample.retrieval.References", None)  # no latents are read
    (tokens,) = make_clips(config, PROMPT, tmp_path / "tokens.mp4", encoder, features=store)
    pixels = [read_video(clip).frames.astype(int) for clip in (tokens, latents)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 2
    for text, size in ((printed, "1,536 bytes"), (capsys.readouterr().out, "768 bytes instead of 1,536")):
        assert size in text and "first step after" in text


def test_a_killed_run_continues(bank, encoder, tmp_path, monkeypatch):
    import ditmem_jax.bank.features as module

    encode, seen = module.encode_video, []

    def until_killed(network, latents):
        seen.append(1)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return encode(network, latents)

    monkeypatch.setattr(module, "encode_video", until_killed)
    with pytest.raises(KeyboardInterrupt):
        make_features(bank, encoder, tmp_path / "tokens", commit_every=3)
    monkeypatch.undo()
    summary = make_features(bank, encoder, tmp_path / "tokens", commit_every=3)
    assert (summary.made, summary.found) == (len(bank) - 6, 6)
    assert make_features(bank, encoder, tmp_path / "tokens").made == 0
    store = Features.open(tmp_path / "tokens", encoder)
    assert sorted(store.checksums) == sorted(bank.rows(columns=["checksum"])["checksum"].to_pylist())


def test_what_does_not_fit_is_named(config, bank, encoder, store, tmp_path):
    other = encoder_of(config, tmp_path / "other.safetensors", seed=1)
    for uri in (store, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no tokens of the encoder .*other(.|\n)*bank tokens"):
            Features.open(uri, other)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match=r"lack 1 of 1 videos(.|\n)*once more"):
        Features.open(store, encoder).rows(["0" * 32])
    with pytest.raises(UserError, match="other"):
        make_clips(config, PROMPT, tmp_path / "x.mp4", other, features=store)


def test_altered_rows_are_named(bank, encoder, tmp_path):
    make_features(bank, encoder, tmp_path)
    (name,) = lancedb.connect(tmp_path).list_tables().tables
    table = lancedb.connect(tmp_path).open_table(name)
    checksum = table.search().to_arrow()["checksum"][0].as_py()
    table.update(where=f"checksum = '{checksum}'", values={"digest": "0"})
    with pytest.raises(UserError, match=f"tokens of the video {checksum} .* were altered"):
        Features.open(tmp_path, encoder).rows([checksum])


def test_tokens_may_lie_in_the_bank_itself(config, bank, encoder):
    make_features(bank, encoder, bank.uri)
    assert len(Features.open(bank.uri, encoder)) == len(Table.open(config.data.bank)) == len(bank)


@pytest.mark.slow
def test_the_command(config, bank, encoder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "ditmem_jax.bank",
        "tokens",
        "--bank",
        bank.uri,
        "--out",
        str(tmp_path / "x"),
    ]
    done = subprocess.run([*command, "--encoder", str(encoder)], capture_output=True, text=True)
    assert done.returncode == 0 and "384 bytes instead of 768, 1/2.0" in done.stdout, done.stderr
    assert len(Features.open(tmp_path / "x", encoder)) == len(bank)
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and "--encoder is missing" in failed.stderr
