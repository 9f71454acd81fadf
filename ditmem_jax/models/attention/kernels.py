"""Kernels of attention: each gives the log-sum-exp beside the output, and takes it back for the gradients.

    forward(query, key, value) -> output, lse        with lse[b, n, s] = log sum_j exp(scale q_s k_j)
    backward(query, key, value, output, lse, grad) -> grad of query, of key, of value

`backward` recomputes the weights as exp(scale q k - lse), and takes sum(grad * output) for the mean of the gradient
under the weights. So with `lse` and `output` of a softmax over more keys than it is given, it computes what those
keys contribute to the gradients of that larger softmax. `attention` rests on it: see there.

    xla     any device. A loop over heads and blocks of queries, so that only the scores of one block exist; it takes
            the rows of a memory beside the keys.
    cudnn   NVIDIA GPUs: flash attention of cuDNN, for float16 and bfloat16.
    splash  TPUs: Pallas' splash attention.

The fused kernels are called where they take `lse` in the backward pass, below the public functions of JAX, whose
derivatives ignore it. `jax.nn.dot_product_attention` moreover rounds it to the inputs' precision: at bfloat16 that
is several per cent of a weight. A bias for the memory rows instead would be as large as all scores.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ditmem_jax.errors import UserError
from ditmem_jax.types import Backend

Rows = tuple[Array, Array, Array] | None
"""A memory's keys [B, M, N, K], values [B, M, N, K] and biases [B, M]."""

PLATFORM: dict[str, str] = {"cudnn": "gpu", "splash": "tpu"}

QUERIES = 256  # of one block: enough for matrix products at full speed, with scores that stay in the cache
TILES = (1024, 768, 512, 384, 256, 128)  # of the splash kernels, which divide whole sequences into them


class Kernel(NamedTuple):
    """The two directions; for shapes see above.

    With `takes_rows` each has another argument, the rows of a memory, and `backward` another result, their gradients.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple]
    takes_rows: bool = False


def resolve(choice: str, platform: str, dtype: DTypeLike, head_dim: int) -> Backend:
    """The backend for `choice`, where "auto" is splash on TPUs, cudnn on GPUs where it can be, and xla otherwise.

    Args:
        platform: of the devices that will run it: "cpu", "gpu" or "tpu".
    Raises:
        UserError: for a backend that these devices or this precision do not have.
    """
    fits_cudnn = jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    if choice == "auto":
        best = {"tpu": "splash", "gpu": "cudnn" if fits_cudnn else "xla"}
        return best.get(platform, "xla")
    if platform != PLATFORM.get(choice, platform):
        raise UserError(
            f"attention {choice!r} needs another device",
            expected=PLATFORM[choice],
            found=platform,
            fix="attention 'auto'",
        )
    if choice == "cudnn" and not fits_cudnn:
        raise UserError(
            "attention 'cudnn' cannot take these heads",
            expected="weights.dtype bfloat16, and a width of each head that 8 divides, up to 128",
            found=f"{jnp.dtype(dtype)}, {head_dim}",
            fix="attention 'xla'",
        )
    return choice


# --- XLA --------------------------------------------------------------------------------------------------------

_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocks(x: Float[Array, "S *rest"]) -> Float[Array, "blocks Q *rest"]:
    """Blocks of at most QUERIES, all equal, the last one filled with zeros."""
    count = -(-len(x) // QUERIES)
    size = -(-len(x) // count)
    x = jnp.pad(x, ((0, count * size - len(x)), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(count, size, *x.shape[1:])


def _joined(x: Float[Array, "blocks Q *rest"], length: int) -> Float[Array, "S *rest"]:
    return x.reshape(-1, *x.shape[2:])[:length]


def _over_heads(
    head: Callable[..., tuple[Array, ...]], inputs: tuple[Array, ...], outputs: tuple[Array, ...]
) -> tuple[Array, ...]:
    """`outputs` filled with `head` of the rows [S, ...] of every sample and head in turn; nothing is transposed."""
    batch, _, heads = inputs[0].shape[:3]

    def step(carry):
        index, outputs = carry
        sample, n = index // heads, index % heads
        results = head(*(x[sample, :, n] for x in inputs))
        outputs = tuple(
            x.at[sample, :, n].set(result.astype(x.dtype)) for x, result in zip(outputs, results, strict=True)
        )
        return index + 1, outputs

    # Not a scan, out of which a policy of rematerialisation that keeps products would keep all scores.
    return jax.lax.while_loop(lambda carry: carry[0] < batch * heads, step, (0, outputs))[1]


def _xla_forward(
    query: Float[Array, "B S N K"],
    key: Float[Array, "B J N K"],
    value: Float[Array, "B J N K"],
    rows: Rows = None,
) -> tuple[Float[Array, "B S N K"], Float[Array, "B N S"]]:
    scale = query.shape[-1] ** -0.5

    def head(query, *keys):
        key, value, bias = _joined_keys(*keys)

        def block(query):
            scores = _product("SK,JK->SJ", query, key) * scale + bias
            top = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            out = _product("SJ,JK->SK", weights.astype(value.dtype), value) / total
            return out, top + jnp.log(total)

        return tuple(_joined(x, len(query)) for x in jax.lax.map(block, _blocks(query)))

    inputs = query, key, value, *_per_head(rows, key)
    out, lse = _over_heads(head, inputs, (jnp.zeros_like(query), jnp.zeros((*query.shape[:3], 1))))
    return out, lse[..., 0].transpose(0, 2, 1)


def _xla_backward(
    query: Float[Array, "B S N K"],
    key: Float[Array, "B J N K"],
    value: Float[Array, "B J N K"],
    out: Float[Array, "B S N K"],
    lse: Float[Array, "B N S"],
    grad: Float[Array, "B S N K"],
    rows: Rows = None,
) -> tuple[Float[Array, "B S N K"], Float[Array, "B J N K"], Float[Array, "B J N K"], Rows]:
    scale, length = query.shape[-1] ** -0.5, key.shape[1]

    def head(query, grad, lse, mean, *keys):
        key, value, bias = _joined_keys(*keys)

        def block(sums, parts):
            query, grad, lse, mean = parts
            weights = jnp.exp(_product("SK,JK->SJ", query, key) * scale + bias - lse)
            change = weights * (_product("SK,JK->SJ", grad, value) - mean)
            scaled = (change * scale).astype(query.dtype)
            key_sum, value_sum, bias_sum = sums
            key_sum += _product("SJ,SK->JK", scaled, query)
            value_sum += _product("SJ,SK->JK", weights.astype(grad.dtype), grad)
            bias_sum += change[:, length:].sum(0)[:, None]
            return (key_sum, value_sum, bias_sum), _product("SJ,JK->SK", scaled, key)

        zeros = jnp.zeros(key.shape, jnp.float32)
        start = zeros, zeros, jnp.zeros((len(key) - length, 1))
        sums, query_grad = jax.lax.scan(block, start, tuple(map(_blocks, (query, grad, lse, mean))))
        keys, values, biases = sums
        query_grad = _joined(query_grad, len(query))
        return query_grad, keys[:length], values[:length], keys[length:], values[length:], biases

    statistics = lse.transpose(0, 2, 1)[..., None], mean_gradient(out, grad)[..., None]
    keys = key, value, *_per_head(rows, key)
    outputs = tuple(map(jnp.zeros_like, (query, *keys)))
    *grads, bias_grad = _over_heads(head, (query, grad, *statistics, *keys), outputs)
    row_grads = None if rows is None else (*grads[3:], bias_grad.sum((2, 3)))
    return *grads[:3], row_grads


def _per_head(rows: Rows, key: Float[Array, "B J N K"]) -> tuple[Array, Array, Array]:
    """Keys, values and biases [B, M, N, 1] of a memory; none at all is a memory of no rows."""
    none = key[:, :0]
    key, value, bias = (none, none, jnp.zeros(none.shape[:2])) if rows is None else rows
    bias = bias.astype(jnp.float32)[:, :, None, None]
    return key, value, jnp.broadcast_to(bias, (*key.shape[:3], 1))


def _joined_keys(
    key: Float[Array, "J K"],
    value: Float[Array, "J K"],
    memory_key: Float[Array, "M K"],
    memory_value: Float[Array, "M K"],
    memory_bias: Float[Array, "M 1"],
) -> tuple[Float[Array, "L K"], Float[Array, "L K"], Float[Array, "1 L"]]:
    """Those of one head in one: copied once for all queries, where products of a few rows would each cost more."""
    bias = jnp.concatenate([jnp.zeros(len(key)), memory_bias[:, 0]])
    return jnp.concatenate([key, memory_key]), jnp.concatenate([value, memory_value]), bias[None]


def mean_gradient(out: Float[Array, "B S N K"], grad: Float[Array, "B S N K"]) -> Float[Array, "B S N"]:
    """Mean, under the weights of each query, of the gradient of its weights: as sum_j P_j (grad v_j) = grad out."""
    return _product("BSNK,BSNK->BSN", out, grad)


# --- cuDNN ------------------------------------------------------------------------------------------------------


def _cudnn_forward(
    query: Float[Array, "B S N K"], key: Float[Array, "B J N K"], value: Float[Array, "B J N K"]
) -> tuple[Float[Array, "B S N K"], Float[Array, "B N S"]]:
    return cudnn.dot_product_attention(query, key, value, scale=query.shape[-1] ** -0.5, return_residual=True)


def _cudnn_backward(
    query: Float[Array, "B S N K"],
    key: Float[Array, "B J N K"],
    value: Float[Array, "B J N K"],
    out: Float[Array, "B S N K"],
    lse: Float[Array, "B N S"],
    grad: Float[Array, "B S N K"],
) -> tuple[Float[Array, "B S N K"], Float[Array, "B J N K"], Float[Array, "B J N K"]]:
    unused = (jnp.zeros(0, query.dtype),) * 7  # a bias, lengths and offsets of sequences, pages
    return tuple(
        cudnn._dot_product_attention_bwd_p_wrapper.bind(
            query,
            key,
            value,
            *unused,
            lse,
            out,
            grad,
            scale=query.shape[-1] ** -0.5,
            seed=0,
            dropout_rate=0.0,
            variadic_args=(False, False),
            mask_type=cudnn.MaskType.NO_MASK,
            layout=cudnn.AttentionLayout.BTNH.value,
            sliding_window_length=None,
        )
    )


# --- splash -----------------------------------------------------------------------------------------------------


def tile(length: int) -> int:
    """The size of tiles for a sequence: larger ones do less work per row, but may need more rows of filling."""
    return min(TILES, key=lambda size: -(-length // size) * (size + 32))


def _tiled(x: Float[Array, "B S N *K"]) -> Float[Array, "BN s *K"]:
    """The sequence of each sample and head, filled with zeros up to whole tiles."""
    x = jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:])
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile(x.shape[1])), *[(0, 0)] * (x.ndim - 2)))


def _untiled(x: Float[Array, "BN s *K"], batch: int, length: int) -> Float[Array, "B S N *K"]:
    x = x[:, :length]
    return jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 2)


def _splash(query: Float[Array, "BN s K"], keys: int, filled: int):
    """The kernel for these tiled queries and `filled` keys, and what tells its `keys` true ones from filling."""
    count, queries, _ = query.shape
    rows, columns = tile(queries), tile(filled)
    mask = splash_attention_mask.FullMask((queries, filled))
    kernel = splash.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * count),
        block_sizes=splash.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
        save_residuals=True,
    )
    segments = None
    if filled > keys:  # queries attend to keys of their own segment
        segments = splash.SegmentIds(
            jnp.zeros(queries, jnp.int32), (jnp.arange(filled) >= keys).astype(jnp.int32)
        )
    return kernel, segments


def _splash_forward(
    query: Float[Array, "B S N K"], key: Float[Array, "B J N K"], value: Float[Array, "B J N K"]
) -> tuple[Float[Array, "B S N K"], Float[Array, "B N S"]]:
    batch, queries, _, width = query.shape
    tiled = tuple(map(_tiled, (query * width**-0.5, key, value)))
    kernel, segments = _splash(tiled[0], key.shape[1], tiled[1].shape[1])
    out, (lse,) = kernel(*tiled, segments)
    return _untiled(out, batch, queries), lse.reshape(batch, -1, lse.shape[1])[..., :queries]


def _splash_backward(
    query: Float[Array, "B S N K"],
    key: Float[Array, "B J N K"],
    value: Float[Array, "B J N K"],
    out: Float[Array, "B S N K"],
    lse: Float[Array, "B N S"],
    grad: Float[Array, "B S N K"],
) -> tuple[Float[Array, "B S N K"], Float[Array, "B J N K"], Float[Array, "B J N K"]]:
    batch, queries, _, width = query.shape
    scale, keys = width**-0.5, key.shape[1]
    arrays = query * scale, key, value, out, lse.transpose(0, 2, 1), grad
    *tiled, grad = map(_tiled, arrays)  # the filled queries have no gradient
    query, key, value, out, lse = tiled
    kernel, segments = _splash(query, keys, key.shape[1])
    kept = query, key, value, segments, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info
    query_grad, key_grad, value_grad = splash._splash_attention_bwd(**kernel.kwargs, res=kept, do=grad)[3:6]
    query_grad = (query_grad.astype(jnp.float32) * scale).astype(query.dtype)
    return (
        _untiled(query_grad, batch, queries),
        _untiled(key_grad, batch, keys),
        _untiled(value_grad, batch, keys),
    )


KERNELS: dict[Backend, Kernel] = {
    "xla": Kernel(_xla_forward, _xla_backward, takes_rows=True),
    "cudnn": Kernel(_cudnn_forward, _cudnn_backward),
    "splash": Kernel(_splash_forward, _splash_backward),
}
