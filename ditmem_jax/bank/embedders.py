"""Texts to unit vectors, by the name of what makes them.

    lexical                                         word counts of the bank's own captions; no download
    sentence-transformers:NAME_OR_FOLDER[@REVISION] any model of that library (extra `retrieval`)
    vectors[:NAME]                                  vectors that were made elsewhere, perhaps under a name

For real banks `RECOMMENDED` is the one to take: 768 numbers, up to 8,192 tokens, no code of its own. It is the default
where sentence-transformers is installed and the model is in its cache; nothing is downloaded unless it is named.

A bank stores what `describe` says. Vectors of two embedders are comparable only if their descriptions are equal.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from ditmem_jax.bank.lexical import LexicalEmbedder
from ditmem_jax.errors import UserError

OWN_CODE = "sentence_transformers."  # parts of a model that are of the library itself
# Names of the prefix for documents. The library looks for "document" and stops there, even if that one is empty.
DOCUMENT_PROMPTS = ("document", "passage", "corpus")


RECOMMENDED = "sentence-transformers:Alibaba-NLP/gte-modernbert-base"


def default_embedder() -> str:
    """The name of the best embedder that is at hand, which is said where a better one could be."""
    try:
        import huggingface_hub
        import sentence_transformers  # noqa: F401
    except ImportError:
        return "lexical"
    if isinstance(huggingface_hub.try_to_load_from_cache(RECOMMENDED.split(":")[1], "modules.json"), str):
        return RECOMMENDED
    print(
        f"note: captions are found by words; by meaning with --embedder={RECOMMENDED}, which downloads a model"
    )
    return "lexical"


@runtime_checkable  # the tests check types
class Embedder(Protocol):
    """Texts to vectors of length 1 (zero for a text without words), those to be found and those that find."""

    dim: int

    def documents(self, texts: Sequence[str]) -> Float32[np.ndarray, "n D"]: ...

    def queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "n D"]: ...

    def describe(self) -> dict[str, Any]:
        """JSON values: `kind`, `name`, `revision`, `normalised`, `dim`, ...; equal where vectors are comparable."""


def make_embedder(name: str, captions: Iterable[str], dim: int | None = None) -> Embedder:
    """The embedder of a new bank.

    Args:
        captions: of the bank, which the lexical one counts words of; the others do not read them.
        dim: of the vectors that were made elsewhere.
    Raises:
        UserError: for an unknown name, a package or model that is missing, or a model that needs code of its own.
    """
    kind, _, rest = name.partition(":")
    if name == "lexical":
        return LexicalEmbedder.fit(captions)
    if kind == "sentence-transformers" and rest:
        return SentenceTransformerEmbedder.load(rest)
    if kind == "vectors":
        if dim is None:
            raise UserError(f"embedder {name!r} needs vectors", fix="give them, or another embedder")
        return GivenVectors(_describe("vectors", rest, "", dim))
    raise UserError(
        f"unknown embedder {name!r}",
        expected="lexical, sentence-transformers:NAME_OR_FOLDER[@REVISION] or vectors[:NAME]",
    )


def load_embedder(
    description: Mapping[str, Any], words: Mapping[str, int] | None = None, *, embeds: bool = True
) -> Embedder:
    """The embedder that `describe` told of.

    Args:
        words: `frequency` of a lexical embedder, which a bank stores beside the description.
        embeds: False saves loading a model for vectors that it has already made.
    Raises:
        UserError: if it cannot be had, or is not any more what it was.
    """
    kind = description.get("kind")
    if kind == "lexical":
        made = LexicalEmbedder(
            description["captions"], words or {}, description["dim"], float(description["power"])
        )
    elif kind == "sentence-transformers" and embeds:
        made = SentenceTransformerEmbedder.load(description["name"], description["revision"])
    elif kind in ("sentence-transformers", "vectors"):
        made = GivenVectors(description)
    else:
        raise UserError(
            f"the bank was made with an embedder of kind {kind!r}",
            expected="lexical, sentence-transformers or vectors",
            fix="a newer version of ditmem_jax",
        )
    if made.describe() != dict(description):
        raise UserError(
            f"embedder {description['name']!r} is not the one that the bank was built with",
            expected=json.dumps(dict(description)),
            found=json.dumps(made.describe()),
            fix="the model as it was then, or build the bank again",
        )
    return made


class GivenVectors:
    """Vectors that were made elsewhere; there is nothing here that could make more of them from text."""

    def __init__(self, description: Mapping[str, Any]):
        self.dim, self._description = description["dim"], dict(description)

    def documents(self, texts: Sequence[str]) -> Float32[np.ndarray, "n D"]:
        raise UserError(
            "this bank's vectors were made elsewhere: it cannot embed text",
            found=texts[0][:80] if texts else None,
            fix=f"search with a vector of {self.dim} numbers, or build the bank with an embedder",
        )

    queries = documents

    def describe(self) -> dict[str, Any]:
        return self._description


class SentenceTransformerEmbedder:
    """A model of sentence-transformers, with the pooling and the prefixes that its own files name.

    Texts beyond the model's length are cut there, as the model's files say.

    Args:
        model: a `SentenceTransformer`.
        revision: of its files, a hub's commit or a digest.
    """

    def __init__(self, model: Any, name: str, revision: str):
        self._model, self._name, self._revision = model, name, revision
        self.dim = model.get_embedding_dimension()
        self._prompt = next((p for p in DOCUMENT_PROMPTS if model.prompts.get(p)), DOCUMENT_PROMPTS[0])

    @classmethod
    def load(cls, name: str, revision: str | None = None) -> "SentenceTransformerEmbedder":
        """The model in a folder, or of a hub under NAME or NAME@REVISION (in its cache, or downloaded).

        Raises:
            UserError: if the package or the model is missing, the model brings code of its own, which is never run,
                or a folder is not of the revision that is wanted.
        """
        try:
            import huggingface_hub
            import sentence_transformers
        except ImportError as error:
            raise UserError(
                "sentence-transformers is not installed", fix="pip install 'ditmem_jax[retrieval]'"
            ) from error
        folder, commit = Path(name).expanduser(), None
        try:
            if folder.is_dir():
                name, modules = str(folder.resolve()), folder / "modules.json"
                found = _digest(folder)
            else:
                name, _, at = name.partition("@")
                revision = revision or at or None
                modules = Path(huggingface_hub.hf_hub_download(name, "modules.json", revision=revision))
                found = commit = modules.parent.name  # the cache has a folder for each commit
            for part in json.loads(modules.read_text(encoding="utf-8")):
                if not part["type"].startswith(OWN_CODE):
                    raise ValueError(f"it needs code of its own, which is never run: {part['type']}")
            model = sentence_transformers.SentenceTransformer(
                name, revision=commit, local_files_only=commit is None, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            raise UserError(
                f"cannot load the sentence-transformers model {name}",
                expected="a folder or a name of a hub with modules.json, weights, and no code of its own",
                found=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            ) from error
        if commit is None and revision not in (None, found):
            raise UserError(
                f"the files of the model in {name} are not those that the bank was built with",
                expected=f"digest {revision}",
                found=f"digest {found}",
                fix="the model as it was then, or build the bank again",
            )
        return cls(model, name, found)

    def documents(self, texts: Sequence[str]) -> Float32[np.ndarray, "n D"]:
        return self._units(texts, partial(self._model.encode_document, prompt_name=self._prompt))

    def queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "n D"]:
        return self._units(texts, self._model.encode_query)

    def _units(self, texts: Sequence[str], encode: Callable[..., np.ndarray]) -> Float32[np.ndarray, "n D"]:
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        vectors = encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        empty = np.array([not text.strip() for text in texts])
        return np.where(empty[:, None], 0, vectors).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return _describe("sentence-transformers", self._name, self._revision, self.dim)


def _describe(kind: str, name: str, revision: str, dim: int) -> dict[str, Any]:
    return {"kind": kind, "name": name, "revision": revision, "normalised": True, "dim": dim}


def _digest(folder: Path) -> str:
    """Of the names and bytes of all files in a folder but hidden ones, so that an altered model is another one."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if not name.startswith(".") and "/." not in name:
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
