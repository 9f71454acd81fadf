"""Exact search over the captions of a folder of records, in memory."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int

from ditmem_jax.bank.lexical import LexicalEmbedder
from ditmem_jax.data.records import Entry, RecordReader
from ditmem_jax.errors import UserError

EMBEDDER_FILE = "embedder.json"

_SCORES_AT_ONCE = 1 << 24  # 64 MB of float32
_ROUNDING = 1e-5  # float32 scores of unit vectors err by less


class Bank:
    """Records that can be found by what their captions say.

    Args:
        entries: id, caption and source of each record, in the order of the records.
        embedder: texts to unit vectors.
    Raises:
        UserError: for a bank without entries or with one id twice.
    """

    def __init__(self, entries: Sequence[Entry], embedder: LexicalEmbedder):
        self.entries, self.embedder = list(entries), embedder
        self.rows = {entry.id: row for row, entry in enumerate(self.entries)}
        if not self.entries:
            raise UserError("the bank is empty", expected="at least one record")
        if len(self.rows) < len(self.entries):
            twice = next(entry.id for row, entry in enumerate(self.entries) if self.rows[entry.id] != row)
            raise UserError(f"the bank holds {twice!r} twice", expected="one record per id")
        self._by_source: dict[str, list[int]] = {}
        for row, entry in enumerate(self.entries):
            self._by_source.setdefault(entry.source, []).append(row)
        by_id = sorted(self.rows)
        self._place_of_id = np.empty(len(by_id), np.int64)
        self._place_of_id[[self.rows[name] for name in by_id]] = np.arange(len(by_id))
        self._vectors = embedder.documents([entry.caption for entry in self.entries])

    @classmethod
    def from_records(cls, folder: str | Path, embedder: LexicalEmbedder | None = None) -> "Bank":
        """The bank of a folder of records.

        Without `embedder` it is the one stored in the folder as `EMBEDDER_FILE` or, where there is none, one
        fitted to the folder's own captions.
        """
        entries = RecordReader(folder).entries
        stored = Path(folder) / EMBEDDER_FILE
        if embedder is None and stored.exists():
            embedder = LexicalEmbedder.load(stored)
        return cls(entries, embedder or LexicalEmbedder.fit([entry.caption for entry in entries]))

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def version(self) -> str:
        """A digest of everything that decides what a search returns; stored beside results of searches."""
        listed = json.dumps([[entry.id, entry.caption, entry.source] for entry in self.entries])
        return hashlib.sha256((listed + self.embedder.to_json()).encode()).hexdigest()[:16]

    def search(
        self, prompts: Sequence[str], k: int, *, exclude: Sequence[Entry | None] | None = None
    ) -> tuple[list[list[str]], Float[np.ndarray, "P k"]]:
        """The ids of the k records nearest to each prompt, best first, and their scores (cosines).

        Equal scores are ordered by id, so a search gives the same on every machine.

        Args:
            exclude: for each prompt the record it belongs to, or None: neither that record nor one with the
                same source is returned.
        Raises:
            UserError: if fewer than k records are left, or a prompt has no words.
        """
        exclude = [None] * len(prompts) if exclude is None else exclude
        hidden = [self._hidden(entry) for entry in exclude]
        for prompt, rows in zip(prompts, hidden, strict=True):
            self._require(k, len(rows), prompt)
        ids, scores = [], np.zeros((len(prompts), k))
        step = max(1, _SCORES_AT_ONCE // len(self))
        for start in range(0, len(prompts), step):
            vectors = self.embedder.queries(prompts[start : start + step])
            rough = vectors @ self._vectors.T
            for row, vector in enumerate(vectors, start):
                if not vector.any():
                    raise UserError("a prompt has no words to search for", found=repr(prompts[row]))
                rough[row - start, hidden[row]] = -np.inf
                best, scores[row] = self._nearest(vector, rough[row - start], k)
                ids.append([self.entries[i].id for i in best])
        return ids, scores

    def _hidden(self, entry: Entry | None) -> list[int]:
        """Rows that must not answer for `entry`. An empty source says nothing about where a clip is from."""
        if entry is None:
            return []
        same_source = self._by_source.get(entry.source, []) if entry.source else []
        return sorted({*same_source, *([self.rows[entry.id]] if entry.id in self.rows else [])})

    def _require(self, k: int, hidden: int, prompt: str) -> None:
        left = len(self) - hidden
        if not 1 <= k <= left:
            own = f", {hidden} of them the prompt's own" if hidden else ""
            raise UserError(
                f"the bank cannot give {k} records for {prompt!r}",
                expected=f"1 to {left}: the bank holds {len(self)}{own}",
                found=k,
                fix="fewer references, or more videos in the bank",
            )

    def _nearest(
        self, vector: Float32[np.ndarray, " D"], rough: Float32[np.ndarray, " N"], k: int
    ) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """Rows and scores of the k best, given the scores as a matrix product gave them.

        That product rounds as its blocks fall, which would decide between equal scores: so all rows that may be
        among the best are scored again in float64 and rounded.
        """
        candidates = np.flatnonzero(rough >= np.partition(rough, -k)[-k] - _ROUNDING)
        exact = np.round(self._vectors[candidates].astype(np.float64) @ vector.astype(np.float64), 6)
        order = np.lexsort((self._place_of_id[candidates], -exact))[:k]
        return candidates[order], exact[order]


def retrieve_for(records: RecordReader, bank: Bank, k: int) -> Int[np.ndarray, "n k"]:
    """For each record the positions in the bank of the k records that its caption finds.

    Neither the record itself nor another of the same source is among them.
    """
    ids, _ = bank.search(records.captions(), k, exclude=records.entries)
    return np.array([[bank.rows[name] for name in row] for row in ids], np.int32)
