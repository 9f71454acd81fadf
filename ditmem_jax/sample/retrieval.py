"""What a bank finds for a prompt."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ditmem_jax.bank.search import Bank
from ditmem_jax.bank.table import Table
from ditmem_jax.config import Config
from ditmem_jax.data.references import References
from ditmem_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """Videos of the bank for one prompt, as its rows, and the score of each (None if the user named it).

    `note` says where they hardly fit.
    """

    videos: list[dict[str, Any]]
    scores: list[float | None]
    note: str = ""

    @functools.cached_property
    def latents(self) -> Float[np.ndarray, "R T H W C"]:
        """Raises UserError for a video without a record, or whose record is gone or altered."""
        return References.of(self.videos).latents()

    @property
    def checksums(self) -> list[str]:
        return [video["checksum"] for video in self.videos]


def retrieve(config: Config, prompt: str, ids: Sequence[str] | None = None) -> Retrieved:
    """Return the `config.data.references` videos of the bank nearest to `prompt`, or those with the given ids.

    The search is that of training (`bank.matches`), which then leaves out what would give a record away; but videos
    that share no word with the prompt are no match.

    Raises:
        UserError: if there is no bank, it is smaller than that, has no such id, or nothing in it matches.
    """
    if ids is not None:
        return Retrieved(Table.open(config.data.bank).by_id(ids).to_pylist(), [None] * len(ids))
    bank, count = Bank.open(config.data.bank), config.data.references
    found = bank.search_records([prompt], count)
    scores = found.scores[0].tolist()[: found.matched[0]]
    if not scores:
        raise UserError(
            "nothing in the bank resembles the prompt",
            expected=f"words of a caption in {config.data.bank}",
            found=repr(prompt),
            fix="--memory=none for a clip without memory, --memory=ID for videos by name, or another prompt",
        )
    note = ""
    if bank.unlike(prompt, found.rows[0][0]["caption"], scores[0]):
        note = f"nothing in the bank resembles the prompt: the best score is {scores[0]:.3f}"
    elif len(scores) < count:
        note = f"only {len(scores)} of {count} videos share a word with the prompt"
    return Retrieved(found.rows[0][: len(scores)], scores, note)
