"""The kinds of evaluators by name, and those of a run."""

from ditmem_jax.config import RunConfig
from ditmem_jax.errors import UserError, nearest
from ditmem_jax.evaluate.evaluator import Evaluator, Subject
from ditmem_jax.evaluate.gain import Gain
from ditmem_jax.evaluate.laws import LawError

EVALUATORS: dict[str, type[Evaluator]] = {
    "gain": Gain,
    "law": LawError,
}


def check_evaluators(run: RunConfig) -> None:
    """Raise a UserError unless `run.evaluators` are kinds of evaluators and `run.best` is a score of one of them."""
    for name in run.evaluators:
        if name not in EVALUATORS:
            raise UserError(
                "run.evaluators has an unknown value",
                expected=f"one of: {nearest(name, EVALUATORS)}",
                found=repr(name),
            )
    scores = [score for name in run.evaluators for score in EVALUATORS[name].scores]
    if run.best not in scores:
        raise UserError(
            "no evaluator of the run gives the number run.best that decides which encoder is the best",
            expected=f"one of: {nearest(run.best, scores)}" if scores else "an evaluator that has one",
            found=repr(run.best),
            fix="another run.best, or its evaluator in run.evaluators",
        )


def make_evaluators(subject: Subject) -> list[Evaluator]:
    """The evaluators of `run.evaluators`, compiled; under `jax.set_mesh`. Errors as theirs and `check_evaluators`."""
    check_evaluators(subject.config.run)
    return [EVALUATORS[name](subject) for name in subject.config.run.evaluators]
