"""Captions by the words that they share, rare ones above all, without any download: search and vectors.

`WordIndex` finds: BM25 (by bm25s), its weights of words to the power `POWER`. The plain weights, the logarithm of rarity,
let half a dozen shared everyday words outweigh one shared name: with 16 worlds, each in two clips of each of six
phenomena, 19 % of the five captions nearest to each name its planet; with squares 63 %, with fourth powers 95 %, with
sixth powers all.

`LexicalEmbedder` makes vectors of the same words for what wants vectors: near duplicates, maps, exports. A word that
stands in df of n captions weighs log((n + 1) / (df + 1/2)) squared, in each of two texts that are compared. The commonest
words have a place of a vector of their own. The direction of any other is drawn from its hash: +-1 in `BUCKETS` of the
other places, orthogonal to those of other words but for chance overlaps, so a new word needs neither a new fit nor longer
vectors.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Let imports of a module fail in the block."""
    modules: dict[str, Any] = sys.modules
    there = modules.get(name)
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]
        if there is not None:
            modules[name] = there


with _hidden("jax.lax"):  # else bm25s starts JAX on all accelerators when it is imported
    import bm25s

BUCKETS = 8
SATURATION = 0.5  # BM25's k1: a caption that says a word twice is hardly more about it
POWER = 6
VERSION = 2  # of how vectors are made
HAN = "\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Other scripts whose words stand without spaces: hiragana, katakana; Thai, Lao, Tibetan, Burmese, Khmer; and Hangul, whose
# words carry their particles. Between two scripts a word ends.
SPACELESS = (
    HAN,
    "\u3040-\u309f",
    "\u30a0-\u30ff\u31f0-\u31ff",
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff",
    "\u1100-\u11ff\uac00-\ud7af",
)
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")  # a number or a word; marks say nothing


def words(text: str) -> list[str]:
    """The words and numbers of a text, normalised (NFKC), in lower case and without accents.

    Scripts without spaces give the pairs of neighbouring letters, and Han single ones as well.
    """
    if text.isascii():
        return _WORD.findall(text.lower())
    found = []
    for word in _any_word().findall(_without_accents(unicodedata.normalize("NFKC", text).casefold())):
        for run in _runs().findall(word):
            found += _pairs(run) if _spaceless().match(run) else [run]
    return found


def _without_accents(text: str) -> str:
    """Drop the marks above and below letters, and the points of Hebrew and Arabic, which many leave out.

    Vowel signs of Indic scripts and Thai, and what tells kana apart, are of other combining classes, and stay.
    """
    plain = (x for x in unicodedata.normalize("NFKD", text) if not _is_accent(unicodedata.combining(x)))
    return unicodedata.normalize("NFKC", "".join(plain))


def _is_accent(combining: int) -> bool:
    return combining >= 200 or 10 <= combining <= 36


@functools.cache
def _marks() -> str:
    """The signs that combine with a letter, such as vowels of Hindi and Thai, as ranges of a regular expression."""
    codes = [i for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)).startswith("M")]
    starts = [i for i in codes if unicodedata.category(chr(i - 1))[0] != "M"]
    ends = [i for i in codes if i == sys.maxunicode or unicodedata.category(chr(i + 1))[0] != "M"]
    return "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(starts, ends, strict=True))


@functools.cache
def _any_word() -> re.Pattern:
    return re.compile(rf"\d+(?:\.\d+)?|[^\W\d_](?:[^\W\d_]|[{_marks()}])*")


@functools.cache
def _runs() -> re.Pattern:
    kinds = "|".join(f"[{script}][{script}{_marks()}]*" for script in SPACELESS)
    return re.compile(rf"{kinds}|[^{''.join(SPACELESS)}]+")


@functools.cache
def _spaceless() -> re.Pattern:
    return re.compile(f"[{''.join(SPACELESS)}]")


@functools.cache
def _letters() -> re.Pattern:
    return re.compile(rf".[{_marks()}]*", re.DOTALL)


def _pairs(run: str) -> list[str]:
    """The pairs of letters of a run in one script, and single Han ones; a letter with its marks counts as one."""
    letters = _letters().findall(run)
    pairs = ["".join(letters[i : i + 2]) for i in range(len(letters) - 1)]
    return pairs + (letters if len(letters) == 1 or re.match(f"[{HAN}]", run) else [])


class WordIndex:
    """Captions to be found by words: BM25 with the weights of words to the power `POWER`.

    A score is the share of the query's weight that a caption of mean length has in common with it: 0 if they share
    no word, about 1 if they share all. Words that no caption has weigh as the rarest.
    """

    def __init__(self, captions: Sequence[str]):
        self._count = len(captions)
        self._index = bm25s.BM25(k1=SATURATION, method="lucene", backend="numpy")
        tokens = [words(caption) for caption in captions]
        self._known: dict[str, int] = {}
        if not any(tokens):
            return
        self._index.index(tokens, show_progress=False)
        self._known, scores = self._index.vocab_dict, self._index.scores
        frequency = np.diff(scores["indptr"])  # by word: there is a column for each
        self._weights = self._rarity(frequency) ** POWER
        further = self._rarity(frequency) ** (POWER - 1)
        scores["data"] = scores["data"] * np.repeat(further, frequency).astype(np.float32)

    def scores(self, query: str) -> Float64[np.ndarray, " N"]:
        """Of each caption."""
        asked = set(words(query))
        known = sorted(asked & self._known.keys())
        if not known:
            return np.zeros(self._count)
        unknown = (len(asked) - len(known)) * self._rarity(np.zeros(1))[0] ** POWER
        total = self._weights[[self._known[word] for word in known]].sum() + unknown
        return self._index.get_scores(known).astype(np.float64) * (1 + SATURATION) / total

    def shared(self, query: str, caption: str) -> float:
        """Share of the plain weight of a text's words that stand in a caption."""
        asked = sorted(set(words(query)))
        frequency = np.diff(self._index.scores["indptr"]) if self._known else np.zeros(0)
        counts = np.array([frequency[self._known[word]] if word in self._known else 0 for word in asked])
        weights, there = self._rarity(counts), np.isin(asked, words(caption))
        return float(weights[there].sum() / weights.sum())

    def _rarity(self, frequency: np.ndarray) -> np.ndarray:
        """Lucene's weight of words by how many captions they stand in."""
        return np.log(1 + (self._count - frequency + 0.5) / (frequency + 0.5))


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
        counts = Counter(word for found in sets for word in found)
        return cls(len(sets), dict(sorted(counts.items())), dim, power)

    @functools.cached_property
    def _own(self) -> dict[str, int]:
        """The places of the commonest words, in half of a vector at most."""
        common = sorted(self.frequency, key=lambda word: (-self.frequency[word], word))[: self.dim // 2]
        return {word: place for place, word in enumerate(common)}

    def documents(self, texts: Sequence[str]) -> Float32[np.ndarray, "n D"]:
        """One vector of length 1 per text; zero for a text without words."""
        vectors = np.zeros((len(texts), self.dim))
        for vector, text in zip(vectors, texts, strict=True):
            for word, count in sorted(Counter(words(text)).items()):  # one order, one rounding
                weight = self._weight(word) * (1 + math.log(count))
                if word in self._own:
                    vector[self._own[word]] += weight * math.sqrt(BUCKETS)  # as long as the others
                    continue
                places, signs = _direction(word, self.dim - len(self._own))
                np.add.at(vector, places + len(self._own), signs * weight)
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
            "version": VERSION,
        }

    def _weight(self, word: str) -> float:
        return math.log((self.captions + 1) / (self.frequency.get(word, 0) + 0.5)) ** self.power


@functools.lru_cache(maxsize=1 << 16)
def _direction(word: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and signs of a word, the same on every machine (Python's own hash differs from run to run)."""
    digest = hashlib.blake2b(word.encode(), digest_size=4 * BUCKETS).digest()
    numbers = np.frombuffer(digest, "<u4").astype(np.int64)
    return (numbers >> 1) % dim, 1.0 - 2.0 * (numbers & 1)
