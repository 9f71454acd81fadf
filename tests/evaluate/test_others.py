"""Another to a held-out sample is of the same kind, unrelated, and the same in every process."""

import dataclasses

import numpy as np
import pytest

from ditmem_jax.data.record import Entry
from ditmem_jax.errors import UserError
from ditmem_jax.evaluate.others import others


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
