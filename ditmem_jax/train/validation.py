"""Validation: the gain at fixed noise levels, under fixed noise, from the right memory and from another's."""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from ditmem_jax.bank.lexical import words
from ditmem_jax.config import ExpertsConfig
from ditmem_jax.data.records import Entry, RecordReader
from ditmem_jax.data.references import References
from ditmem_jax.diffusion import objective
from ditmem_jax.errors import UserError, nearest
from ditmem_jax.models.backbone import with_expert
from ditmem_jax.models.ditmem import Networks, encode, per_sample_mse
from ditmem_jax.models.state import Arrays
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.parallel import compilation
from ditmem_jax.parallel.mesh import replicated
from ditmem_jax.types import Batch, Memory


class Validator:
    """Measures `objective.gain` from memory on fixed batches: 1 - mean error with memory / mean error without it, at
    each noise level over all samples, and the mean over the levels.

    Each sample is also given another's memory (see `others`), which should not help. Without memory nothing ever
    changes, so those errors are computed once.

    Args:
        encoder: layouts of what the encoder trains and of the rest of it.
        batches: on the devices of `mesh`, each with its references and once more with another's references in their
            place, none for a sample that has no other.
        sigmas: noise levels; those of an expert that does not train are left out.
    """

    def __init__(
        self,
        networks: Networks,
        backbone: Arrays,
        encoder: tuple[Arrays, Arrays],
        batches: list[tuple[Batch, Batch]],
        sigmas: tuple[float, ...],
        experts: ExpertsConfig,
        seed: int,
        mesh: Mesh,
    ):
        self.sigmas, self.backbone = tuple(filter(experts.trained_at, sigmas)), backbone
        self.batches = list(zip(batches, jax.random.split(jax.random.key(seed), len(batches)), strict=True))
        levels = jnp.asarray(self.sigmas, jnp.float32)
        high = jnp.asarray([experts.is_high(sigma) for sigma in self.sigmas])

        def over_levels(backbone: Arrays, batch: Batch, key: jax.Array, memory: Memory | None) -> jax.Array:
            dit, size = networks.dit.merge(backbone), len(batch.latents)

            def at_level(level):
                sigma, high, key = level
                noise = jax.random.normal(key, batch.latents.shape)
                sigma = jnp.full((size,), sigma)

                def use(dit: DiT) -> jax.Array:
                    return per_sample_mse(dit, memory, batch, sigma, noise)

                return with_expert(dit, high, use)

            return jax.lax.map(at_level, (levels, high, jax.random.split(key, len(levels))))

        def with_memory(
            params: Arrays, rest: Arrays, backbone: Arrays, pair: tuple[Batch, Batch], key: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            encoder = networks.encoder.merge(params | rest)
            right, wrong = (over_levels(backbone, pair[0], key, encode(encoder, batch)) for batch in pair)
            return right, wrong, pair[1].present.any(axis=1)[None]

        pair, key = self.batches[0]
        with_memory = jax.jit(with_memory, out_shardings=replicated(mesh))
        self._with_memory = compilation.compile_for(with_memory, *encoder, backbone, pair, key)
        without = jax.jit(functools.partial(over_levels, memory=None), out_shardings=replicated(mesh))
        self._without = compilation.compile_for(without, backbone, pair[0], key)

    @functools.cached_property
    def _errors_without(self) -> np.ndarray:
        return _gather(self._without(self.backbone, pair[0], key) for pair, key in self.batches)

    def __call__(self, params: Arrays, rest: Arrays) -> dict[str, float]:
        """Gains by name: "gain", the mean over the levels; "gain_wrong", the same with another's memory, over the
        samples that have another, and left out if none has; "gain_0.2", ... at each level.
        """
        found = [self._with_memory(params, rest, self.backbone, *pair) for pair in self.batches]
        right, wrong, has_other = map(_gather, zip(*found, strict=True))
        without, everyone = self._errors_without, np.ones(right.shape, bool)
        gains = {"gain": float(objective.gain(right, without, everyone))}
        if has_other.any():
            counted = np.broadcast_to(has_other > 0, wrong.shape)
            gains["gain_wrong"] = float(objective.gain(wrong, without, counted))
        levels, _ = objective.gain_by_level(right, without, everyone)
        return gains | {f"gain_{sigma:g}": float(x) for sigma, x in zip(self.sigmas, levels, strict=True)}


def _gather(values: Iterable[jax.Array]) -> np.ndarray:
    """What is known of each sample of all batches, [levels, samples], in float64."""
    return np.concatenate([np.asarray(jax.device_get(x), np.float64) for x in values], axis=1)


def relatives(
    records: RecordReader, bank: References, matches: Int[np.ndarray, "n R"]
) -> Int[np.ndarray, "n F"]:
    """For each record the numbers in `bank` of its references and its own, below 0 where it is not among them."""
    places = {pointer.checksum: place for place, pointer in enumerate(bank.pointers)}
    own = [places.get(checksum, -2 - number) for number, checksum in enumerate(records.checksums)]
    return np.column_stack([matches, np.asarray(own, matches.dtype)])


def others(
    entries: Sequence[Entry],
    relatives: Int[np.ndarray, "n F"],
    numbers: Sequence[int],
    seed: int,
    kind: str = "",
    group: str = "",
) -> Int[np.ndarray, " m"]:
    """For each record in `numbers` the one whose references are another's memory to it: another source, same kind.

    It is of another source and group, of the same kind, and has no relative in common. Of those, its caption shares
    the most words (intersection over union): captions of one kind differ in names and details. The seed decides between
    equals. -1 for none.

    Args:
        relatives: of each record, see `relatives`.
        kind, group: columns of the records, see `DataConfig`; "" for none.
    Raises:
        UserError: for a column that a record does not have.
    """
    for column in filter(None, (kind, group)):
        if lacking := [entry for entry in entries if column not in entry.extra]:
            raise UserError(
                f"the held-out record {lacking[0].id!r} has no column {column!r}",
                expected=f"one of: {nearest(column, lacking[0].extra)}" if lacking[0].extra else "columns",
                fix="other values of data.kind and data.group, or '' for none",
            )
    texts = [set(words(entry.caption)) for entry in entries]

    def shared(number: int, other: int) -> float:
        return len(texts[number] & texts[other]) / max(1, len(texts[number] | texts[other]))

    def may_be_other(ours: Entry, theirs: Entry) -> bool:
        one_source = ours.source == theirs.source != ""
        one_group = group and ours.extra[group] == theirs.extra[group]
        return not one_source and not one_group and (not kind or ours.extra[kind] == theirs.extra[kind])

    def other(number: int) -> int:
        related = np.isin(relatives, relatives[number]).sum(axis=1) > 0
        order = np.random.default_rng([seed, number]).permutation(len(entries)).tolist()
        candidates = [i for i in order if not related[i] and may_be_other(entries[number], entries[i])]
        return max(candidates, key=functools.partial(shared, number), default=-1)

    return np.array([other(number) for number in numbers], np.int64)
