"""Attention with an optional memory, on one device or many.

Memory rows are keys and values beside the video's own; they never query. A bias per row is added to its score. A
row that stands for n equal rows has bias log n, since n equal terms exp(b) sum to exp(b + log n); an absent row has
bias -inf and contributes exactly nothing.

The two sets of keys are never joined. With scores a over video keys and b over memory keys, a kernel gives

    out_a = sum exp(a - lse_a) V,   lse_a = log sum exp(a),

the few memory rows are a small product, and the softmax over the union is

    lse = log(exp(lse_a) + sum exp(b)),   out = exp(lse_a - lse) out_a + sum exp(b - lse) V_mem.

Backwards, one weight P = exp(a - lse) of the union has, like any softmax, the gradient

    dS = P (dP - D),   dP = grad . v,   D = sum over the union of P dP = grad . out.

Only `lse` and D know of the other keys. So a kernel whose backward pass is handed `lse` and `out` of the union in
place of its own gives the exact gradients of its keys, and their share of the query's; the memory's are the same
formula written out, and that of the bias is dS summed. (To differentiate the merge instead is the same: out_a gets
the gradient w grad with w = exp(lse_a - lse), and lse_a gets w (grad . out_a - grad . out). As the kernel adds
to dS its weight times the gradient of its lse, with P_a = P / w that is P_a (w dP - w grad . out_a + w grad . out_a
- w grad . out) = P (dP - D).)

Nor need the video's keys be in one place. Where tokens are divided over the mesh axis `context`, keys and values go
round a ring of devices while each attends with its own queries to those that it holds: the same merge forwards, and
backwards every device adds the share of its queries to gradients that travel with the keys. A ring takes any number
of heads, 12 and 40 among them, where exchanging tokens for heads (all-to-all) needs a multiple of the ring's length,
and what a device sends is on the way while it computes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ditmem_jax.models.attention import ring as rings
from ditmem_jax.models.attention.kernels import KERNELS, Kernel, Rows, mean_gradient
from ditmem_jax.types import Backend

SMALL = 2**22  # so many scores, 16 MiB of them, are computed at once
KEPT = (
    "attention"  # name of what the backward pass needs beside its inputs, for policies of rematerialisation
)


def attention(
    query: Float[Array, "B S N K"],
    key: Float[Array, "B J N K"],
    value: Float[Array, "B J N K"],
    memory_key: Float[Array, "B M N K"] | None = None,
    memory_value: Float[Array, "B M N K"] | None = None,
    memory_bias: Float[Array, "B M"] | None = None,
    *,
    backend: Backend = "xla",
    ring: bool = False,
) -> Float[Array, "B S N K"]:
    """Scaled dot-product attention over video keys and, if given, memory rows with their bias.

    Scores and softmax are float32; the products take the dtype of the inputs. Under `jax.set_mesh` every device
    computes its own samples, heads and queries.

    Args:
        backend: the kernel, see `kernels`. Without video keys there is nothing for it to do; and "xla" computes few
            scores at once.
        ring: the keys are those of the querying tokens, and divided over the mesh axis `context` as these are.
            Otherwise, and those of the memory always, every device of that axis has them all.
    Raises:
        UserError: for tokens that do not divide over `context`.
    """
    rows = None if memory_key is None or memory_key.shape[1] == 0 else (memory_key, memory_value, memory_bias)
    if key.shape[1] == 0:
        return _at_once(query, key, value, rows)
    layout = rings.layout_for(query, ring)
    few = query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1] <= SMALL
    whole = layout is None or layout.mesh.shape[rings.AXIS] == 1
    if backend == "xla" and few and whole:
        return _at_once(query, key, value, rows)
    return _with_kernel(backend, layout, query, key, value, rows)


def _at_once(query: Array, key: Array, value: Array, rows: Rows) -> Array:
    """With all scores in full, differentiated as it stands."""
    scores, values = [_scores(query, key)], [value]
    if rows is not None:
        scores.append(_memory_scores(query, rows))
        values.append(rows[1])
    top = jax.lax.stop_gradient(jnp.max(jnp.stack([s.max(-1) for s in scores if s.shape[-1]]), axis=0))
    weights = [jnp.exp(s - top[..., None]) for s in scores]
    total = sum(w.sum(-1) for w in weights)
    out = sum(_weighted(w, v) for w, v in zip(weights, values, strict=True))
    return (out / rings.per_query(total)).astype(query.dtype)


def _scores(query: Float[Array, "B S N K"], key: Float[Array, "B J N K"]) -> Float[Array, "B N S J"]:
    scale = query.shape[-1] ** -0.5
    return jnp.einsum("BSNK,BJNK->BNSJ", query, key, preferred_element_type=jnp.float32) * scale


def _memory_scores(
    query: Float[Array, "B S N K"], rows: tuple[Array, Array, Array]
) -> Float[Array, "B N S M"]:
    key, _, bias = rows
    return _scores(query, key) + bias.astype(jnp.float32)[:, None, None, :]


def _weighted(weights: Float[Array, "B N S J"], value: Float[Array, "B J N K"]) -> Float[Array, "B S N K"]:
    weights = weights.astype(value.dtype)
    return jnp.einsum("BNSJ,BJNK->BSNK", weights, value, preferred_element_type=jnp.float32)


# --- a kernel, and the memory merged with it --------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_kernel(
    backend: Backend, layout: rings.Layout | None, query: Array, key: Array, value: Array, rows: Rows
) -> Array:
    return _forward(backend, layout, query, key, value, rows)[0]


def _forward(
    backend: Backend, layout: rings.Layout | None, query: Array, key: Array, value: Array, rows: Rows
) -> tuple[Array, tuple]:
    """The output, and what the backward pass needs."""
    local = partial(_local_forward, backend, layout)
    if layout is not None:
        inputs = layout.query, layout.key, layout.key, layout.rows if rows else None
        outputs = layout.query, layout.lse
        local = jax.shard_map(local, mesh=layout.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    out, lse = local(query, key, value, rows)
    out, lse = checkpoint_name(out, KEPT), checkpoint_name(lse, KEPT)
    return out, (query, key, value, rows, out, lse)


def _backward(backend: Backend, layout: rings.Layout | None, kept: tuple, grad: Array) -> tuple:
    """Gradients of query, key, value and the memory's rows."""
    local = partial(_local_backward, backend, layout)
    if layout is not None:
        rows = layout.rows if kept[3] else None
        outputs = layout.query, layout.key, layout.key, rows
        inputs = *outputs, layout.query, layout.lse, layout.query
        local = jax.shard_map(local, mesh=layout.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    return local(*kept, grad)  # pyright: ignore[reportCallIssue]  # how many were kept is known


_with_kernel.defvjp(_forward, _backward)


def _local_forward(
    backend: Backend, layout: rings.Layout | None, query: Array, key: Array, value: Array, rows: Rows
) -> tuple[Array, Array]:
    """Output [B, S, N, K] and log-sum-exp [B, N, S] of the queries of one device."""
    out, lse = _kernel(backend, layout).forward(query, key, value, rows)
    return out.astype(query.dtype), lse


def _local_backward(
    backend: Backend,
    layout: rings.Layout | None,
    query: Array,
    key: Array,
    value: Array,
    rows: Rows,
    out: Array,
    lse: Array,
    grad: Array,
) -> tuple[Array, Array, Array, Rows]:
    kernel = _kernel(backend, layout)
    query_grad, *key_grads, row_grads = kernel.backward(query, key, value, out, lse, grad, rows)
    if layout is not None:  # sums over the queries and, for the bias, the heads of all devices
        if not layout.ring:
            key_grads = jax.lax.psum([x.astype(jnp.float32) for x in key_grads], rings.AXIS)
        if rows is not None:
            *row_grads, bias_grad = jax.lax.psum(row_grads, rings.AXIS)
            row_grads = *row_grads, jax.lax.psum(bias_grad, layout.heads) if layout.heads else bias_grad
    grads = query_grad, *key_grads, row_grads
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), grads, (query, key, value, rows))


def _kernel(backend: Backend, layout: rings.Layout | None) -> Kernel:
    """One that takes the rows of a memory."""
    kernel = KERNELS[backend]
    if layout is not None and layout.ring:
        kernel = Kernel(partial(rings.forward, kernel), partial(rings.backward, kernel))
    if kernel.takes_rows:
        return kernel
    return Kernel(partial(_merged_forward, kernel), partial(_merged_backward, kernel), takes_rows=True)


def _merged_forward(
    kernel: Kernel, query: Array, key: Array, value: Array, rows: Rows
) -> tuple[Array, Float[Array, "B N S"]]:
    out, lse = kernel.forward(query, key, value)
    if rows is None:
        return out, lse
    scores = _memory_scores(query, rows)
    union = jnp.logaddexp(lse, jax.nn.logsumexp(scores, axis=-1))
    out = out.astype(jnp.float32) * rings.per_query(jnp.exp(lse - union))
    return out + _weighted(jnp.exp(scores - union[..., None]), rows[1]), union


def _merged_backward(
    kernel: Kernel, query: Array, key: Array, value: Array, out: Array, lse: Array, grad: Array, rows: Rows
) -> tuple[Array, Array, Array, Rows]:
    query_grad, key_grad, value_grad, *_ = kernel.backward(query, key, value, out, lse, grad)
    if rows is None:
        return query_grad, key_grad, value_grad, None
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    weights = jnp.exp(_memory_scores(query, rows) - lse[..., None])
    mean = mean_gradient(out, grad).transpose(0, 2, 1)[..., None]
    change = weights * (product("BSNK,BMNK->BNSM", grad, rows[1]) - mean)
    scaled = (change * query.shape[-1] ** -0.5).astype(query.dtype)
    query_grad = query_grad.astype(jnp.float32) + product("BNSM,BMNK->BSNK", scaled, rows[0])
    row_grads = (
        product("BNSM,BSNK->BMNK", scaled, query),
        product("BNSM,BSNK->BMNK", weights.astype(grad.dtype), grad),
        change.sum((1, 2)),
    )
    return query_grad, key_grad, value_grad, row_grads
