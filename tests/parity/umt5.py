"""Golden check of the text encoder."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.config import UMT5Config
from ditmem_jax.convert.engine import load
from ditmem_jax.convert.umt5 import table
from ditmem_jax.models.wan.umt5 import UMT5
from tests.parity.golden import Check, GoldenFile


def recognise(golden: GoldenFile) -> str | None:
    return (
        "text_encoder"
        if {"ids", "mask", "embedding", "w/token_embedding.weight"} <= set(golden.tensors)
        else None
    )


def build(golden: GoldenFile) -> UMT5:
    """The encoder of a golden file, with its weights."""
    config = UMT5Config(
        **{field.name: int(golden.meta[field.name]) for field in dataclasses.fields(UMT5Config)}
    )
    umt5 = nnx.eval_shape(lambda: UMT5(config, rngs=nnx.Rngs(0)))  # all of it comes from the file
    load(umt5, table(), golden.under("w/"))
    return umt5


def check(golden: GoldenFile) -> list[Check]:
    """Embeddings of padded prompts."""
    ids, mask = (jnp.asarray(golden.tensors[name]) for name in ("ids", "mask"))
    with jax.default_matmul_precision("highest"):
        got = nnx.jit(UMT5.__call__)(build(golden), ids.astype(jnp.int32), mask.astype(bool))
    return [Check("embedding", np.asarray(got), golden.tensors["embedding"])]


KINDS: dict[str, Callable[[GoldenFile], list[Check]]] = {"text_encoder": check}
