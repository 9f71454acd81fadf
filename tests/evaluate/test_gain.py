"""The gain against gains computed by hand: its sign, another's memory, noise and levels, and what is told of it."""

import numpy as np
import pytest

from ditmem_jax.config import ExpertsConfig
from ditmem_jax.evaluate.gain import Gain
from ditmem_jax.models.backbone import Experts
from tests.evaluate.subjects import held_out, subject
from tests.fakes import FakeDiT, NoiseBlind

ONE = ExpertsConfig()


def evaluate(dit, batches, sigmas, experts=ONE, seed=0):
    """The evaluator, and the gains of the untrained encoder."""
    given = subject(batches, dit, {"validation_sigmas": sigmas, "seed": seed}, experts=experts)
    made = Gain(given)
    return made, made(*given.encoder)


def pair(numbers, videos, of_others):
    return held_out(videos, of_others, [], numbers)


def test_gains_by_hand():
    """Errors at sigma 0.5 of samples 2 and 4 in two batches: 1 and 4 without, 0 and 1 with; at 1.0: 4 and 16, 1 and 9."""
    none = np.nan
    batches = [pair([2], [[1.0, none]], [[-1.0, none]]), pair([4], [[none, 1.0]], [[none, none]])]
    _, gains = evaluate(FakeDiT(), batches, (0.5, 1.0))
    expected = {"gain": (0.8 + 0.5) / 2, "gain_0.5": 1 - 1 / 5, "gain_1": 1 - 10 / 20}
    expected["gain_wrong"] = ((1 - 4 / 1) + (1 - 9 / 4)) / 2  # of sample 2 alone: the other has no other
    assert gains == pytest.approx(expected, rel=1e-5)


def test_no_gain_from_another_where_nobody_has_another():
    _, gains = evaluate(FakeDiT(), [pair([2], [[1.0]], [[np.nan]])], (0.5,))
    assert gains == pytest.approx({"gain": 1.0, "gain_0.5": 1.0}, abs=1e-5)


def test_every_level_is_computed_by_its_expert_and_only_levels_that_train_count():
    batches = [pair([0, 0], [[3.0], [3.0]], [[1.0], [1.0]])]
    experts = Experts(FakeDiT(offset=4.0), FakeDiT(offset=-1.0))  # for high noise and for low
    high, low = 1 - 1 / 16, 1 - 16 / 1
    for trains, expected in (
        ("both", {"gain_0.5": low, "gain_0.9": high, "gain": (high + low) / 2}),
        ("high", {"gain_0.9": high, "gain": high}),
    ):
        dit = experts if trains == "both" else experts.high
        _, gains = evaluate(dit, batches, (0.5, 0.9), ExpertsConfig(0.9, trains))
        assert gains.pop("gain_wrong") < gains["gain"] or trains == "both"
        assert gains == pytest.approx(expected, rel=1e-5)


def test_noise_is_fixed_and_of_each_batch_level_and_sample():
    batches = [pair([0, 0], [[1.0], [1.0]], [[1.0], [1.0]])] * 2
    first, gains = evaluate(NoiseBlind(), batches, (0.5, 1.0))
    errors = first._errors_without
    assert errors.shape == (2, 4) and len(np.unique(errors)) == 8
    assert gains["gain"] == gains["gain_wrong"] == 0  # with memory: the same noise
    again, other = (evaluate(NoiseBlind(), batches, (0.5, 1.0), seed=seed)[0] for seed in (0, 1))
    np.testing.assert_array_equal(again._errors_without, errors)
    assert not np.isin(other._errors_without, errors).any()


def test_the_worst_level_is_told():
    made = Gain.__new__(Gain)
    made.sigmas = (0.2, 0.8)
    gains = {"gain": 0.1, "gain_wrong": -0.2, "gain_0.2": -0.031, "gain_0.8": 0.23}
    worst = "gain +10.00%, worst level 0.2: -3.10%"
    assert made.summary(gains) == f"{worst}, with another's memory -20.00%"
    del gains["gain_wrong"]
    assert made.summary(gains) == worst
