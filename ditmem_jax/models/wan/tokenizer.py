"""Prompts to token numbers, with the `tokenizer.json` of the text encoder."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from ditmem_jax.errors import UserError, nearest, warn
from ditmem_jax.parallel import processes

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def clean(text: str) -> str:
    """Clean a prompt as Wan's own programs do: mended by ftfy, HTML entities decoded twice, white space collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """A Hugging Face tokenizer that gives `length` tokens per prompt, the final `</s>` and padding included.

    Raises:
        UserError: for a file that is missing or is no tokenizer with the tokens `<pad>` and `</s>`.
    """

    def __init__(self, path: str | Path, length: int):
        text = _read(Path(path))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no other kind
            raise _damaged(Path(path), error) from error
        self._tokenizer.no_truncation()  # the file may ask for either
        self._tokenizer.no_padding()
        self.path, self.length = Path(path), length
        self.pad, self.end = self._special(PAD), self._special(END)
        self.unknown = self._tokenizer.token_to_id(UNKNOWN)
        self._told: set[str] = set()

    @property
    def vocab(self) -> int:
        """One more than the largest token number: the rows that the embedding table needs at least."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def __call__(
        self, prompts: Sequence[str], *, allow_empty: bool = False
    ) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Token numbers (int32) and the mask of those that are not padding.

        A prompt that is too long loses its end, but keeps `</s>`. That, and words that the tokeniser does not know, are
        warned of.

        Args:
            allow_empty: accept prompts without any text, as negative prompts may be.
        Raises:
            UserError: for a prompt that is empty after cleaning, unless allowed.
        """
        ids = np.full((len(prompts), self.length), self.pad, np.int32)
        mask = np.zeros((len(prompts), self.length), bool)
        for row, prompt in enumerate(prompts):
            text = clean(prompt)
            if not text and not allow_empty:
                raise UserError("a prompt is empty", expected="some text", found=repr(prompt))
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            if processes.is_primary():
                self._warn(text, encoding)
            tokens = [*encoding.ids[: self.length - 1], self.end]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

    def _warn(self, text: str, encoding: tokenizers.Encoding) -> None:
        """Says once what of a text the encoder does not read, or not as it is written."""
        if len(encoding) >= self.length and text not in self._told:
            end = encoding.offsets[self.length - 2][1] if self.length > 1 else 0
            self._told.add(text)
            warn(
                f"a prompt is longer than the text encoder reads: {_short(text)}",
                expected=f"up to {self.length - 1} tokens (dit.text_len, with its end)",
                found=f"{len(encoding)}; what is lost begins with {_short(text[end:].strip())}",
                fix="a shorter prompt, with what matters first",
            )
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        words = [text[start:end] for number, (start, end) in pairs if number == self.unknown]
        if words := [word for word in dict.fromkeys(words) if word not in self._told]:
            self._told.update(words)
            vocabulary = self._tokenizer.get_vocab()
            near = (f"{word!r}: {nearest(word, vocabulary, 3)}" for word in words[:3])
            warn(
                f"the text encoder does not know {', '.join(map(repr, words[:8]))} of {_short(text)}",
                expected="words of its vocabulary"
                + (f", such as for {'; for '.join(near)}" if len(vocabulary) < 10_000 else ""),
                fix="other words: to the model those that it does not know are all alike",
            )

    def _special(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise UserError(
                f"{self.path} has no token {token}", expected="the tokenizer of a T5 text encoder"
            )
        return number


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _read(path: Path) -> str:
    """The text of a tokenizer.json, checked as far as the library would fail without saying which file."""
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}", expected="the tokenizer.json of the text encoder")
    try:
        text = path.read_text(encoding="utf-8")
        model = json.loads(text)["model"]
        model["vocab"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error
    return text


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is not a tokenizer",
        expected="a JSON file that holds a model with a vocabulary",
        found=f"{type(error).__name__}: {str(error)[:200]}",
        fix="download tokenizer.json once more",
    )
