"""The memory as a value."""

from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class Memory:
    """Memory rows for every self-attention of the transformer.

    `bias` is added to the attention logits of a row: the log of how many equal rows it stands for, plus the log
    of the strength; -inf for a row that is absent.
    """

    tokens: Float[Array, "B M D"]
    bias: Float[Array, "B M"]
