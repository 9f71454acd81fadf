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

from ditmem_jax.errors import UserError

PAD, END = "<pad>", "</s>"


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

    @property
    def vocab(self) -> int:
        """One more than the largest token number: the rows that the embedding table needs at least."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def __call__(
        self, prompts: Sequence[str], *, allow_empty: bool = False
    ) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Token numbers (int32) and the mask of those that are not padding.

        A prompt that is too long loses its end, but keeps `</s>`.

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
            tokens = self._tokenizer.encode(text, add_special_tokens=False).ids[: self.length - 1]
            tokens = [*tokens, self.end]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

    def _special(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise UserError(
                f"{self.path} has no token {token}", expected="the tokenizer of a T5 text encoder"
            )
        return number


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
