"""Validation against hand-computed gains: their sign, another's memory, noise and levels, and who is another."""

import dataclasses

import jax
import numpy as np
import pytest

from ditmem_jax.config import ExpertsConfig, MeshConfig
from ditmem_jax.data.records import Entry
from ditmem_jax.errors import UserError
from ditmem_jax.models.backbone import Experts
from ditmem_jax.parallel.mesh import make_mesh
from ditmem_jax.train.validation import Validator, others
from tests.fakes import FakeDiT, NoiseBlind, batch, networks

ONE = ExpertsConfig()


def validator(dit, batches, sigmas, experts=ONE, seed=0):
    """The validator, and the gains of the untrained encoder."""
    structures, backbone, encoder = networks(dit)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    arrays = {"factor": encoder["factor"]}, {"calls": encoder["calls"]}
    made = Validator(structures, backbone, arrays, batches, sigmas, experts, seed, mesh)
    return made, made(*arrays)


def pair(numbers, videos, of_others):
    right, wrong = batch(numbers, videos), batch(numbers, of_others)
    return right, right._replace(references=wrong.references, present=wrong.present)


def test_gains_by_hand():
    """Errors at sigma 0.5 of samples 2 and 4 in two batches: 1 and 4 without, 0 and 1 with; at 1.0: 4 and 16, 1 and 9."""
    none = np.nan
    batches = [pair([2], [[1.0, none]], [[-1.0, none]]), pair([4], [[none, 1.0]], [[none, none]])]
    _, gains = validator(FakeDiT(), batches, (0.5, 1.0))
    expected = {"gain": (0.8 + 0.5) / 2, "gain_0.5": 1 - 1 / 5, "gain_1": 1 - 10 / 20}
    expected["gain_wrong"] = ((1 - 4 / 1) + (1 - 9 / 4)) / 2  # of sample 2 alone: the other has no other
    assert gains == pytest.approx(expected, rel=1e-5)


def test_no_gain_from_another_where_nobody_has_another():
    _, gains = validator(FakeDiT(), [pair([2], [[1.0]], [[np.nan]])], (0.5,))
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
        _, gains = validator(dit, batches, (0.5, 0.9), ExpertsConfig(0.9, trains))
        assert gains.pop("gain_wrong") < gains["gain"] or trains == "both"
        assert gains == pytest.approx(expected, rel=1e-5)


def test_noise_is_fixed_and_of_each_batch_level_and_sample():
    batches = [pair([0, 0], [[1.0], [1.0]], [[1.0], [1.0]])] * 2
    first, gains = validator(NoiseBlind(), batches, (0.5, 1.0))
    errors = first._errors_without
    assert errors.shape == (2, 4) and len(np.unique(errors)) == 8
    assert gains["gain"] == gains["gain_wrong"] == 0  # with memory: the same noise
    again, other = (validator(NoiseBlind(), batches, (0.5, 1.0), seed=seed)[0] for seed in (0, 1))
    np.testing.assert_array_equal(again._errors_without, errors)
    assert not np.isin(other._errors_without, errors).any()


# --- who is another ---------------------------------------------------------------------------------------------


def named(*captions, sources=None):
    sources = sources or [f"{number}.mp4" for number in range(len(captions))]
    return [
        Entry(str(i), text, source) for i, (text, source) in enumerate(zip(captions, sources, strict=True))
    ]


FALL, SWING = "a ball falls on {}", "a rod swings on {}"
KINDS = [FALL.format("brux"), SWING.format("brux"), FALL.format("cyta"), SWING.format("cyta")]


def test_another_is_of_the_same_kind_and_shares_no_reference():
    relatives = np.array([[5, 0], [6, 1], [7, 2], [8, 3]])
    np.testing.assert_array_equal(others(named(*KINDS), relatives, range(4), 0), [2, 3, 0, 1])
    relatives[2, 0] = 5  # the falls share a reference, so that another kind is all that is left
    assert others(named(*KINDS), relatives, [0], 0) in (1, 3)
    relatives[2, 0] = 0  # or one is the other's
    assert others(named(*KINDS), relatives, [0, 2], 0)[0] != 2
    one = named(*KINDS, sources=["film"] * 4)
    np.testing.assert_array_equal(others(one, np.arange(4)[:, None], range(4), 0), [-1] * 4)
    unknown = named(*KINDS, sources=[""] * 4)
    assert others(unknown, np.arange(4)[:, None], [1], 0) == 3


def test_another_depends_on_the_record_and_the_seed_alone():
    """Not on which records are asked for together: each process asks for its own."""
    entries, relatives = named(*["a ball falls"] * 40), np.arange(40)[:, None]
    found = others(entries, relatives, range(40), 3)
    for number in (7, 30):
        assert others(entries, relatives, [number], 3) == found[number]
    assert (found != np.arange(40)).all() and len(set(found)) > 10
    assert (others(entries, relatives, range(40), 4) != found).any()


def test_columns_say_what_a_kind_is_and_what_another():
    extra = [("fall", "brux"), ("fall", "brux"), ("swing", "cyta"), ("fall", "dorn")]
    entries = [
        dataclasses.replace(entry, extra={"phenomenon": kind, "world": world})
        for entry, (kind, world) in zip(named(*KINDS), extra, strict=True)
    ]
    relatives = np.arange(4)[:, None]
    found = others(entries, relatives, range(4), 0, "phenomenon", "world")
    assert found.tolist() in ([3, 3, -1, 0], [3, 3, -1, 1])
    with pytest.raises(UserError, match=r"no column 'word'(.|\n)*world"):
        others(entries, relatives, [0], 0, group="word")
