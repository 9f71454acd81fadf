"""The gain at fixed noise levels, under fixed noise, from the right memory and from another's."""

import functools
from collections.abc import Iterable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ditmem_jax.diffusion import objective
from ditmem_jax.evaluate.evaluator import Subject
from ditmem_jax.models.backbone import with_expert
from ditmem_jax.models.ditmem import encode, per_sample_mse
from ditmem_jax.models.state import Arrays
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.parallel import compilation
from ditmem_jax.parallel.mesh import replicated
from ditmem_jax.types import Batch, Memory


class Gain:
    """Measures `objective.gain` from memory: 1 - mean error with memory / mean error without it, at each noise level
    over all samples, and the mean over the levels.

    Each sample is also given another's memory, which should not help. Without memory nothing ever changes, so those
    errors are computed once. Noise levels are those of `run.validation_sigmas`, without those of an expert that does not
    train.
    """

    about: ClassVar[str] = (
        "gain: 1 - mean loss with memory / mean loss without, at each noise level; their mean over levels"
    )
    scores: ClassVar[tuple[str, ...]] = ("gain",)

    def __init__(self, subject: Subject):
        config, networks, mesh = subject.config, subject.networks, subject.mesh
        experts, self.backbone = config.experts, subject.backbone
        self.sigmas = tuple(filter(experts.trained_at, config.run.validation_sigmas))
        pairs = [(batch.right, batch.other) for batch in subject.held_out]
        keys = jax.random.split(jax.random.key(config.run.seed), len(pairs))
        self.batches = list(zip(pairs, keys, strict=True))
        levels = jnp.asarray(self.sigmas, jnp.float32)
        high = jnp.asarray([experts.is_high(sigma) for sigma in self.sigmas])

        def over_levels(backbone: Arrays, batch: Batch, key: jax.Array, memory: Memory | None) -> jax.Array:
            dit, size = networks.dit.merge(backbone), len(batch.latents)

            def at_level(level):
                sigma, high, key = level
                noise = jax.random.normal(key, batch.latents.shape)
                sigma = jnp.full((size,), sigma)

                def use(dit: DiT) -> jax.Array:
                    return per_sample_mse(dit, memory, batch, sigma, noise)

                return with_expert(dit, high, use)

            return jax.lax.map(at_level, (levels, high, jax.random.split(key, len(levels))))

        def with_memory(
            params: Arrays, rest: Arrays, backbone: Arrays, pair: tuple[Batch, Batch], key: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            encoder = networks.encoder.merge(params | rest)
            right, wrong = (over_levels(backbone, pair[0], key, encode(encoder, batch)) for batch in pair)
            return right, wrong, pair[1].present.any(axis=1)[None]

        pair, key = self.batches[0]
        with_memory = jax.jit(with_memory, out_shardings=replicated(mesh))
        self._with_memory = compilation.compile_for(with_memory, *subject.encoder, self.backbone, pair, key)
        without = jax.jit(functools.partial(over_levels, memory=None), out_shardings=replicated(mesh))
        self._without = compilation.compile_for(without, self.backbone, pair[0], key)

    @functools.cached_property
    def _errors_without(self) -> np.ndarray:
        return _gather(self._without(self.backbone, pair[0], key) for pair, key in self.batches)

    def __call__(self, params: Arrays, rest: Arrays) -> dict[str, float]:
        """Gains by name: "gain", the mean over the levels; "gain_wrong", the same with another's memory, over the
        samples that have another, and left out if none has; "gain_0.2", ... at each level.
        """
        found = [self._with_memory(params, rest, self.backbone, *pair) for pair in self.batches]
        right, wrong, has_other = map(_gather, zip(*found, strict=True))
        without, everyone = self._errors_without, np.ones(right.shape, bool)
        gains = {"gain": float(objective.gain(right, without, everyone))}
        if has_other.any():
            counted = np.broadcast_to(has_other > 0, wrong.shape)
            gains["gain_wrong"] = float(objective.gain(wrong, without, counted))
        levels, _ = objective.gain_by_level(right, without, everyone)
        return gains | {f"gain_{sigma:g}": float(x) for sigma, x in zip(self.sigmas, levels, strict=True)}

    def summary(self, numbers: Mapping[str, float]) -> str:
        """The gain, that of the worst level, and that from another's memory."""
        levels = {f"{sigma:g}": numbers[f"gain_{sigma:g}"] for sigma in self.sigmas}
        worst = min(levels, key=lambda sigma: levels[sigma])
        told = f"gain {numbers['gain']:+.2%}, worst level {worst}: {levels[worst]:+.2%}"
        if "gain_wrong" in numbers:
            told += f", with another's memory {numbers['gain_wrong']:+.2%}"
        return told


def _gather(values: Iterable[jax.Array]) -> np.ndarray:
    """The values of each sample of all batches, [levels, samples], in float64."""
    return np.concatenate([np.asarray(jax.device_get(x), np.float64) for x in values], axis=1)
