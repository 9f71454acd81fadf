"""Law errors: of clips that follow their law, of clips that show none, and of a guess."""

import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.config import ExpertsConfig, FreeTokensConfig
from ditmem_jax.errors import UserError
from ditmem_jax.evaluate import laws
from ditmem_jax.evaluate.laws import LawError, guess, law_error, told
from ditmem_jax.models.wan.vae import VAE
from ditmem_jax.worlds.laws import PHENOMENA
from ditmem_jax.worlds.simulate import sample_clip
from tests.evaluate.subjects import WORLD, entry, held_out, subject
from tests.fakes import FakeEncoder


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_a_clip_tells_the_constants_of_its_world_and_of_no_other(phenomenon):
    clip = sample_clip(np.random.default_rng(0), WORLD, phenomenon)
    found = told(clip.video, phenomenon)
    assert found.keys() == set(PHENOMENA[phenomenon])
    for constant, value in found.items():
        true = getattr(WORLD, constant)
        assert law_error(value, true) < 0.05 < law_error(value, 2 * true)


def test_a_clip_without_a_body_tells_nothing():
    assert told(np.full((25, 32, 32, 3), 128, np.uint8), "fall") == {}


def test_errors_are_relative_and_alike_in_both_directions():
    errors = law_error(np.array([2.0, 0.5, 1.0, np.nan]), np.ones(4))
    np.testing.assert_allclose(errors, [np.log(2), np.log(2), 0, np.nan])


def test_a_guess_is_the_middle_of_what_worlds_are_drawn_from():
    assert guess("gravity") == pytest.approx(np.sqrt(2.0 * 12.0))  # drawn in the logarithm
    assert guess("bounciness") == pytest.approx((0.3 + 0.95) / 2)


# --- while a run trains -----------------------------------------------------------------------------------------


def test_law_errors_of_a_run_by_hand(sampler):
    """Of four clips at gravity 4, the right memory shows 4, 2, 8 and nothing, none always 8; another's 2 and 4."""
    none = np.nan
    entries = [entry(id) for id in "abcd"]
    batches = [
        held_out([[4.0], [2.0]], [[2.0], [none]], entries[:2]),
        held_out([[8.0], [0.0]], [[none], [4.0]], entries[2:]),
    ]
    given = subject(batches)
    evaluator = LawError(given)
    numbers = evaluator(*given.encoder)
    one = np.log(2)
    expected = {
        "law_told": 3 / 4,
        "law_error": one * 2 / 3,
        "law_gain": 1 - 2 / 3,
        "law_gain_wrong": 1 - 1 / 2,
    }
    expected["law_guess"] = np.log(guess("gravity") / 4)
    assert numbers == pytest.approx(expected, abs=0.02)
    assert evaluator.summary(numbers).startswith("law error 0.4")
    assert "75% of the constants told" in evaluator.summary(numbers)
    assert sampler.encoders == [1.0]
    captions = [x.caption for x in entries]
    asked = [(captions[:2], [7, 8], None), (captions[2:], [9, 10], None)]
    assert sorted(sampler.asked) == sorted(3 * asked)  # the same noise always
    evaluator(*given.encoder)
    assert len(sampler.asked) == 10  # without memory nothing changes


def test_what_no_clip_tells_is_left_out(sampler):
    given = subject([held_out([[0.0]], [[np.nan]], [entry("a")])])
    evaluator = LawError(given)
    numbers = evaluator(*given.encoder)
    assert numbers == {"law_told": 0.0}
    assert evaluator.summary(numbers) == "law error 0% of the constants told"


def test_free_tokens_are_asked_for_by_their_source(sampler):
    memory = FreeTokensConfig(dim=48, tokens=2, sources=("x", "y"))
    batch = held_out([[1.0]] * 2, [[1.0]] * 2, [entry("a"), entry("b")])
    batch = batch._replace(right=batch.right._replace(source=jnp.int32([1, 0])))
    evaluator = LawError(subject([batch], memory=memory))
    assert evaluator._reads(batch.right) == {"sources": ["y", "x"]} and evaluator._reads(None) == {}


def test_records_that_tell_no_law_and_half_a_transformer_are_refused(sampler):
    for extra, named in (
        ({"gravity": "much"}, "much"),
        ({"phenomenon": "war"}, "war"),
        ({"phenomenon": ""}, ""),
    ):
        with pytest.raises(UserError, match=rf"record 'b' tells no law(.|\n)*{named}"):
            LawError(subject([held_out([[1.0]] * 2, [[1.0]] * 2, [entry("a"), entry("b", **extra)])]))
    with pytest.raises(UserError, match="only one of two experts"):
        LawError(subject([], experts=ExpertsConfig(0.9, "high")))


def test_clips_are_of_the_captions_and_the_networks_of_the_run(monkeypatch):
    """The fake transformer errs by the number in the text, so that its clips tell which text they are of."""
    given = subject([held_out([[1.0]] * 2, [[1.0]] * 2, [entry("a"), entry("b")])])
    given.records.__dict__["prompts"] = {"": np.full((1, 1), 5, np.float32)}
    monkeypatch.setattr(laws, "load_vae", lambda *_: VAE.__new__(VAE))
    made = laws.make_sampler(given)
    first, second = (made._embed([x.caption])[0] for x in given.held_out[0].entries)
    assert (float(first[0, 0]), float(second[0, 0])) == (0, 1)
    assert made._negative.shape == (1, 1, 1) and float(made._negative.sum()) == 5
    captions = [x.caption for x in given.held_out[0].entries]
    clips = made.latents(captions, [3, 3])
    assert jnp.isfinite(clips).all() and (clips[0] != clips[1]).any()
    encoder = FakeEncoder()
    other = made.with_encoder(encoder)
    assert other._stages is made._stages and (made._encoders, other._encoders) == ((None,), (encoder,))
