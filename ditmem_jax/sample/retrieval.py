"""Retrieval: the videos that a bank finds for a prompt."""

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
from ditmem_jax.errors import warn
from ditmem_jax.parallel import processes


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
        return search(config, [prompt])[0]
    return Retrieved(Table.open(config.data.bank).by_id(ids).to_pylist(), [None] * len(ids))


def search(config: Config, prompts: Sequence[str]) -> list[Retrieved]:
    """Return for each prompt the videos of the bank nearest to it; errors as `retrieve`.

    Those that do not match it (`Results.matched`) or score below `config.sample.min_score` are left out. A prompt that
    none of them resembles is warned of.
    """
    bank = Bank.open(config.data.bank)
    found = bank.search_records(prompts, config.data.references)
    retrieved = []
    for prompt, rows, scores, matched in zip(
        prompts, found.rows, found.scores.tolist(), found.matched, strict=True
    ):
        kept = sum(score >= config.sample.min_score for score in scores[:matched])  # best first
        retrieved.append(Retrieved(rows[:kept], scores[:kept]))
        best = rows[0]["caption"]
        if processes.is_primary() and (not kept or bank.unlike(prompt, best, scores[0])):
            warn(
                f"no video of the bank {config.data.bank} resembles the prompt {prompt!r}"
                + ("" if kept else "; it gets no memory"),
                expected=bank.likeness
                if kept or not matched
                else f"a score of {config.sample.min_score} or more",
                found=f"a score of {scores[0]:.3f} for {best!r}" if matched else "no word in common",
                fix="a prompt in the words of the bank's captions, videos of it in the bank, or --memory=none",
            )
    return retrieved
