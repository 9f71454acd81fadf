"""What a memory is worth: errors at fixed noise levels under fixed noise, with and without it."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditmem_jax.config import ExpertsConfig
from ditmem_jax.models.backbone import with_expert
from ditmem_jax.models.ditmem import Networks, encode, per_sample_mse
from ditmem_jax.models.state import Arrays
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.parallel import compilation
from ditmem_jax.parallel.mesh import replicated
from ditmem_jax.types import Batch, Memory


class Validator:
    """Measures the gain of a memory on fixed batches: 1 - error with memory / error without.

    Each sample is also given the memory of the sample before it in its batch, which should not help. Without
    memory nothing ever changes, so those errors are computed once.

    Args:
        encoder: layouts of what the encoder trains and of the rest of it.
        sigmas: noise levels; those of an expert that does not train are left out.
        batches: on the devices of `mesh`.
    """

    def __init__(
        self,
        networks: Networks,
        backbone: Arrays,
        encoder: tuple[Arrays, Arrays],
        batches: list[Batch],
        sigmas: tuple[float, ...],
        experts: ExpertsConfig,
        seed: int,
        mesh: Mesh,
    ):
        self.sigmas, self.backbone = tuple(filter(experts.trained_at, sigmas)), backbone
        self.batches = list(zip(batches, jax.random.split(jax.random.key(seed), len(batches)), strict=True))
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

        def with_memory(params: Arrays, rest: Arrays, backbone: Arrays, batch: Batch, key: jax.Array):
            memory = encode(networks.encoder.merge(params | rest), batch)
            others = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), memory)
            return over_levels(backbone, batch, key, memory), over_levels(backbone, batch, key, others)

        with_memory = jax.jit(with_memory, out_shardings=replicated(mesh))
        self._with_memory = compilation.compile_for(with_memory, *encoder, backbone, *self.batches[0])
        without = jax.jit(functools.partial(over_levels, memory=None), out_shardings=replicated(mesh))
        self._without = compilation.compile_for(without, backbone, *self.batches[0])

    @functools.cached_property
    def _errors_without(self) -> np.ndarray:
        return _gather(self._without(self.backbone, *pair) for pair in self.batches)

    def __call__(self, params: Arrays, rest: Arrays) -> dict[str, float]:
        """Gains by name: "gain" over all samples and levels, "gain_wrong" with another's memory, "gain_0.2", ..."""
        pairs = [self._with_memory(params, rest, self.backbone, *pair) for pair in self.batches]
        right, wrong = (1 - _gather(found) / self._errors_without for found in zip(*pairs, strict=True))
        gains = {"gain": right, "gain_wrong": wrong}
        gains |= {f"gain_{sigma:g}": level for sigma, level in zip(self.sigmas, right, strict=True)}
        return {name: float(values.mean()) for name, values in gains.items()}


def _gather(errors: Iterable[jax.Array]) -> np.ndarray:
    """Errors of all batches, [levels, samples], in float64."""
    return np.concatenate([np.asarray(jax.device_get(x), np.float64) for x in errors], axis=1)
