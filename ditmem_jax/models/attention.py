"""Attention with an optional memory.

Memory rows are keys and values beside the video's own; they never query. Softmax over the union of two sets of
keys is done without joining the sets: with scores a over video keys and b over memory keys and one common
maximum m,

    out = (exp(a - m) V + exp(b - m) V_mem) / (sum exp(a - m) + sum exp(b - m)).

A bias per memory row is added to b. A row that stands for n equal rows has bias log n, since n equal terms
exp(b - m) sum to exp(b + log n - m); an absent row has bias -inf and contributes exactly nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention(
    query: Float[Array, "B S N K"],
    key: Float[Array, "B J N K"],
    value: Float[Array, "B J N K"],
    memory_key: Float[Array, "B M N K"] | None = None,
    memory_value: Float[Array, "B M N K"] | None = None,
    memory_bias: Float[Array, "B M"] | None = None,
) -> Float[Array, "B S N K"]:
    """Scaled dot-product attention over video keys and, if given, memory rows with their bias.

    Scores and softmax are float32; the products take the dtype of the inputs.
    """
    scale = query.shape[-1] ** -0.5
    scores = [_scores(query, key) * scale]
    values = [value]
    if memory_key is not None:
        scores.append(_scores(query, memory_key) * scale + memory_bias.astype(jnp.float32)[:, None, None, :])
        values.append(memory_value)
    top = jax.lax.stop_gradient(jnp.max(jnp.stack([s.max(-1) for s in scores if s.shape[-1]]), axis=0))
    weights = [jnp.exp(s - top[..., None]) for s in scores]
    total = sum(w.sum(-1) for w in weights)
    out = sum(
        jnp.einsum("BNSJ,BJNK->BSNK", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, v in zip(weights, values, strict=True)
    )
    return (out / total.transpose(0, 2, 1)[..., None]).astype(query.dtype)


def _scores(query: Float[Array, "B S N K"], key: Float[Array, "B J N K"]) -> Float[Array, "B N S J"]:
    return jnp.einsum("BSNK,BJNK->BNSJ", query, key, preferred_element_type=jnp.float32)
