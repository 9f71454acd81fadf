"""Memory tokens learned for each source, without videos: a control that shows what an encoder of videos adds.

Training finds for every source the tokens that serve its samples best; nothing carries over to a source that training
has not seen. The transformer normalises memory tokens, so their scale matters to the optimiser alone.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ditmem_jax.config import FreeTokensConfig
from ditmem_jax.errors import UserError, nearest
from ditmem_jax.types import Memory


class FreeTokens(nnx.Module):
    """A table of tokens [sources, M, D].

    Raises:
        UserError: without names of sources, which a run takes from its records.
    """

    def __init__(self, config: FreeTokensConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        if not config.sources:
            raise UserError(
                "memory.sources names no source",
                expected="a name for each source that has tokens",
                fix="train on records, whose references name them; or set memory.sources",
            )
        shape = len(config.sources), config.tokens, config.dim
        self.tokens = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        if config.strength is not None:
            self.log_strength = nnx.Param(jnp.full((), math.log(config.strength)))
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        latents: Float[Array, "B R T H W C"] | None = None,
        present: Bool[Array, "B R"] | None = None,
        source: Int[Array, " B"] | None = None,
        *,
        training: bool,
        rngs: nnx.Rngs | None = None,
    ) -> Memory:
        """The tokens of each sample's source; all else is not read.

        Args:
            source: places in `config.sources`.
        """
        if source is None:
            raise UserError(
                "free tokens are those of a source, and no source is given",
                expected="one of memory.sources for each sample",
            )
        tokens = self.tokens[...][source].astype(self.dtype)
        bias = jnp.zeros(tokens.shape[:2])
        if self.config.strength is not None:
            bias = bias + self.log_strength[...]
        return Memory(tokens, bias)


def source_numbers(config: FreeTokensConfig, names: list[str]) -> list[int]:
    """The places of `names` in `config.sources`.

    Raises:
        UserError: for a name that has no tokens.
    """
    places = {name: place for place, name in enumerate(config.sources)}
    if unknown := [name for name in names if name not in places]:
        raise UserError(
            f"no tokens were learned for the source {unknown[0]!r}",
            expected=f"one of memory.sources: {nearest(unknown[0], config.sources)}",
            fix="free tokens know no other source: other records or prompts, or an encoder of videos",
        )
    return [places[name] for name in names]
