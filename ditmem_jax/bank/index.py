"""Which rows may be among the k best for a query: exactly, or among the likely ones of a very large bank.

Both indexes number rows as they are added, from 0 on. They find candidates only; who asks scores these again.
"""

# The stubs of faiss lack what its Python adds.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from collections.abc import Iterable

import faiss
import numpy as np
from jaxtyping import Bool, Float32, Int64

ROUNDING = 1e-5  # float32 scores of unit vectors err by less
SPARE = 32  # candidates beyond k of the approximate index, whose scores are rounded as well

MERGED = 1 << 14  # rows of a block that small ones grow to

Vectors = Float32[np.ndarray, "_ D"]


class Exact:
    """All rows, in blocks. A product of each block with all queries finds every row within rounding of the k best."""

    def __init__(self, dim: int, blocks: Iterable[Vectors] = ()):
        self.dim, self.blocks = dim, list(blocks)

    def add(self, vectors: Vectors) -> None:
        self.blocks.append(vectors)
        while (
            len(self.blocks) > 1 and len(self.blocks[-2]) <= len(self.blocks[-1]) < MERGED
        ):  # few, not many small ones
            self.blocks[-2:] = [np.concatenate(self.blocks[-2:])]

    def vectors(self, rows: Int64[np.ndarray, " n"]) -> Vectors:
        starts = np.cumsum([0, *map(len, self.blocks)])
        found = np.empty((len(rows), self.dim), np.float32)
        owners = np.searchsorted(starts, rows, "right") - 1
        for block in np.unique(owners):
            here = owners == block
            found[here] = self.blocks[block][rows[here] - starts[block]]
        return found

    def candidates(
        self, queries: Float32[np.ndarray, "P D"], k: int, allowed: Bool[np.ndarray, " N"]
    ) -> list[Int64[np.ndarray, " _"]]:
        """For each query the allowed rows that may be among its k best, of which there are k at least.

        Each block is compared with the k-th best score so far, so that few scores are ever looked at twice.
        """
        best = np.full((len(queries), k), -2, np.float32)  # below any cosine
        rows: list[list[np.ndarray]] = [[] for _ in queries]
        rough: list[list[np.ndarray]] = [[] for _ in queries]
        start = 0
        for block in self.blocks:
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

    def __str__(self) -> str:
        return "exact search"


class IVF:
    """Rows in about sqrt(N) lists by their nearest of as many centres, of which a query reads an eighth.

    Filling it empties `blocks`, so that vectors are never held twice.
    """

    def __init__(self, dim: int, blocks: list[Vectors]):
        count = sum(map(len, blocks))
        lists = max(1, int(count**0.5))
        self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        self.index.nprobe = max(1, lists // 8)
        step = max(1, count // (64 * lists))  # FAISS asks for 39 rows a list at least
        self.index.train(np.concatenate([block[::step] for block in blocks]))
        self.index.set_direct_map_type(faiss.DirectMap.Array)
        while blocks:
            self.index.add(blocks.pop(0))

    def add(self, vectors: Vectors) -> None:
        self.index.add(vectors)

    def vectors(self, rows: Int64[np.ndarray, " n"]) -> Vectors:
        return self.index.reconstruct_batch(rows)

    def candidates(
        self, queries: Float32[np.ndarray, "P D"], k: int, allowed: Bool[np.ndarray, " N"]
    ) -> list[Int64[np.ndarray, " _"]]:
        """As `Exact.candidates`, but some of the k best may be missing; lists are added until there are k."""
        bits = np.packbits(allowed, bitorder="little")
        selector, probes = faiss.IDSelectorBitmap(bits), self.index.nprobe
        while True:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=probes)
            _, found = self.index.search(queries, min(k + SPARE, self.index.ntotal), params=parameters)
            if probes == self.index.nlist or (found[:, k - 1] >= 0).all():
                return [row[row >= 0] for row in found]
            probes = self.index.nlist

    def __str__(self) -> str:
        return f"FAISS IVF of {self.index.nlist} lists, {self.index.nprobe} read for a query: approximate"
