"""Every kind of evaluator: its numbers, their names, and the same each time; and which a run may name."""

import math

import jax
import pytest

from ditmem_jax.config import RunConfig
from ditmem_jax.errors import UserError
from ditmem_jax.evaluate.evaluator import Evaluator
from ditmem_jax.evaluate.kinds import EVALUATORS, check_evaluators, make_evaluators
from tests.evaluate.subjects import entry, held_out, subject


@pytest.mark.parametrize("kind", EVALUATORS)
def test_every_kind_measures_an_encoder(sampler, kind):
    """Under its own names, and the same again."""
    score = EVALUATORS[kind].scores[0]
    given = subject(
        [held_out([[4.0]], [[2.0]], [entry("a")], [3])], run={"evaluators": (kind,), "best": score}
    )
    with jax.set_mesh(given.mesh):
        (evaluator,) = make_evaluators(given)
        numbers = evaluator(*given.encoder)
        assert numbers == evaluator(*given.encoder)
    assert isinstance(evaluator, EVALUATORS[kind]) and isinstance(evaluator, Evaluator)
    assert set(evaluator.scores) <= numbers.keys()
    assert all(name.startswith(kind) and math.isfinite(value) for name, value in numbers.items())
    for text in (evaluator.summary(numbers), evaluator.about):
        assert kind in text and "\n" not in text


def test_evaluators_of_a_run_are_checked_by_name():
    check_evaluators(RunConfig(evaluators=("law", "gain"), best="law_gain"))
    for values, message in (
        ({"evaluators": ("gian",)}, r"one of: gain(.|\n)*'gian'"),
        ({"best": "law_gain"}, r"one of: gain\b(.|\n)*'law_gain'"),
        ({"evaluators": ("gain", "law"), "best": "law_error"}, r"one of: law_gain(.|\n)*'law_error'"),
    ):
        with pytest.raises(UserError, match=message):
            check_evaluators(RunConfig(**values))
