"""What videos look like, in little: means of their latents, to tell copies of a film by sight.

A smaller or recompressed copy has nearly the latents of the film, whatever its caption says. A sketch is the means of the
latents over a coarse grid.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float16

from ditmem_jax.bank.search import WITH_RECORD, Bank
from ditmem_jax.data.records import RecordReader
from ditmem_jax.progress import track

GRID = (6, 8, 8)  # cells along time, height and width at most


class Sketches:
    """Sketches of the records of a training set and of a bank; each record is read once, under a progress bar."""

    def __init__(self, records: RecordReader, bank: Bank):
        folders = bank.table.rows(WITH_RECORD, ["records"])["records"].unique().to_pylist()
        self._bank = {folder: _sketches(RecordReader(folder)) for folder in sorted(folders)}
        own = self._bank.get(str(records.folder.resolve()))
        self._records = _sketches(records) if own is None else own

    def correlations(self, number: int, hits: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, " n"]:
        """Of record `number` with rows of the bank, which have columns `records` and `row`; 0 for other shapes."""
        own = self._records[number]
        others = [self._bank[hit["records"]][hit["row"]] for hit in hits]
        return np.array([_units(x) @ _units(own) if x.shape == own.shape else 0.0 for x in others], float)


def _sketches(records: RecordReader) -> Float16[np.ndarray, "n D"]:
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda number: sketch(records[number].latents), range(len(records)))
        return np.stack(list(track(found, f"sketches of {Path(records.folder).name}", total=len(records))))


def sketch(latents: Float[np.ndarray, "T H W C"]) -> Float16[np.ndarray, " D"]:
    """The means of latents over a grid of at most `GRID` cells."""
    means = latents.astype(np.float32)
    for axis, cells in enumerate(GRID):
        size = means.shape[axis]
        edges = np.linspace(0, size, min(cells, size), endpoint=False).astype(int)
        counts = np.diff([*edges, size]).reshape([-1 if i == axis else 1 for i in range(means.ndim)])
        means = np.add.reduceat(means, edges, axis) / counts
    return means.astype(np.float16).reshape(-1)


def _units(vector: np.ndarray) -> np.ndarray:
    vector = vector.astype(np.float32)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
