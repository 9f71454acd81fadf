"""Law error: how far the physics that a clip shows is from that of its world, for records and trials of `worlds`.

The error of a constant is |ln(measured / true)|: 0.1 is about 10 %. Beside it stands that of a guess, always the middle
of the constant's range. A run measures it with the evaluator "law" while it trains; the demo scores its trials by the
same functions.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ditmem_jax.config import FreeTokensConfig
from ditmem_jax.data.record import Entry
from ditmem_jax.errors import UserError
from ditmem_jax.evaluate.evaluator import Subject
from ditmem_jax.models.placement import place_on
from ditmem_jax.models.state import Arrays
from ditmem_jax.parallel.mesh import all_gather_to_host
from ditmem_jax.sample.sampler import Sampler
from ditmem_jax.storage.weights import load_vae
from ditmem_jax.types import Batch
from ditmem_jax.worlds.laws import PHENOMENA, RANGES
from ditmem_jax.worlds.measure import LAWLESS_PX, measure


def told(video: np.ndarray, phenomenon: str) -> dict[str, float]:
    """The constants that a clip [T, H, W, 3] tells, by name; none where it strays from every such motion.

    A fall that never reaches the floor tells gravity, but no bounciness.
    """
    found = measure(video, phenomenon)
    if found.residual_px > LAWLESS_PX:
        return {}
    return {name: value for name, value in found.constants.items() if found.sigma[name] < np.inf}


def law_error(
    measured: Float[np.ndarray, " n"] | float, true: Float[np.ndarray, " n"] | float
) -> Float[np.ndarray, " n"] | float:
    """|ln(measured / true)|; NaN where nothing was measured."""
    return np.abs(np.log(measured / true))


def guess(constant: str) -> float:
    """The middle of a constant's range, linear or logarithmic as its worlds are drawn."""
    return RANGES[constant].at(0.5)


class LawError:
    """Measures the law error of clips that are made, as `sample` says, from the captions of held-out records: once
    without memory, and with the right memory and another's.

    The records are clips of worlds: their columns name the phenomenon and the true constants. The noise of a clip is
    always the same. A clip costs as much as two passes through the transformer for each of `sample.steps`, and all
    `run.validation_batches` are made.
    """

    about: ClassVar[str] = (
        "law: mean of |ln(measured / true)| over constants that clips tell; law_gain: 1 - with memory / without"
    )
    scores: ClassVar[tuple[str, ...]] = ("law_gain",)

    def __init__(self, subject: Subject):
        self._subject = subject
        if subject.config.experts.trains != "both":
            raise UserError(
                "the law error is of whole clips, and only one of two experts is loaded",
                expected="experts.trains 'both'",
                found=subject.config.experts.trains,
                fix="run.evaluators without 'law'",
            )
        entries = [entry for batch in subject.held_out for entry in batch.entries]
        true = [(name, value) for entry in entries for name, value in true_constants(entry).items()]
        self._true = np.array([value for _, value in true])
        self._guess = np.array([guess(name) for name, _ in true])
        self._sampler = make_sampler(subject)

    def __call__(self, params: Arrays, rest: Arrays) -> dict[str, float]:
        """Numbers by name: "law_told", the share of constants that clips with the right memory tell; "law_error", of
        those told with and without it, "law_gain" and "law_guess", the error of always naming the middle of the range;
        "law_gain_wrong", from another's memory, of those told with and without that.
        """
        sampler = self._sampler.with_encoder(self._subject.networks.encoder.merge(params | rest))
        right, wrong = (
            self._errors(sampler, [getattr(batch, given) for batch in self._subject.held_out])
            for given in ("right", "other")
        )
        numbers, without = {"law_told": float(np.isfinite(right).mean())}, self._without
        if (both := np.isfinite(right + without)).any():
            numbers["law_error"] = float(right[both].mean())
            numbers["law_gain"] = 1 - numbers["law_error"] / float(without[both].mean())
            numbers["law_guess"] = float(np.asarray(law_error(self._guess, self._true))[both].mean())
        if (both := np.isfinite(wrong + without)).any():
            numbers["law_gain_wrong"] = 1 - float(wrong[both].mean() / without[both].mean())
        return numbers

    def summary(self, numbers: Mapping[str, float]) -> str:
        """The law error with memory, the gain from it and from another's, and how much could be measured."""
        text = f"{numbers['law_told']:.0%} of the constants told"
        if "law_gain" in numbers:
            text = f"{numbers['law_error']:.3f}, a guess's {numbers['law_guess']:.3f}, {text}, gain {numbers['law_gain']:+.2%}"
        if "law_gain_wrong" in numbers:
            text += f", with another's memory {numbers['law_gain_wrong']:+.2%}"
        return f"law error {text}"

    @functools.cached_property
    def _without(self) -> np.ndarray:
        return self._errors(self._sampler, [None] * len(self._subject.held_out))

    def _errors(self, sampler: Sampler, given: Sequence[Batch | None]) -> np.ndarray:
        """Errors of all constants of all held-out records, in clips with the memory of these batches; NaN where the
        clip does not tell the constant, or has no memory in such a batch.
        """
        measured, seed = [], self._subject.config.sample.seed
        for batch, memory in zip(self._subject.held_out, given, strict=True):
            entries, present = batch.entries, itertools.repeat(True)
            if memory is not None:
                present = all_gather_to_host(memory.present, self._subject.mesh).any(axis=1)
            captions, seeds = [entry.caption for entry in entries], range(seed, seed + len(entries))
            clips = sampler.generate(captions, seeds, **self._reads(memory))
            seed += len(entries)
            for entry, clip, counts in zip(entries, clips, present, strict=False):
                found = told(clip, entry.extra["phenomenon"]) if counts else {}
                measured += [found.get(name, np.nan) for name in true_constants(entry)]
        return np.asarray(law_error(np.array(measured), self._true))

    def _reads(self, batch: Batch | None) -> dict[str, Any]:
        """The arguments of a sampler for the memory of a batch."""
        memory, mesh = self._subject.config.memory, self._subject.mesh
        if batch is None:
            return {}
        if isinstance(memory, FreeTokensConfig):
            return {"sources": [memory.sources[number] for number in all_gather_to_host(batch.source, mesh)]}
        return {"references": np.asarray(all_gather_to_host(batch.references, mesh), np.float32)}


def true_constants(entry: Entry) -> dict[str, float]:
    """The constants that a record of a world's clip shows, by name, as its columns say.

    Raises:
        UserError: for a record without such columns.
    """
    phenomenon = entry.extra.get("phenomenon", "")
    try:
        return {name: float(entry.extra[name]) for name in PHENOMENA[phenomenon]}
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the held-out record {entry.id!r} tells no law",
            expected="columns phenomenon and its constants, as `ditmem worlds` writes them",
            found=entry.extra,
            fix="run.evaluators without 'law', or data.validation of such records",
        ) from error


def make_sampler(subject: Subject) -> Sampler:
    """The sampler of clips from the captions of held-out records, with the transformer that a run has loaded."""
    config, mesh, texts = subject.config, subject.mesh, {}
    for batch in subject.held_out:
        embeddings = all_gather_to_host(batch.right.conditioning.text, mesh)
        texts |= {entry.caption: text for entry, text in zip(batch.entries, embeddings, strict=True)}
    negative = config.sample.negative_prompt
    texts[negative] = np.zeros_like(next(iter(texts.values())))
    found = subject.records.prompt(negative)
    texts[negative][: len(found)] = found
    texts = {text: jnp.asarray(embedding) for text, embedding in texts.items()}
    vae = load_vae(config, place_on(mesh, "vae"))
    return Sampler(config, subject.networks.dit.merge(subject.backbone), vae, texts, mesh=mesh)
