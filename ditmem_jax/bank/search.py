"""Search in memory over a bank: exact, or by FAISS IVF where there are very many videos.

Texts find by words in a bank of the lexical embedder (`lexical.WordIndex`), and by vectors in others, whose scores are
cosines. A matrix product rounds as its blocks fall, which would decide between equal scores: so it only
finds the rows that may be among the best, and those are scored again in float64, rounded, and ordered by id where
their scores are equal. The same query gives the same answer on every machine, alone or among others.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int64, UInt64

from ditmem_jax.bank.embedders import Embedder, default_embedder, load_embedder, make_embedder
from ditmem_jax.bank.index import IVF, Exact
from ditmem_jax.bank.lexical import WordIndex, words
from ditmem_jax.bank.rows import rows_of_records
from ditmem_jax.bank.table import Table, to_matrix, unit
from ditmem_jax.data.references import References
from ditmem_jax.errors import UserError

QUERIES_AT_ONCE = 256
IVF_ABOVE = 1_000_000  # videos
DIGITS = 6  # of scores
UNLIKE = 0.1  # share of a text's weight in words below which nothing resembles it
CHUNKS = 1024  # of the ids: adding one by one makes many, which are slow
WITH_RECORD = "records IS NOT NULL"


@dataclasses.dataclass(frozen=True)
class Results:
    """For each query the k best videos, best first: their ids and scores.

    A video that shares no word with a text, or only such as nearly all have, has score 0 and is no match; see `matched`.
    """

    ids: list[list[str]]
    scores: Float32[np.ndarray, "P k"]
    places: list[Int64[np.ndarray, " _"]]  # in the memory of the bank
    _bank: "Bank"

    @property
    def matched(self) -> list[int]:
        """How many of the videos match each query; they come first."""
        if not self._bank.by_words:
            return [len(ids) for ids in self.ids]
        return [int((np.round(scores, DIGITS) > 0).sum()) for scores in self.scores]

    @functools.cached_property
    def rows(self) -> list[list[dict[str, Any]]]:
        """All columns but the vector, fetched when they are first asked for."""
        return self.columns()

    @functools.cached_property
    def latents(self) -> Float32[np.ndarray, "P k T H W C"]:
        """Latents of the videos, read from their records when they are first asked for.

        Raises:
            UserError: for a video without a record, or whose record is gone or altered.
        """
        return np.stack([References.of(videos).latents() for videos in self.rows])

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

    def __init__(self, table: Table, ivf_above: int = IVF_ABOVE):
        self.table, self.dim = table, table.dim
        self.row_ids = np.zeros(0, np.uint64)
        self._ids = pa.chunked_array([], pa.string())
        self._alive = np.zeros(0, bool)
        self._followed = table.version  # what is in memory; a change that fails may move the table on
        blocks = []
        for part in table.blocks():
            self._take_up(part)
            blocks.append(to_matrix(part["vector"]).copy())  # in huge pages: a third quicker to search
        large = len(self) > ivf_above
        if large:
            print(f"{len(self):,} videos: filling an index of FAISS IVF", file=sys.stderr)
        self.index: Exact | IVF = IVF(self.dim, blocks) if large else Exact(self.dim, blocks)

    @classmethod
    def open(cls, uri: str | Path, version: int | None = None, ivf_above: int = IVF_ABOVE) -> "Bank":
        """The newest version of a bank, or an older one.

        Args:
            ivf_above: videos beyond which search is approximate, by FAISS IVF.
        Raises:
            UserError: if there is no such bank or version.
        """
        return cls(Table.open(uri, version), ivf_above)

    @classmethod
    def build(
        cls, uri: str | Path, records: str | Path | Sequence[str | Path], embedder: str | None = None
    ) -> "Bank":
        """Write a new bank of the videos of folders of records, and open it.

        Args:
            embedder: "lexical", or "sentence-transformers:NAME_OR_FOLDER[@REVISION]", what makes captions comparable;
                by default the best that is at hand (`embedders.default_embedder`).
        Raises:
            UserError: if there is a bank, or for a folder that is not of records.
        """
        rows = rows_of_records([records] if isinstance(records, (str, Path)) else records)
        Table.create(uri, make_embedder(embedder or default_embedder(), rows["caption"].to_pylist()), rows)
        return cls.open(uri)

    def __len__(self) -> int:
        return int(self._alive.sum())

    @property
    def version(self) -> int:
        return self.table.version

    @functools.cached_property
    def embedder(self) -> Embedder:
        """The embedder that made the vectors; loaded when it is first asked for."""
        return load_embedder(self.table.description, self.table.words)

    @property
    def by_words(self) -> bool:
        """Return True if texts are found by words, not by vectors."""
        return self.table.description["kind"] == "lexical"

    @property
    def likeness(self) -> str:
        """What makes a video resemble a text, for messages."""
        if self.by_words:
            return f"a caption with at least {UNLIKE:.0%} of the prompt's words by weight"
        return "a caption closer than two videos of the bank mostly are"

    def unlike(self, query: str, caption: str, score: float) -> bool:
        """Return True if the best match of a text is not as `likeness` says, so that nothing in the bank resembles it."""
        if self.by_words:
            return self._words.shared(query, caption) < UNLIKE
        places = np.flatnonzero(self._alive)
        places = places[np.linspace(0, len(places) - 1, min(len(places), 256)).astype(int)]
        vectors = self.vectors(places).astype(np.float64)
        pairs = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
        return bool(pairs.size and score < np.median(pairs))

    def search(
        self,
        queries: Sequence[str] | Float32[np.ndarray, "P D"],
        k: int | None = None,
        *,
        where: str | UInt64[np.ndarray, " _"] | None = None,
    ) -> Results:
        """The k videos nearest to each query, a text or a vector, among those that the filter `where` leaves.

        Args:
            k: how many; None is five, or all if fewer are left.
            where: a filter, or the row ids that `Table.row_ids` has given for one.
        Raises:
            UserError: if fewer than k are left or none is, a text has no words, or the filter does not parse.
        """
        if not len(queries):
            raise UserError("there is nothing to search for", expected="at least one text or vector")
        by_words = self.by_words and not isinstance(queries, np.ndarray)
        if by_words:
            _require_words(queries, [bool(words(query)) for query in queries])
        vectors = queries if by_words else self._vectors(queries)
        allowed = self._allowed(where)
        left = int(allowed.sum())
        if not len(self):
            raise UserError(
                f"the bank {self.table.uri} is empty",
                fix=f"ditmem bank add --bank {self.table.uri} --records RECORDS",
            )
        if not left:
            raise UserError(
                "no video passes the filter",
                expected=f"some of the {len(self)} in the bank {self.table.uri}",
                found=where if isinstance(where, str) else None,
            )
        if k is None:
            k = min(5, left)
        if not 1 <= k <= left:
            filtered = "" if where is None else f", {left} of them pass the filter"
            raise UserError(
                f"the bank {self.table.uri} cannot give {k} videos",
                expected=f"k from 1 to {left}: the bank holds {len(self)}{filtered}",
                fix="a smaller k, or more videos in the bank",
            )
        parts = []
        for start in range(0, len(vectors), QUERIES_AT_ONCE):
            group = vectors[start : start + QUERIES_AT_ONCE]
            if by_words:
                parts += [self._by_words(query, k, allowed) for query in group]
            else:
                parts += self._ranked(group, self.index.candidates(group, k, allowed), k)
        ids, scores, places = zip(*parts, strict=True)
        return Results(list(ids), np.array(scores, np.float32), list(places), self)

    def search_records(self, queries: Sequence[str] | Float32[np.ndarray, "P D"], k: int) -> Results:
        """Return the k nearest videos with a record, which alone can be references; arguments and errors as `search`.

        This finds the references of prompts and, before what would give a record away is left out
        (`bank.matches`), those of records.
        """
        if len(self) and not len(self.table.row_ids(WITH_RECORD)):
            raise UserError(
                f"no video of the bank {self.table.uri} has a record, only vectors",
                fix="ditmem bank build --bank BANK --records RECORDS",
            )
        return self.search(queries, k, where=WITH_RECORD)

    def add(self, rows: pa.Table, vectors: np.ndarray | None = None) -> None:
        """Adds rows (see `Table.add`), embedded by the bank's embedder unless their vectors are given."""
        known = load_embedder(self.table.description, self.table.words, embeds=False)
        self.table.add(rows, self.embedder if vectors is None else known, vectors)
        self._follow()

    def remove(self, ids: Sequence[str] | None = None, where: str | None = None) -> int:
        """Removes rows by id or filter (see `Table.remove`), and tells how many."""
        removed = self.table.remove(ids, where)
        self._follow()
        return removed

    def refresh(self) -> None:
        """Takes up what other writers have changed."""
        self.table.refresh()
        if self.version != self._followed:
            self._follow()

    def _follow(self) -> None:
        """Brings what is in memory to the version of the table."""
        self._followed = self.version
        self.__dict__.pop("_words", None)
        now = np.sort(self.table.row_ids())
        self._alive = np.isin(self.row_ids, now)
        new = np.setdiff1d(now, self.row_ids)
        if new.size:
            part = self.table.take(new, ["_rowid", "id", "vector"])
            self._take_up(part)
            self.index.add(to_matrix(part["vector"]))

    def _take_up(self, part: pa.Table) -> None:
        self.row_ids = np.concatenate([self.row_ids, part["_rowid"].to_numpy()])
        ids = part["id"].take(
            pa.array(np.arange(len(part)))
        )  # a copy: the column itself would keep all others alive
        self._ids = pa.chunked_array([*self._ids.chunks, *ids.chunks], pa.string())
        if self._ids.num_chunks > CHUNKS:
            self._ids = pa.chunked_array([pa.concat_arrays(self._ids.chunks)])
        self._alive = np.concatenate([self._alive, np.ones(len(part), bool)])

    def _vectors(self, queries: Sequence[str] | np.ndarray) -> Float32[np.ndarray, "P D"]:
        if isinstance(queries, np.ndarray):
            if queries.ndim != 2 or queries.shape[1] != self.dim:
                raise UserError(
                    f"the bank {self.table.uri} cannot be searched with these vectors",
                    expected=f"[P, {self.dim}]", found=list(queries.shape),
                )  # fmt: skip
            names = [f"query {number}" for number in range(len(queries))]
            vectors = unit(queries, names)
        else:
            names, vectors = queries, self.embedder.queries(queries)
        _require_words(names, vectors.any(axis=1))
        return vectors

    @functools.cached_property
    def _words(self) -> WordIndex:
        """The captions of all that is in memory, in its order; what was removed is empty."""
        found = self.table.rows(columns=["_rowid", "caption"])
        captions = dict(zip(found["_rowid"].to_pylist(), found["caption"].to_pylist(), strict=True))
        return WordIndex([captions.get(number, "") for number in self.row_ids.tolist()])

    def _by_words(
        self, query: str, k: int, allowed: Bool[np.ndarray, " N"]
    ) -> tuple[list[str], Float64[np.ndarray, " _"], Int64[np.ndarray, " _"]]:
        """The k best videos for a text: ids, scores, places."""
        scores = _significant(self._words.scores(query))
        rows = np.flatnonzero(allowed & (scores > 0))
        if len(rows) > k:
            rows = rows[scores[rows] >= np.partition(scores[rows], -k)[-k]]
        elif len(rows) < k:
            rows = np.flatnonzero(allowed)
        names = self._ids.take(pa.array(rows)).to_pylist()
        order = sorted(range(len(rows)), key=lambda i: (-scores[rows[i]], names[i]))[:k]
        return [names[i] for i in order], scores[rows[order]], rows[order]

    def vectors(self, places: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        """The vectors at these places in memory, such as `Results.places`."""
        return self.index.vectors(places)

    def _allowed(self, where: str | UInt64[np.ndarray, " _"] | None) -> Bool[np.ndarray, " N"]:
        if where is None:
            return self._alive
        row_ids = self.table.row_ids(where) if isinstance(where, str) else where
        return self._alive & np.isin(self.row_ids, row_ids)

    def _ranked(
        self, queries: Float32[np.ndarray, "P D"], candidates: Sequence[Int64[np.ndarray, " _"]], k: int
    ) -> list[tuple[list[str], Float64[np.ndarray, " _"], Int64[np.ndarray, " _"]]]:
        """Of each query's candidates the k best: ids, scores, places."""
        ids, start, ranked = self._ids.take(pa.array(np.concatenate(candidates))).to_pylist(), 0, []
        for query, rows in zip(queries, candidates, strict=True):
            parts = np.array_split(rows, len(rows) // 4096 + 1)
            exact = np.concatenate([cosines(query, self.vectors(part)) for part in parts])
            names = ids[start : start + len(rows)]
            order = sorted(range(len(rows)), key=lambda i: (-exact[i], names[i]))[:k]
            ranked.append(([names[i] for i in order], exact[order], rows[order]))
            start += len(rows)
        return ranked


def _significant(x: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Numbers of 0 or more, rounded to `DIGITS` digits that count."""
    unit = 10.0 ** (np.floor(np.log10(np.where(x > 0, x, 1))) - DIGITS + 1)
    return np.round(x / unit) * unit


def _require_words(queries: Sequence[str], good: Sequence[bool] | np.ndarray) -> None:
    if not all(good):
        empty = queries[list(good).index(False)]
        raise UserError("a query has nothing to search for", expected="words", found=repr(empty))


def cosines(
    query: Float32[np.ndarray, " D"], vectors: Float32[np.ndarray, "n D"]
) -> Float64[np.ndarray, " n"]:
    """Of unit vectors, rounded so that they are the same on every machine."""
    return np.round(vectors.astype(np.float64) @ query.astype(np.float64), DIGITS)
