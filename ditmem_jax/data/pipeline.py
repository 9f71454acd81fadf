"""The stream of training batches, with grain: shuffled, repeated, divided among processes, resumable."""

import dataclasses
import operator
import sys
from typing import SupportsIndex

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from ditmem_jax.data.record import Record
from ditmem_jax.data.records import RecordReader
from ditmem_jax.data.references import References
from ditmem_jax.errors import UserError
from ditmem_jax.types import Batch, Conditioning

READ_AHEAD = grain.ReadOptions(
    num_threads=2, prefetch_buffer_size=4
)  # in batches; grain's 500 fill the memory


def training_data(
    records: RecordReader,
    matches: Int[np.ndarray, "n R"],
    batch_size: int,
    *,
    seed: int,
    text_len: int,
    bank: RecordReader | References | None = None,
    shuffle: bool = True,
    epochs: int | None = None,
    start: int = 0,
    workers: int = 0,
    rows: Int[np.ndarray, " b"] | None = None,
    drop_remainder: bool = True,
    cache: bool = False,
    sources: Int[np.ndarray, " n"] | None = None,
) -> grain.IterDataset:
    """Batches of records with their reference videos, for ever or for `epochs`; the same for the same seed.

    With `start` it goes on bit for bit where a stream of the same arguments, read by any number of workers, stopped.
    Each is a `types.Batch` of NumPy arrays of the dtype that they are stored in,
    with text embeddings padded to `text_len`.

    Args:
        records: what to train on.
        matches: for each record, the indices of its reference videos in `bank`; -1 for none.
        batch_size: of all processes together.
        bank: where references come from; `records` itself by default.
        start: batches to leave out at the beginning, so that a stream goes on where another stopped.
        workers: processes that read ahead; 0 reads in this one.
        rows: of every batch those that this process reads; all of them by default.
        drop_remainder: leaves out a last batch that is not full.
        cache: keeps all records that were read in memory (of each worker).
        sources: what becomes `Batch.source` of each record.

    Raises:
        UserError: if records, bank, matches and sizes do not go together.
    """
    bank = records if bank is None else bank
    _check(records, bank, matches, batch_size, epochs, rows, drop_remainder)
    indices = grain.MapDataset.range(len(records))
    if shuffle:
        indices = indices.shuffle(seed)
    batches = indices.repeat(epochs).batch(batch_size, drop_remainder=drop_remainder)
    data = batches[start:].map(_Load(records, bank, matches, text_len, rows, cache, sources))
    data = data.to_iter_dataset(READ_AHEAD)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(
                sys.argv[:1]
            )  # grain hands absl's flags to its workers, and notebooks never parse them
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    return data


def _check(
    records: RecordReader,
    bank: RecordReader | References,
    matches: np.ndarray,
    batch_size: int,
    epochs: int | None,
    rows: np.ndarray | None,
    drop_remainder: bool,
) -> None:
    ours, theirs = records.meta, bank.meta
    if (ours.latents, ours.dtype) != (theirs.latents, theirs.dtype):
        raise UserError(
            f"the bank {bank.folder} does not fit the records {records.folder}",
            expected=f"latents {ours.latents} in {ours.dtype}",
            found=f"latents {theirs.latents} in {theirs.dtype}",
            fix="encode both with one config",
        )
    if len(matches) != len(records):
        raise UserError("matches need a row for each record", expected=len(records), found=len(matches))
    if matches.size and not -1 <= matches.min() <= matches.max() < len(bank):
        raise UserError(
            "matches point outside the bank",
            expected=f"-1 to {len(bank) - 1}",
            found=f"{matches.min()} to {matches.max()}",
            fix="search the bank again",
        )
    if epochs is not None and drop_remainder and batch_size > epochs * len(records):
        raise UserError(
            "the data does not fill one batch", expected=f"at least {batch_size} records", found=len(records)
        )
    if rows is not None and not drop_remainder:
        raise UserError("rows of a batch that may not be there", fix="drop_remainder=True")


@dataclasses.dataclass
class _Load:
    """Indices of a batch -> this process's part of the batch."""

    records: RecordReader
    bank: RecordReader | References
    matches: np.ndarray
    text_len: int
    rows: np.ndarray | None
    cache: bool
    sources: np.ndarray | None

    def __post_init__(self):
        self.read: dict[tuple[bool, int], Record] = {}

    def record(self, in_bank: bool, index: SupportsIndex) -> Record:
        key = (in_bank and self.bank is not self.records, operator.index(index))
        if key in self.read:
            return self.read[key]
        record = (self.bank if in_bank else self.records)[key[1]]
        if self.cache:
            self.read[key] = record
        return record

    def __call__(self, indices: np.ndarray) -> Batch:
        indices = indices if self.rows is None else indices[self.rows]
        samples = [self.record(False, index) for index in indices]
        matches = self.matches[indices]
        size, width = len(samples), self.records.meta.text_dim
        dtype = samples[0].latents.dtype
        text = np.zeros((size, self.text_len, width), dtype)
        lengths = np.array([len(sample.text_embedding) for sample in samples])
        if lengths.max() > self.text_len:
            raise UserError(
                f"a text embedding of {self.records.folder} is too long",
                expected=f"at most dit.text_len = {self.text_len}",
                found=lengths.max(),
                fix="encode with this config",
            )
        references = np.zeros((*matches.shape, *self.records.meta.latents), dtype)
        for row, sample in enumerate(samples):
            text[row, : lengths[row]] = sample.text_embedding
            for column, match in enumerate(matches[row]):
                if match >= 0:
                    references[row, column] = self.record(True, match).latents
        condition = {
            name: np.stack([sample.condition[name] for sample in samples]) for name in samples[0].condition
        }
        return Batch(
            np.stack([sample.latents for sample in samples]),
            Conditioning(text, **condition),
            references,
            matches >= 0,
            np.array([sample.id for sample in samples]),
            None if self.sources is None else self.sources[indices],
        )
