"""Captions as vectors without any download: the words two captions share, rare ones above all.

A word that stands in df of n captions weighs log((n + 1) / (df + 1/2)) to the power `power`. The plain
logarithm (power 1) lets half a dozen shared everyday words outweigh one shared name: with 32 worlds, each in
two clips of each of six phenomena, 64 % of the five captions nearest to each name its planet; with power 2,
99.7 %.

Each word has a direction of its own, drawn from its hash: +-1 in `BUCKETS` of `dim` places. Directions of two
words are orthogonal but for chance overlaps, so a new word needs neither a new fit nor longer vectors.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from ditmem_jax.data.files import write_text
from ditmem_jax.errors import UserError

BUCKETS = 8
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")  # a number or a word; marks say nothing


def words(text: str) -> list[str]:
    """The words and numbers of a text, in lower case."""
    return _WORD.findall(text.casefold())


@dataclasses.dataclass(frozen=True)
class LexicalEmbedder:
    """Texts to unit vectors that are close when rare words agree.

    Args:
        captions: how many captions `frequency` was counted over.
        frequency: in how many of them each word stands.
    """

    captions: int
    frequency: Mapping[str, int]
    dim: int = 1024
    power: float = 2.0

    @classmethod
    def fit(cls, captions: Iterable[str], *, dim: int = 1024, power: float = 2.0) -> "LexicalEmbedder":
        """Counts words.

        More captions than the bank's own judge better what is rare: in a bank of six worlds the name of one is
        no rarer than a phenomenon; beside the captions of a hundred other worlds it is.
        """
        sets = [set(words(caption)) for caption in captions]
        return cls(len(sets), dict(Counter(word for found in sets for word in found)), dim, power)

    def documents(self, texts: Sequence[str]) -> Float32[np.ndarray, "n D"]:
        """One vector of length 1 per text; zero for a text without words."""
        vectors = np.zeros((len(texts), self.dim))
        for vector, text in zip(vectors, texts, strict=True):
            for word, count in sorted(Counter(words(text)).items()):  # one order, one rounding
                places, signs = _direction(word, self.dim)
                np.add.at(vector, places, signs * self._weight(word) * (1 + math.log(count)))
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)

    queries = documents

    def describe(self) -> dict[str, Any]:
        """JSON values; the counts of words are there by their digest only, as they may be many."""
        counts = json.dumps(dict(self.frequency), sort_keys=True).encode()
        return {
            "kind": "lexical",
            "name": "lexical",
            "revision": hashlib.sha256(counts).hexdigest(),
            "normalised": True,
            "dim": self.dim,
            "captions": self.captions,
            "power": self.power,
        }

    def _weight(self, word: str) -> float:
        return math.log((self.captions + 1) / (self.frequency.get(word, 0) + 0.5)) ** self.power

    def to_json(self) -> str:
        """The embedder as text; equal embedders give equal texts."""
        return json.dumps({"kind": "lexical"} | dataclasses.asdict(self), sort_keys=True, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "LexicalEmbedder":
        """Raises UserError for a file that `save` did not write."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("kind") != "lexical":
                raise ValueError("another kind of embedder")
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no lexical embedder", found=repr(error), fix="build the bank again"
            ) from error


@functools.lru_cache(maxsize=1 << 16)
def _direction(word: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and signs of a word, the same on every machine (Python's own hash differs from run to run)."""
    digest = hashlib.blake2b(word.encode(), digest_size=4 * BUCKETS).digest()
    numbers = np.frombuffer(digest, "<u4").astype(np.int64)
    return (numbers >> 1) % dim, 1.0 - 2.0 * (numbers & 1)
