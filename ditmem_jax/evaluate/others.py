"""Whose references are another's memory to a held-out sample: what should not help."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from ditmem_jax.bank.lexical import words
from ditmem_jax.data.record import Entry
from ditmem_jax.data.records import RecordReader
from ditmem_jax.data.references import References
from ditmem_jax.errors import UserError, nearest


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
