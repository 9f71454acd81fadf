"""The seam for evaluators: what a run measures of its encoder while it trains, and what it is measured on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from jax.sharding import Mesh

from ditmem_jax.config import Config
from ditmem_jax.data.record import Entry
from ditmem_jax.data.records import RecordReader
from ditmem_jax.models.ditmem import Networks
from ditmem_jax.models.state import Arrays
from ditmem_jax.types import Batch


class HeldOut(NamedTuple):
    """One batch of held-out samples, on the devices of the mesh.

    `other` is `right` with another's references (see `evaluate.others`) in place of a sample's own, none for a sample
    that has no other. `entries` are the records of all samples of the batch, in every process.
    """

    right: Batch
    other: Batch
    entries: Sequence[Entry]


@dataclasses.dataclass(frozen=True)
class Subject:
    """The networks and held-out records that an evaluator is made from.

    Attributes:
        backbone: arrays of the frozen transformer.
        encoder: layouts (shapes and shardings) of what the encoder trains, and of the rest of it.
        records: that `held_out` is read from.
    """

    config: Config
    mesh: Mesh
    networks: Networks
    backbone: Arrays
    encoder: tuple[Arrays, Arrays]
    held_out: Sequence[HeldOut]
    records: RecordReader


@runtime_checkable
class Evaluator(Protocol):
    """A measure of an encoder; made once for a run, and compiled then, under `jax.set_mesh`.

    Its numbers have names that begin with its own in `EVALUATORS`. What the frozen transformer does without a memory
    never changes: it is worth keeping.

    Attributes:
        about: one line that says what its numbers are.
        scores: names of those that `run.best` may name; of two encoders the one with the larger is the better.
    Raises:
        UserError: for held-out records or a configuration that it cannot measure on.
    """

    about: ClassVar[str]
    scores: ClassVar[tuple[str, ...]]

    def __init__(self, subject: Subject): ...

    def __call__(self, params: Arrays, rest: Arrays) -> dict[str, float]:
        """Return numbers by name, without those that nothing could be measured for.

        Args:
            params, rest: arrays of the encoder, as `Subject.encoder` lays them out.
        """
        ...

    def summary(self, numbers: Mapping[str, float]) -> str:
        """Return what is printed of the numbers that a call returned."""
        ...
