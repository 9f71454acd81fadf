"""Golden checks of the transformer, with and without memory."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import dit as names
from convert.engine import load
from ditmem_jax.config import DiTConfig, build
from ditmem_jax.models.dit import DiT
from ditmem_jax.types import Memory
from tests.parity.golden import Check, GoldenFile

FIELDS = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim", "freq_dim", "patch_size", "eps")


def make_dit(meta: dict, weights: dict[str, np.ndarray]) -> DiT:
    """The transformer that a golden file describes, filled with its weights."""
    dit = DiT(build(DiTConfig, {key: meta[key] for key in FIELDS}), rngs=nnx.Rngs(0))
    load(dit, names.table(), weights)
    return dit


def channels_last(latents: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(latents, 1, -1))


def channels_first(latents: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(latents), -1, 1)


def plain_memory(tokens: np.ndarray) -> Memory:
    """Rows that each stand for themselves."""
    return Memory(jnp.asarray(tokens), jnp.zeros(tokens.shape[:2]))


def recognise(golden: GoldenFile) -> str | None:
    if "memory_repeated" in golden.tensors and "memory_distinct" in golden.tensors:
        return "dit_memory_repeated"
    plain = "clip_feature" not in golden.tensors and "out/first_frame_given_no_memory" not in golden.tensors
    if plain and {"latents", "memory", "out/memory", "timestep"} <= set(golden.tensors):
        return "dit_memory"
    return None


def check_memory(golden: GoldenFile) -> list[Check]:
    """Outputs without and with memory, gradients with respect to memory and latents."""
    dit = make_dit(golden.meta, golden.under("w/"))
    tensors = golden.tensors
    latents, time, context = channels_last(tensors["latents"]), tensors["timestep"], jnp.asarray(tensors["context"])
    time = jnp.asarray(time)
    checks = []
    if "out/no_memory" in tensors:
        checks.append(Check("out/no_memory", channels_first(dit(latents, time, context)), tensors["out/no_memory"]))

    def run(latents, rows):
        return dit(latents, time, context, Memory(rows, jnp.zeros(rows.shape[:2])))

    out, pull = jax.vjp(run, latents, jnp.asarray(tensors["memory"]))
    checks.append(Check("out/memory", channels_first(out), tensors["out/memory"]))
    if "cotangent" in tensors:
        grad_latents, grad_memory = pull(channels_last(tensors["cotangent"]))
        checks.append(Check("grad/latents", channels_first(grad_latents), tensors["grad/latents"], 1e-4))
        checks.append(Check("grad/memory", np.asarray(grad_memory), tensors["grad/memory"], 1e-4))
    return checks


def check_repeated(golden: GoldenFile) -> list[Check]:
    """Distinct rows with a bias of log multiplicity against the same rows repeated."""
    base = golden.sibling("dit_memory")
    dit = make_dit(base.meta, base.under("w/"))
    latents, context = channels_last(base.tensors["latents"]), jnp.asarray(base.tensors["context"])
    time = jnp.asarray(base.tensors["timestep"])
    distinct, repeated = golden.tensors["memory_distinct"], golden.tensors["memory_repeated"]
    equal = (distinct[:, None, :, :] == repeated[:, :, None, :]).all(-1)  # [B, repeated, distinct]
    bias = jnp.asarray(np.log(equal.sum(1)), jnp.float32)
    want = golden.tensors["out/memory"]
    return [
        Check("out/memory (rows repeated)", channels_first(dit(latents, time, context, plain_memory(repeated))), want),
        Check(
            "out/memory (log-multiplicity bias)",
            channels_first(dit(latents, time, context, Memory(jnp.asarray(distinct), bias))),
            want,
        ),
    ]


KINDS = {"dit_memory": check_memory, "dit_memory_repeated": check_repeated}
