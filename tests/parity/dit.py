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

FIELDS = (
    "dim",
    "ffn_dim",
    "num_heads",
    "num_layers",
    "in_dim",
    "out_dim",
    "text_dim",
    "freq_dim",
    "patch_size",
    "eps",
)


def make_dit(meta: dict, weights: dict[str, np.ndarray]) -> DiT:
    """The transformer that a golden file describes, filled with its weights."""
    config = build(DiTConfig, {key: meta[key] for key in FIELDS})
    dit = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))  # all of it comes from the file
    load(dit, names.table(), weights)
    return dit


def velocity(
    dit: DiT, latents: jax.Array, time: jax.Array, context: jax.Array, memory: Memory | None = None
) -> jax.Array:
    """The transformer's output, compiled."""
    graph, state = nnx.split(dit)
    return jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(
        state, latents, time, context, memory
    )


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
    latents, context = channels_last(tensors["latents"]), jnp.asarray(tensors["context"])
    time = jnp.asarray(tensors["timestep"])
    checks = []
    if "out/no_memory" in tensors:
        out = velocity(dit, latents, time, context)
        checks.append(Check("out/no_memory", channels_first(out), tensors["out/no_memory"]))
    out = velocity(dit, latents, time, context, plain_memory(tensors["memory"]))
    checks.append(Check("out/memory", channels_first(out), tensors["out/memory"]))
    if "cotangent" in tensors:
        graph, state = nnx.split(dit)

        @jax.jit
        def gradients(state, latents, tokens, cotangent):
            def run(latents, tokens):
                return nnx.merge(graph, state)(latents, time, context, plain_memory(tokens))

            return jax.vjp(run, latents, tokens)[1](cotangent)

        cotangent = channels_last(tensors["cotangent"])
        grad_latents, grad_memory = gradients(state, latents, jnp.asarray(tensors["memory"]), cotangent)
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
    memories = {
        "rows repeated": plain_memory(repeated),
        "log-multiplicity bias": Memory(jnp.asarray(distinct), bias),
    }
    return [
        Check(
            f"out/memory ({name})",
            channels_first(velocity(dit, latents, time, context, memory)),
            golden.tensors["out/memory"],
        )
        for name, memory in memories.items()
    ]


KINDS = {"dit_memory": check_memory, "dit_memory_repeated": check_repeated}
