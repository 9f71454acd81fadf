"""The memory as a value."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Memory(NamedTuple):
    """Memory rows for every self-attention of the transformer.

    `bias` is added to the attention logits of a row: the log of how many equal rows it stands for, plus the log
    of the strength; -inf for a row that is absent.
    """

    tokens: Float[Array, "B M D"]
    bias: Float[Array, "B M"]
