"""Sampling: the stepper and the guidance against hand-written arrays, exactness of no memory, clips and their errors."""

import copy
import dataclasses
import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.bank.search import Bank
from ditmem_jax.config import ExpertsConfig, MeshConfig
from ditmem_jax.data.video import read_video, to_unit
from ditmem_jax.diffusion import flow
from ditmem_jax.diffusion.guidance import guided
from ditmem_jax.diffusion.solvers import SOLVERS, Carry
from ditmem_jax.errors import UserError
from ditmem_jax.models.ditmem import with_strength
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.models.wan.vae import encode as vae_encode
from ditmem_jax.parallel.mesh import make_mesh
from ditmem_jax.sample.clips import make_clips
from ditmem_jax.sample.requests import Request
from ditmem_jax.sample.retrieval import retrieve
from ditmem_jax.sample.sampler import NotFinite, Sampler, checked, denoise, make_step, schedule, warn_of_size
from ditmem_jax.storage.encoders import load_encoder, save_encoder
from ditmem_jax.storage.weights import load_dit, load_umt5, load_vae
from ditmem_jax.types import Conditioning, GivenFrames, Memory
from tests.fakes import FakeDiT
from tests.tiny import make_tiny, random_arrays, replace, tiny_config, with_experts

PROMPT = "A ball falls on planet Brux"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = make_tiny(tmp_path_factory.mktemp("tiny"))
    return replace(config, "sample", steps=3)


@pytest.fixture(scope="module")
def encoder(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    write_encoder(path, config.memory)
    return path


@pytest.fixture(scope="module")
def sampler(config, encoder):
    """On one device, with the solver that remembers most."""
    config = replace(config, "sample", solver="unipc")
    return Sampler(config, load_dit(config), load_vae(config), load_umt5(config), load_encoder(encoder))


def write_encoder(path, memory, seed=0, **extra):
    arrays = random_arrays(abstract(lambda: MemoryEncoder(memory, rngs=nnx.Rngs(0)))[1], seed)
    save_encoder(path, arrays, memory, extra)


def test_denoise_takes_every_step_and_tells():
    told = []
    out = denoise(
        lambda carry, row: Carry(10 * carry.latents + row[0]),
        Carry(jnp.zeros((1, 1, 1, 1, 1))),
        np.float32([[1], [2], [3]]),
        lambda: told.append(1),
    )
    assert out.latents.item() == 123
    assert len(told) == 3


@pytest.mark.slow
def test_a_schedule_of_two_experts_by_hand(config):
    two = dataclasses.replace(config, experts=ExpertsConfig(0.75))
    two = replace(two, "sample", steps=4, shift=1.0, guidance=2.0, guidance_high=4.0)
    (high, scale_high), (low, scale) = schedule(two)
    np.testing.assert_array_equal(high, [[1, -0.25], [0.75, -0.25]])
    np.testing.assert_array_equal(low, [[0.5, -0.25], [0.25, -0.25]])
    assert (scale_high, scale) == (4.0, 2.0)
    (high, _), (low, _) = schedule(replace(two, "sample", sigmas=(1.0, 0.9, 0.8)))
    assert (len(high), len(low)) == (3, 0)


def echo(latents, time, conditioning, memory):
    """A stand-in for the transformer that shows what it is given."""
    rows = jnp.zeros(len(latents)) if memory is None else jnp.exp(memory.bias).sum(1)
    return jnp.broadcast_to(
        (conditioning.text.sum((1, 2)) + 10 * rows + time).reshape(-1, 1, 1, 1, 1), latents.shape
    )


@pytest.mark.parametrize(
    ("in_negative", "scale", "expected"),
    # positive 1 + 20 + 500, negative 3 + 20 (or 0) + 500; negative + scale (positive - negative)
    [(True, 3.0, 523 + 3 * -2), (False, 3.0, 503 + 3 * 18), (False, 1.0, 521)],
)
def test_guidance_by_hand(in_negative, scale, expected):
    x = jnp.zeros((1, 1, 2, 2, 1))
    positive, negative = (Conditioning(jnp.full((1, 1, 1), x)) for x in (1.0, 3.0))
    memory = Memory(jnp.ones((1, 2, 4)), jnp.zeros((1, 2)))
    velocity = guided(echo, positive, negative, memory, scale, memory_in_negative=in_negative)
    np.testing.assert_allclose(velocity(x, jnp.float32(0.5)), np.full(x.shape, float(expected)), rtol=1e-6)


@pytest.mark.parametrize(("in_negative", "velocity"), [(True, -0.5 + 3 * -1), (False, 1.5 + 3 * -3)])
def test_a_step_gives_the_memory_to_the_branches_that_the_config_says(in_negative, velocity):
    """At sigma 0.5 the prompts 1 and 3 move by 0.5 and 1.5, a memory of 2 by -2 (see `FakeDiT`)."""
    config = replace(tiny_config("nowhere"), "sample", memory_in_negative=in_negative)
    step = make_step(config, *nnx.split(FakeDiT())[:1], scale=3.0)
    positive, negative = (Conditioning(jnp.full((1, 1, 1), x)) for x in (1.0, 3.0))
    memory = Memory(jnp.full((1, 1, 1), 2.0), jnp.zeros((1, 1)))
    start, row = Carry(jnp.zeros((1, 1, 2, 2, 1))), jnp.float32([0.5, -0.1])
    moved = step(nnx.split(FakeDiT())[1], start, row, positive, negative, memory).latents
    np.testing.assert_allclose(moved, np.full(moved.shape, -0.1 * velocity), rtol=1e-5)


@pytest.mark.parametrize(
    ("sigma", "read"), [(0.8, False), (0.75, True), (0.5, True), (0.25, True), (0.2, False)]
)
def test_a_memory_is_read_in_its_range_with_both_ends(sigma, read):
    config = replace(tiny_config("nowhere"), "sample", memory_range=(0.25, 0.75))
    step = make_step(config, *nnx.split(FakeDiT())[:1], scale=1.0)
    text, memory = Conditioning(jnp.ones((1, 1, 1))), Memory(jnp.full((1, 1, 1), 2.0), jnp.zeros((1, 1)))
    start, row = Carry(jnp.zeros((1, 1, 2, 2, 1))), jnp.float32([sigma, -1.0])
    moved = step(nnx.split(FakeDiT())[1], start, row, text, text, memory).latents
    np.testing.assert_allclose(moved, np.full(moved.shape, (2 if read else 0) - sigma), rtol=1e-5)


def test_each_transformer_has_its_levels_and_its_guidance():
    config = replace(tiny_config("nowhere"), "sample", steps=4, shift=1.0, guidance=2.0)
    ((coefficients, scale),) = schedule(config)
    assert (coefficients[:, 0].tolist(), scale) == ([1, 0.75, 0.5, 0.25], 2)
    config = dataclasses.replace(config, experts=ExpertsConfig(0.6))
    for guidance_high, expected in ((None, 2.0), (4.0, 4.0)):
        parts = schedule(replace(config, "sample", guidance_high=guidance_high))
        assert [(rows[:, 0].tolist(), scale) for rows, scale in parts] == [
            ([1, 0.75], expected),
            ([0.5, 0.25], 2),
        ]


def test_strength_scales_attention_weights():
    memory = Memory(jnp.ones((1, 3, 4)), jnp.array([[0.0, jnp.log(5.0), -jnp.inf]]))
    np.testing.assert_allclose(jnp.exp(with_strength(memory, 2.0).bias), [[2, 10, 0]], rtol=1e-6)
    assert np.all(np.asarray(with_strength(memory, 0.0).bias) == -np.inf)


def test_strength_0_is_no_memory(config, sampler):
    """No bit of a clip depends on what is silent. Without memory it is another program, which may round otherwise."""
    references = retrieve(config, PROMPT).latents[None]
    silent = sampler.latents([PROMPT], [0], references, strength=0.0)
    heard = sampler.latents([PROMPT], [0], references, strength=1.0)
    quiet = copy.copy(sampler)
    quiet.config = replace(sampler.config, "sample", strength=0.0)
    np.testing.assert_array_equal(quiet.latents([PROMPT], [0], -references), silent)
    np.testing.assert_allclose(sampler.latents([PROMPT], [0]), silent, atol=1e-5)
    assert np.abs(heard - silent).max() > 1e-3


def test_references_that_score_too_low_are_not_read(config, sampler):
    found = Bank.open(config.data.bank).search_records([PROMPT, PROMPT], config.data.references)
    found = dataclasses.replace(found, scores=np.array([[0.6] * 2, [0.4] * 2], np.float32))
    strict = copy.copy(sampler)
    strict.config = replace(sampler.config, "sample", min_score=0.5)
    fits, does_not = strict.latents([PROMPT, PROMPT], [0, 0], found)
    np.testing.assert_allclose(fits, sampler.latents([PROMPT], [0], found.latents[:1])[0], atol=1e-4)
    np.testing.assert_allclose(does_not, sampler.latents([PROMPT], [0])[0], atol=1e-4)
    assert np.abs(fits - does_not).max() > 1e-3


@pytest.mark.slow
def test_a_second_clip_compiles_nothing(config, encoder, compilations):
    sampler, references = Sampler.load(config, encoder), retrieve(config, PROMPT).latents[None]
    sampler.generate([PROMPT], [0], references)
    compilations.clear()
    sampler.generate(["A ball falls on planet Cyta"], [1], references)
    assert not compilations


def test_a_clip_does_not_depend_on_its_batch(sampler):
    prompts = [PROMPT, "A ball falls on planet Cyta"]
    both = sampler.latents(prompts, [5, 6])
    alone = sampler.latents(prompts[1:], [6])
    np.testing.assert_allclose(both[1:], alone, atol=1e-4)
    assert np.abs(both[0] - both[1]).max() > 0.1


@pytest.mark.slow
def test_a_step_cache_leaves_steps_out(config, encoder, sampler):
    """On a mesh, as far from all steps as it says."""
    settings = replace(sampler.config, "mesh", data=2, context=2, tensor=2)
    settings = replace(settings, "sample", steps=8, step_cache=0.5)
    prompts = [PROMPT, "A ball falls on planet Cyta"]
    cached = Sampler.load(settings, encoder, prompts=prompts)
    both = np.asarray(cached.latents(prompts, [5, 6]))
    assert (cached.computed >= 2).all() and (cached.computed < 8).all()
    every = sampler.with_sampling(steps=8)
    want = np.asarray(every.latents(prompts, [5, 6]))
    error = np.linalg.norm(both - want) / np.linalg.norm(want)
    assert 0 < error < 0.5
    np.testing.assert_allclose(cached.step_cache_error(prompts, [5, 6]), error, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(data=2, context=2, tensor=2), dict(data=1, fsdp=8)])
def test_a_mesh_makes_what_one_device_does(config, encoder, sampler, mesh):
    prompts, references = [PROMPT, "A ball falls on planet Cyta"], retrieve(config, PROMPT).latents[None]
    many = Sampler.load(replace(sampler.config, "mesh", **mesh), encoder, prompts=prompts)
    references = np.repeat(references, 2, axis=0)
    got, want = (each.latents(prompts, [5, 6], references) for each in (many, sampler))
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(UserError, match="loaded for other prompts"):
        many.latents(["another"], [5])


@pytest.mark.slow
def test_clips_and_what_is_written_beside_them(config, encoder, tmp_path, capsys):
    paths = make_clips(config, PROMPT, tmp_path / "new", encoder, seeds=[3, 4])
    for path, seed in zip(paths, (3, 4), strict=True):
        assert re.fullmatch(rf"a-ball-falls-on-planet-brux-memory-{seed}-[0-9a-f]{{8}}\.mp4", path.name)
    clips = [read_video(path) for path in paths]
    assert clips[0].frames.shape == (9, 32, 32, 3)
    assert clips[0].fps == 8
    assert (clips[0].frames != clips[1].frames).any()
    about = json.loads(paths[1].with_suffix(".json").read_text())
    assert (about["prompt"], about["seed"], about["strength"]) == (PROMPT, 4, 1.0)
    assert about["encoder"]["sha256"] == hashlib.sha256(encoder.read_bytes()).hexdigest()
    assert about["config"]["sample"]["steps"] == 3
    found = [(row["id"], row["caption"]) for row in about["memory"]]
    assert len(found) == 2
    assert all("Brux" in caption for _, caption in found)
    printed = capsys.readouterr().out
    assert all(name in printed and caption in printed for name, caption in found)
    assert "near duplicates are left out, and here nothing is" in printed  # how training finds them otherwise
    assert sorted(path.suffix for path in (tmp_path / "new").iterdir()) == [".json", ".json", ".mp4", ".mp4"]


class NoiseSampler(Sampler):
    """Clips of noise in place of those of networks; `made` are prompts and seeds, `at` what happens at a seed."""

    def __init__(self):
        self.mesh, self.made, self.at = make_mesh(MeshConfig(), jax.devices()[:1]), [], {}

    def steps(self, prompts, references=None, strength=None):
        pass

    def rows(self, references):
        return (np.zeros((*references.shape[:2], 2, 1, 1), np.float32),)

    def generate(self, prompts, seeds, references=None, strength=None):
        self.made += zip(prompts, seeds, strict=True)
        if seeds[0] in self.at:
            raise self.at[seeds[0]]
        rng = np.random.default_rng(seeds)
        return rng.integers(0, 256, (len(seeds), 9, 32, 32, 3), np.uint8)


@pytest.fixture
def noise(monkeypatch):
    sampler = NoiseSampler()
    monkeypatch.setattr(Sampler, "load", lambda *_: sampler)
    return sampler


def test_no_clip_is_lost_or_made_twice(config, encoder, noise, tmp_path, capsys):
    """Another guidance or memory is another file; what is there is left out; a call that was broken off goes on."""
    other = "A ball falls on planet Cyta"
    requests = [
        Request(PROMPT, 1),
        Request(other, 2, "none"),
        Request(other, 1, ("video2_3", "video2_4"), 0.5),
    ]
    noise.at = {2: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        make_clips(config, requests, tmp_path, encoder)
    assert "1 of 3 clips are finished; the same command makes the others" in capsys.readouterr().out
    (first,) = tmp_path.glob("*.mp4")
    before = first.stat().st_mtime_ns
    noise.made, noise.at = [], {}
    paths = make_clips(config, requests, tmp_path, encoder)
    assert noise.made == [(other, 2), (other, 1)]
    assert f"{first} is there already" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == before
    assert paths[0] == first and sorted(paths) == sorted(tmp_path.glob("*.mp4"))
    about = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    told = [(x["seed"], x["strength"], len(x["memory"])) for x in about]
    assert told == [(1, 1.0, 2), (2, None, 0), (1, 0.5, 2)]
    (guided,) = make_clips(replace(config, "sample", guidance=1.0), other, tmp_path, None, "none", [2])
    assert guided not in paths and all(path.exists() for path in paths)
    paths[1].unlink()  # what is beside a clip does not stand for it
    assert make_clips(config, requests[1:2], tmp_path, encoder) == paths[1:2] and paths[1].exists()


def test_a_clip_of_the_users_name_is_not_replaced(config, noise, tmp_path):
    out = tmp_path / "clip.mp4"
    for _ in range(2):
        assert make_clips(config, PROMPT, out, memory="none") == [out]
    assert len(noise.made) == 1
    before = out.read_bytes()
    with pytest.raises(UserError, match="exists and was made otherwise"):
        make_clips(config, PROMPT, out, memory="none", seeds=[7])
    out.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="exists and was made otherwise"):
        make_clips(config, PROMPT, out, memory="none")
    assert out.read_bytes() == before


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_no_clip(config, sampler):
    def step(carry, row):
        return Carry(carry.latents / (row[0] - 0.5))

    with pytest.raises(NotFinite, match=r"not finite from step 4 on, which is from noise level 0\.5"):
        denoise(checked(step, 2), Carry(jnp.ones((1, 1, 1, 1, 1))), np.float32([[1], [0.5]]))
    with pytest.raises(NotFinite, match="pixels"):
        sampler.pixels(jnp.full((1, *config.latent_shape), jnp.nan))


def test_a_clip_that_cannot_be_made_is_told_after_the_others(config, noise, tmp_path):
    noise.at = {0: NotFinite("not finite")}
    with pytest.raises(
        UserError, match=r"1 of 2 clips were not made, the first for 'A ball .*, seed 0: not finite"
    ):
        make_clips(config, PROMPT, tmp_path, memory="none", seeds=[0, 1])
    (made,) = tmp_path.glob("*.mp4")
    assert "-plain-1-" in made.name


@pytest.mark.parametrize(
    ("video", "warned"),
    [
        (dict(), ""),
        (dict(trained=(9, 32, 32)), ""),
        (dict(width=16, trained=(9, 16, 32)), ""),
        (dict(trained=(5, 32, 32)), "up to 5 frames of 32 x 32"),
        (dict(height=64, trained=(9, 32, 32)), "9 frames of 64 x 32"),
    ],
)
def test_clips_beyond_what_was_trained_are_warned_of(config, encoder, tmp_path, capsys, video, warned):
    config = replace(config, "video", **video)
    warn_of_size(config)
    told = capsys.readouterr().err
    assert warned in told and bool(warned) == bool(told)
    frames, height, width = config.video.trained or (9, 32, 32)
    write_encoder(tmp_path / "x", config.memory, video=dict(frames=frames, height=height, width=width))
    warn_of_size(replace(config, "video", trained=None), [tmp_path / "x", encoder])
    assert bool(warned) == ("the encoder in" in capsys.readouterr().err)


def test_a_prompt_that_nothing_resembles_is_warned_of(config, capsys):
    retrieve(config, PROMPT)
    assert not capsys.readouterr().err
    assert retrieve(config, "Zebras run over a bridge").videos == []
    assert "resembles the prompt 'Zebras" in capsys.readouterr().err
    assert (
        len(retrieve(config, "Zebras fall in front of a bridge over a river with a ball, take 0").videos) == 2
    )
    told = capsys.readouterr().err
    assert "resembles the prompt 'Zebras" in told and "no memory" not in told
    strict = replace(config, "sample", min_score=0.5)
    assert len(retrieve(strict, PROMPT).videos) == 2
    assert retrieve(strict, "Zebras run over a bridge").videos == []
    assert "it gets no memory" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_by_id_and_no_memory(config, encoder, tmp_path):
    (named,) = make_clips(config, PROMPT, tmp_path / "named.mp4", encoder, ["video2_3"])
    assert [row["id"] for row in json.loads(named.with_suffix(".json").read_text())["memory"]] == ["video2_3"]
    (plain,) = make_clips(config, PROMPT, tmp_path / "plain.mp4", memory="none")
    about = json.loads(plain.with_suffix(".json").read_text())
    assert about["memory"] == []
    assert about["encoder"] is None


@pytest.fixture(scope="module")
def two(config, tmp_path_factory):
    """A config of two experts, and files of an encoder for each."""
    folder = tmp_path_factory.mktemp("two")
    config = replace(with_experts(config, folder / "weights"), "sample", guidance=2.0, guidance_high=4.0)
    files = {kind: folder / f"{kind}.safetensors" for kind in ("high", "low")}
    for seed, (kind, path) in enumerate(files.items()):
        write_encoder(path, config.memory, seed=seed, expert=kind)
    return config, files


@pytest.mark.slow
def test_each_expert_makes_its_steps_with_its_memory_and_guidance(two):
    """And what the solver remembers passes from one to the other."""
    config, files = two
    config = replace(config, "sample", solver="unipc")
    references = retrieve(config, PROMPT).latents[None]
    got = Sampler.load(config, [files["low"], files["high"]]).latents([PROMPT], [0], references)

    single = dataclasses.replace(config, experts=ExpertsConfig())
    text = load_umt5(config)

    def velocity(expert, scale):
        dit, encoder = load_dit(config, experts=expert), load_encoder(files[expert])
        part = Sampler(single, dit, load_vae(config), text, encoder)
        positive, negative = map(Conditioning, (part._embed([PROMPT]), part._negative))
        memory = encoder(jnp.asarray(references), training=False)
        return guided(dit, positive, negative, memory, scale)

    solver, high, low = SOLVERS["unipc"], velocity("high", 4.0), velocity("low", 2.0)
    noise = jax.random.normal(jax.random.key(0), got.shape[1:])[None]
    carry = solver.init(noise)
    rows = solver.coefficients(flow.shifted_sigmas(3, 5.0))  # levels 1, 0.909 and 0.714: two for high noise
    for network, row in zip((high, high, low), rows, strict=True):
        carry = solver.step(network, carry, row)
    np.testing.assert_allclose(got, carry.latents, atol=1e-4)


@pytest.mark.slow
def test_clips_in_batches_from_two_experts_with_one_memory(two, encoder, tmp_path):
    """Three clips on devices that take two at once: the third is alone; each as where they take one at once."""
    config, _ = two

    def clips(name, **mesh):
        config_on = replace(config, "mesh", context=2, **mesh)
        return make_clips(config_on, PROMPT, tmp_path / name, encoder, seeds=[0, 1, 2])

    paths, one = clips("two", data=2, tensor=2), clips("one", data=1, tensor=4)
    for path, other in zip(paths, one, strict=True):
        got, want = (read_video(each).frames.astype(int) for each in (path, other))
        assert np.abs(got - want).mean() < 0.3  # of 255: what the codec makes of rounding
    assert len({path.read_bytes() for path in paths}) == 3


def test_rows_are_those_of_the_encoders(sampler, config):
    rows = sampler.rows(retrieve(config, PROMPT).latents[None])
    bare = Sampler(config, load_dit(config), load_vae(config), load_umt5(config))
    for each, given in ((sampler, rows * 2), (bare, rows)):
        with pytest.raises(UserError, match="the rows do not fit the sampler"):
            each.latents([PROMPT], [0], given)


def test_what_a_bank_finds_is_read_as_references(sampler, config):
    prompts = [PROMPT, "A ball falls on planet Cyta"]
    found = Bank.open(config.data.bank).search(prompts, config.data.references)
    expected = [retrieve(config, prompt).latents for prompt in prompts]
    np.testing.assert_array_equal(found.latents, expected)
    for got, want in zip(sampler.rows(found), sampler.rows(np.stack(expected)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_seeds_and_references_are_one_a_prompt(sampler, config):
    references = retrieve(config, PROMPT).latents[None]
    for what, given in (("seeds", ([0, 1], None)), ("references", ([0], np.repeat(references, 2, axis=0)))):
        with pytest.raises(UserError, match=f"the {what} do not fit the prompts"):
            sampler.latents([PROMPT], *given)


@pytest.mark.slow
def test_an_expert_without_a_step_is_not_compiled(two):
    config, files = two
    single = Sampler.load(replace(config, "sample", steps=1), [files["high"], files["low"]])
    assert len(single.steps([PROMPT])) == 1


def test_encoders_that_do_not_serve_every_noise_level_once(config, encoder, two):
    experts, files = two
    for settings, given in (
        (experts, [files["high"]]),
        (experts, [files["low"], files["low"]]),
        (experts, [encoder, files["low"]]),
        (config, [files["high"], files["low"]]),
        (config, files["low"]),
    ):
        with pytest.raises(UserError, match="do not serve every noise level once"):
            Sampler.load(settings, given)


def test_bad_input_is_named_and_nothing_is_written(config, encoder, tmp_path):
    wide, short = tmp_path / "wide.safetensors", tmp_path / "short.safetensors"
    write_encoder(wide, dataclasses.replace(config.memory, dim=64))
    short.write_bytes(encoder.read_bytes()[:-100])
    many = replace(config, "data", references=13)
    cases = [
        (dict(prompts="  "), "the prompt is missing or empty"),
        (dict(encoder=None), "no encoder is named"),
        (dict(encoder=tmp_path / "absent.safetensors"), "no encoder at"),
        (dict(encoder=wide), "width 64"),
        (dict(encoder=short), "cannot read"),
        (dict(config=many), "cannot give 13 videos"),
        (dict(memory=["video2_33"]), "video2_3"),
        (dict(config=replace(config, "data", bank=str(tmp_path / "nowhere"))), "no bank at"),
        (dict(out=tmp_path / "one.mp4", seeds=[0, 1]), "2 clips do not fit"),
        (dict(out=encoder), "is a file"),
        (
            dict(config=replace(config, "weights", path=str(tmp_path / "nowhere"))),
            "no weights in",
        ),
    ]
    good = dict(config=config, prompts=PROMPT, out=tmp_path / "out", encoder=encoder)
    for bad, message in cases:
        with pytest.raises(UserError, match=message):
            make_clips(**good | bad)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "one.mp4").exists()


# --- given frames -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_moves_a_given_frame(solver):
    """Nor does it change the others."""
    config = replace(tiny_config("nowhere"), "sample", solver=solver, steps=4)
    graph, weights = nnx.split(FakeDiT())
    rng = np.random.default_rng(0)
    noise, clean = (jnp.asarray(rng.standard_normal((2, 3, 2, 2, 1)), jnp.float32) for _ in range(2))
    given = jnp.array([[True, False, False], [True, True, False]])
    text = Conditioning(jnp.ones((2, 1, 1)))
    held = text._replace(clean=clean, given=given)

    def run(conditioning):
        program = make_step(config, graph, 3.0)
        carry, seen = SOLVERS[solver].init(noise), []
        for row in schedule(config)[0][0]:
            carry = program(weights, carry, jnp.asarray(row), conditioning, conditioning, None)
            seen.append(carry.latents)
        return seen

    for got, free in zip(run(held), run(text), strict=True):
        np.testing.assert_array_equal(got, jnp.where(given[:, :, None, None, None], clean, free))


def frames_of(*counts, size=32):
    return [
        GivenFrames(np.random.default_rng(n).integers(0, 256, (n, size, size, 3), np.uint8)) for n in counts
    ]


@pytest.mark.slow
def test_given_frames_are_at_timestep_0_and_put_back_after_each_step(sampler, config):
    """As Wan's own program does for TI2V-5B, with a memory and a solver that remembers."""
    references = retrieve(config, PROMPT).latents[None]
    frames = frames_of(5)
    got = sampler.latents([PROMPT], [3], references, frames=frames)

    told = sampler.given(frames)
    first = vae_encode(sampler.vae, jnp.asarray(to_unit(frames[0].first[None])))
    np.testing.assert_allclose(told["clean"][:, :2], first, atol=1e-5)
    mask = (np.arange(3) < 2).reshape(1, 3, 1, 1, 1)
    dit, encoder, run = load_dit(config), sampler._encoders[0], nnx.jit(DiT.__call__)
    memory = encoder(jnp.asarray(references), training=False)
    texts = Conditioning(sampler._embed([PROMPT])), Conditioning(sampler._negative)

    def velocity(x, sigma):
        times = jnp.asarray(1000 * sigma * ~mask[:, :, 0, 0, 0], jnp.float32)
        positive, negative = (run(dit, x, times, text, memory) for text in texts)
        return negative + config.sample.guidance * (positive - negative)

    solver = SOLVERS["unipc"]
    carry = solver.init(jnp.where(mask, told["clean"], sampler.noise([3])))
    for row in solver.coefficients(flow.shifted_sigmas(3, 5.0)):
        carry = solver.step(velocity, carry, row)
        carry = carry._replace(latents=jnp.where(mask, told["clean"], carry.latents))
    np.testing.assert_allclose(got, carry.latents, atol=1e-4)
    np.testing.assert_array_equal(got[:, :2], told["clean"][:, :2])


def test_each_clip_of_a_batch_has_its_own_frames(sampler):
    prompts = [PROMPT, "A ball falls on planet Cyta"]
    both = sampler.latents(prompts, [5, 6], frames=frames_of(1, 5))
    alone = sampler.latents(prompts[1:], [6], frames=sampler.given(frames_of(5)))
    np.testing.assert_allclose(both[1:], alone, atol=1e-4)
    with pytest.raises(UserError, match="the given frames do not fit the prompts"):
        sampler.latents(prompts, [5, 6], frames=frames_of(1))


@pytest.mark.slow
def test_a_clip_with_a_first_frame_as_a_file(config, tmp_path):
    """It follows the picture's shape, 32 x 32 pixels at most; the file beside it tells of the picture."""
    picture = np.random.default_rng(0).integers(0, 256, (60, 150, 3), np.uint8)
    frames = GivenFrames(picture[None], origin={"first_frame": {"file": "a.png"}})
    (path,) = make_clips(config, PROMPT, tmp_path / "a.mp4", memory="none", frames=frames)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["frames"] == frames.origin
    assert (about["config"]["video"]["height"], about["config"]["video"]["width"]) == (16, 48)
    clip = read_video(path).frames
    assert clip.shape == (9, 16, 48, 3)
    other = GivenFrames(255 - picture[None], origin=frames.origin)
    with pytest.raises(UserError, match="was made otherwise"):
        make_clips(config, PROMPT, path, memory="none", frames=other)
