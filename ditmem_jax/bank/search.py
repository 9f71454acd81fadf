"""Search in memory over a bank: exact, by blocked matrix products.

Scores are cosines. A matrix product rounds as its blocks fall, which would decide between equal scores: so it only
finds the rows that may be among the best, and those are scored again in float64, rounded, and ordered by id where
their scores are equal. The same query gives the same answer on every machine, alone or among others.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int64

from ditmem_jax.bank.embedders import Embedder, load_embedder
from ditmem_jax.bank.table import Table, to_matrix, unit
from ditmem_jax.errors import UserError

QUERIES_AT_ONCE = 256
ROUNDING = 1e-5  # float32 scores of unit vectors err by less
DIGITS = 6  # of scores


@dataclasses.dataclass(frozen=True)
class Results:
    """For each query the k best videos, best first: their ids and scores (cosines)."""

    ids: list[list[str]]
    scores: Float32[np.ndarray, "P k"]
    places: list[Int64[np.ndarray, " k"]]  # in the memory of the bank
    _bank: "Bank"

    @functools.cached_property
    def rows(self) -> list[list[dict[str, Any]]]:
        """All columns but the vector, fetched when they are first asked for."""
        return self.columns()

    def columns(self, names: Sequence[str] | None = None) -> list[list[dict[str, Any]]]:
        """The named columns of each video."""
        found = iter(
            self._bank.table.take(self._bank.row_ids[np.concatenate(self.places)], names).to_pylist()
        )
        return [[next(found) for _ in ids] for ids in self.ids]


class Bank:
    """A bank open for search; `add` and `remove` change the table and what the next search sees.

    Another writer's changes are seen after `refresh`.
    """

    def __init__(self, table: Table):
        self.table = table
        self.row_ids = np.zeros(0, np.uint64)
        self._ids = pa.chunked_array([], pa.string())
        self._blocks: list[Float32[np.ndarray, "n D"]] = []
        self._alive = np.zeros(0, bool)
        for part in table.blocks():
            self._append(part)

    @classmethod
    def open(cls, uri: str | Path, version: int | None = None) -> "Bank":
        """Raises UserError if there is no such bank or version."""
        return cls(Table.open(uri, version))

    def __len__(self) -> int:
        return int(self._alive.sum())

    @property
    def version(self) -> int:
        return self.table.version

    @functools.cached_property
    def embedder(self) -> Embedder:
        """What made the vectors; loaded when it is first asked for."""
        return load_embedder(self.table.description, self.table.words)

    def search(
        self, queries: Sequence[str] | Float32[np.ndarray, "P D"], k: int, *, where: str | None = None
    ) -> Results:
        """The k videos nearest to each query, a text or a vector, among those that the filter `where` leaves.

        Raises:
            UserError: if fewer than k are left, a text has no words, or the filter does not parse.
        """
        vectors = self._vectors(queries)
        allowed = self._allowed(where)
        left = int(allowed.sum())
        if not 1 <= k <= left:
            filtered = "" if where is None else f", {left} of them pass the filter"
            raise UserError(
                f"the bank {self.table.uri} cannot give {k} videos"
                if len(self)
                else f"the bank {self.table.uri} is empty",
                expected=f"k from 1 to {left}: the bank holds {len(self)}{filtered}",
                found=k,
                fix="a smaller k, or more videos in the bank",
            )
        ids, scores, places = [], np.zeros((len(vectors), k), np.float32), []
        for start in range(0, len(vectors), QUERIES_AT_ONCE):
            group = vectors[start : start + QUERIES_AT_ONCE]
            for number, rows in enumerate(_candidates(self._blocks, group, k, allowed), start):
                names, best, scores[number] = self._ranked(vectors[number], rows, k)
                ids.append(names)
                places.append(best)
        return Results(ids, scores, places, self)

    def add(self, rows: pa.Table, vectors: np.ndarray | None = None) -> None:
        """Adds rows (see `Table.add`), embedded by the bank's embedder unless their vectors are given."""
        self.table.add(rows, self.embedder, vectors)
        self._follow()

    def remove(self, ids: Sequence[str] | None = None, where: str | None = None) -> int:
        """Removes rows by id or filter (see `Table.remove`), and tells how many."""
        removed = self.table.remove(ids, where)
        self._follow()
        return removed

    def refresh(self) -> None:
        """Takes up what other writers have changed."""
        before = self.version
        self.table.refresh()
        if self.version != before:
            self._follow()

    def _follow(self) -> None:
        """Brings what is in memory to the version of the table."""
        now = np.sort(self.table.row_ids())
        self._alive = np.isin(self.row_ids, now)
        new = np.setdiff1d(now, self.row_ids)
        if new.size:
            self._append(self.table.take(new, ["_rowid", "id", "vector"]))

    def _append(self, part: pa.Table) -> None:
        self.row_ids = np.concatenate([self.row_ids, part["_rowid"].to_numpy()])
        self._ids = pa.chunked_array([*self._ids.chunks, *part["id"].chunks], pa.string())
        self._blocks.append(to_matrix(part["vector"]))
        self._alive = np.concatenate([self._alive, np.ones(len(part), bool)])

    def _vectors(self, queries: Sequence[str] | np.ndarray) -> Float32[np.ndarray, "P D"]:
        if isinstance(queries, np.ndarray):
            if queries.ndim != 2 or queries.shape[1] != self.table.dim:
                raise UserError(
                    f"the bank {self.table.uri} cannot be searched with these vectors",
                    expected=f"[P, {self.table.dim}]", found=list(queries.shape),
                )  # fmt: skip
            names = [f"query {number}" for number in range(len(queries))]
            vectors = unit(queries, names)
        else:
            names, vectors = queries, self.embedder.queries(queries)
        if not vectors.any(axis=1).all():
            empty = names[int(np.flatnonzero(~vectors.any(axis=1))[0])]
            raise UserError("a query has nothing to search for", expected="words", found=repr(empty))
        return vectors

    def vectors(self, places: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        """The vectors at these places in memory, such as `Results.places`."""
        starts = np.cumsum([0, *map(len, self._blocks)])
        found = np.empty((len(places), self.table.dim), np.float32)
        owners = np.searchsorted(starts, places, "right") - 1
        for block in np.unique(owners):
            here = owners == block
            found[here] = self._blocks[block][places[here] - starts[block]]
        return found

    def _allowed(self, where: str | None) -> Bool[np.ndarray, " N"]:
        if where is None:
            return self._alive
        return self._alive & np.isin(self.row_ids, self.table.row_ids(where))

    def _ranked(
        self, query: Float32[np.ndarray, " D"], rows: Int64[np.ndarray, " n"], k: int
    ) -> tuple[list[str], Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
        """The k best of the candidates: ids, rows, scores."""
        parts = np.array_split(rows, len(rows) // 4096 + 1)
        exact = np.concatenate([cosines(query, self.vectors(part)) for part in parts])
        ids = self._ids.take(pa.array(rows)).to_pylist()
        order = sorted(range(len(rows)), key=lambda i: (-exact[i], ids[i]))[:k]
        return [ids[i] for i in order], rows[order], exact[order]


def cosines(
    query: Float32[np.ndarray, " D"], vectors: Float32[np.ndarray, "n D"]
) -> Float64[np.ndarray, " n"]:
    """Of unit vectors, rounded so that they are the same on every machine."""
    return np.round(vectors.astype(np.float64) @ query.astype(np.float64), DIGITS)


def _candidates(
    blocks: Sequence[Float32[np.ndarray, "_ D"]],
    queries: Float32[np.ndarray, "P D"],
    k: int,
    allowed: Bool[np.ndarray, " N"],
) -> list[Int64[np.ndarray, " _"]]:
    """For each query the rows that may be among its k best: all that are, to within the rounding.

    Each block of rows is compared with the k-th best score so far, so that few scores are ever looked at twice.
    """
    best = np.full((len(queries), k), -2, np.float32)  # below any cosine
    rows: list[list[np.ndarray]] = [[] for _ in queries]
    rough: list[list[np.ndarray]] = [[] for _ in queries]
    start = 0
    for block in blocks:
        scores = queries @ block.T if len(queries) > 1 else (block @ queries[0])[None]
        if not (here := allowed[start : start + len(block)]).all():
            scores[:, ~here] = -3
        for i in np.flatnonzero(scores.max(axis=1) >= best[:, 0] - ROUNDING):
            found = np.flatnonzero(scores[i] >= best[i, 0] - ROUNDING)
            values = scores[i, found]
            best[i] = np.sort(np.partition(np.concatenate([best[i], values]), -k)[-k:])
            kept = values >= best[i, 0] - ROUNDING
            rows[i].append(found[kept] + start)
            rough[i].append(values[kept])
        start += len(block)
    return [
        np.concatenate(r)[np.concatenate(v) >= low - ROUNDING]
        for r, v, low in zip(rows, rough, best[:, 0], strict=True)
    ]
