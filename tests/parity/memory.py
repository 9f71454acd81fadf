"""The memory encoder against the released one."""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.config import MemoryConfig
from ditmem_jax.convert.engine import convert, load
from ditmem_jax.convert.memory import table
from ditmem_jax.models.memory_encoder import MemoryEncoder, row_counts
from ditmem_jax.models.state import Arrays
from ditmem_jax.types import Memory
from tests.parity.golden import Check, GoldenFile


def make_encoder(meta: dict, weights: dict[str, np.ndarray]) -> MemoryEncoder:
    """The encoder that `meta` describes (released kernels, strides and pools), with `weights` and no dropout."""
    first, second = meta["conv_channels"]
    config = MemoryConfig(
        dim=meta["feat_dim"],
        in_dim=meta["in_channels"],
        stages=((first, 7, 4, 2), (second, 3, 1, 2)),
        latent_grid=tuple(meta["built_for_latent"]),
        tokens=meta["tokens_per_video"],
        num_heads=meta.get("num_heads", 8),
        dropout=meta.get("dropout", 0.0),
    )
    filter_grid = tuple(meta.get("fed_latent", meta["built_for_latent"]))
    encoder = nnx.eval_shape(lambda: MemoryEncoder(config, rngs=nnx.Rngs(0), filter_grid=filter_grid))
    load(encoder, table(config), weights)
    return encoder


def videos(x: np.ndarray) -> jax.Array:
    """[B, R, C, T, H, W] as the encoder takes them."""
    return jnp.asarray(np.moveaxis(x, 2, -1))


def released_layout(memory: Memory, config: MemoryConfig) -> jax.Array:
    """Every row as often as the released encoder repeats it."""
    counts = row_counts(config).astype(int)
    return jnp.repeat(memory.tokens, np.tile(counts, memory.tokens.shape[1] // len(counts)), axis=1)


def recognise(golden: GoldenFile) -> str | None:
    return "encoder" if {"x", "eval/tokens", "w/self_attention.q.weight"} <= set(golden.tensors) else None


def check(golden: GoldenFile) -> list[Check]:
    """Evaluation; and if the file has it, training: tokens, gradients, running statistics after the step."""
    encoder = make_encoder(golden.meta, golden.under("w/"))
    x = videos(golden.tensors["x"])
    with jax.default_matmul_precision("highest"):
        counters = (n for name, n in golden.under("w/").items() if name.endswith("norm.num_batches_tracked"))
        if any(counters):
            _rewind(encoder, x)
        tokens = released_layout(_run(encoder, x, training=False), encoder.config)
        checks = [Check("eval/tokens", np.asarray(tokens), golden.tensors["eval/tokens"])]
        return checks + (_check_training(encoder, x, golden) if "train/tokens" in golden.tensors else [])


@partial(nnx.jit, static_argnames="training")
def _run(encoder: MemoryEncoder, x: jax.Array, training: bool) -> Memory:
    return encoder(x, training=training)


def _rewind(encoder: MemoryEncoder, x: jax.Array, momentum: float = 0.1) -> None:
    """Takes a training step on `x` back out of the running statistics.

    The tensors under w/ share their memory with the module that took the training step, so they were written with
    the statistics after it, while eval/tokens come from those before: r' = (1 - m) r + m b is solved for r. After that
    train/after tells nothing new, and eval/tokens is what pins down momentum and variance.
    """
    after = nnx.state(nnx.clone(encoder), nnx.BatchStat)
    _run(encoder, x, training=True)
    again = nnx.state(encoder, nnx.BatchStat)
    nnx.update(encoder, jax.tree.map(lambda r, s: ((2 - momentum) * r - s) / (1 - momentum), after, again))


def _check_training(encoder: MemoryEncoder, x: jax.Array, golden: GoldenFile) -> list[Check]:
    graph, params, rest = nnx.split(encoder, nnx.Param, ...)

    cotangent = golden.tensors.get("train/cotangent", np.zeros_like(golden.tensors["train/tokens"]))

    @jax.jit
    def step(params, rest, cotangent):
        def run(params):
            model = nnx.merge(graph, params, rest, copy=True)  # the step writes its statistics into the copy
            tokens = released_layout(model(x, training=True), model.config)
            return tokens, nnx.state(model, nnx.BatchStat)

        tokens, pull, statistics = jax.vjp(run, params, has_aux=True)
        return tokens, pull(cotangent)[0], statistics

    tokens, grads, statistics = step(params, rest, jnp.asarray(cotangent))
    checks = [Check("train/tokens", np.asarray(tokens), golden.tensors["train/tokens"])]
    if "train/cotangent" in golden.tensors:
        checks += compare_gradients("train/grad", golden, encoder.config, _flat(grads))
    if golden.under("train/after/"):
        got, want = in_our_names("train/after", golden, encoder.config, _flat(statistics))
        checks += [Check(f"train/after/{name}", got[name], want[name]) for name in sorted(got)]
    return checks


def compare_gradients(prefix: str, golden: GoldenFile, config: MemoryConfig, grads: Arrays) -> list[Check]:
    """Gradients of all parameters against the tensors under `prefix`.

    Some are zero by construction, and both sides then hold rounding errors only: that of a convolution's bias, which
    batch norm removes, and those of query and key where a band has one distinct row. Each of them is compared
    together with a gradient of its own scale.
    """
    got, want = in_our_names(prefix, golden, config, grads)
    inputs = golden.tensors["x" if "x" in golden.tensors else "reference_latents"]
    single_row = inputs.shape[1] * len(row_counts(config)) == 1
    checks = []
    for name in sorted(got):
        names = [name]
        if name.endswith(".conv.bias"):
            names.append(name.replace("bias", "kernel"))
        elif single_row and re.search(r"\.(q|k|norm_q|norm_k)\.", name):
            names.append("self_attention.v.kernel")
        ours, theirs = (np.concatenate([side[n].ravel() for n in names]) for side in (got, want))
        checks.append(Check(f"{prefix}/" + " with ".join(names), ours, theirs, 1e-4))
    return checks


def in_our_names(
    prefix: str, golden: GoldenFile, config: MemoryConfig, arrays: Arrays
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`arrays` and the tensors under `prefix`, which the converter's table brings into our names and layout."""
    got = {path: np.asarray(x) for path, x in arrays.items()}
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in got.items()}
    return got, convert(table(config), golden.under(f"{prefix}/"), shapes)


def _flat(state: nnx.State) -> Arrays:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


KINDS: dict[str, Callable[[GoldenFile], list[Check]]] = {"encoder": check}
