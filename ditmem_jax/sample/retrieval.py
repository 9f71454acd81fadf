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


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """Videos of the bank for one prompt, as its rows, and the score of each (None if the user named it)."""

    videos: list[dict[str, Any]]
    scores: list[float | None]

    @functools.cached_property
    def latents(self) -> Float[np.ndarray, "R T H W C"]:
        """Raises UserError for a video without a record, or whose record is gone or altered."""
        return References.of(self.videos).latents()

    @property
    def checksums(self) -> list[str]:
        return [video["checksum"] for video in self.videos]


def retrieve(config: Config, prompt: str, ids: Sequence[str] | None = None) -> Retrieved:
    """Return the `config.data.references` videos of the bank nearest to `prompt`, or those with the given ids.

    The search is that of training (`bank.matches`), which then leaves out what would give a record away.

    Raises:
        UserError: if there is no bank, it is smaller than that, or has no such id.
    """
    if ids is None:
        found = Bank.open(config.data.bank).search_records([prompt], config.data.references)
        return Retrieved(found.rows[0], found.scores[0].tolist())
    return Retrieved(Table.open(config.data.bank).by_id(ids).to_pylist(), [None] * len(ids))
