"""Golden checks of the transformer and its kinds, with and without memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.config import DiTConfig, build
from ditmem_jax.convert import dit as names
from ditmem_jax.convert.engine import load
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.types import Conditioning, Memory
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
    image_norm = weights.get("img_emb.proj.0.weight")
    image_dim = None if image_norm is None else len(image_norm)
    given = {"image_dim": image_dim, "clean_frames": meta["in_dim"] == meta["out_dim"]}
    config = build(DiTConfig, {key: meta[key] for key in FIELDS} | given)
    dit = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))  # all of it comes from the file
    load(dit, names.table(config), weights)
    return dit


def velocity(
    dit: DiT,
    latents: jax.Array,
    time: jax.Array,
    context: jax.Array,
    memory: Memory | None = None,
    **condition: jax.Array,
) -> jax.Array:
    """The transformer's output, compiled."""
    graph, state = nnx.split(dit)
    given = Conditioning(context, **condition)
    return jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(
        state, latents, time, given, memory
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
    if not {"latents", "memory", "timestep", "w/patch_embedding.weight"} <= set(golden.tensors):
        return None
    if any(name.startswith(("out/text_only", "out/first_frame_given")) for name in golden.tensors):
        return "dit_ti2v"
    if "out/memory" in golden.tensors:
        return "dit_memory_i2v" if "y" in golden.tensors else "dit_memory"
    return None


def image_inputs(golden: GoldenFile) -> dict[str, jax.Array]:
    """Inputs of the image-to-video kinds beside the others: condition and, in Wan 2.1, CLIP tokens."""
    tensors, inputs = golden.tensors, {}
    if "y" in tensors:
        inputs["frames"] = channels_last(tensors["y"])
    if "clip_feature" in tensors:
        inputs["image"] = jnp.asarray(tensors["clip_feature"])
    return inputs


def check_memory(golden: GoldenFile) -> list[Check]:
    """Outputs without and with memory, gradients with respect to memory and latents."""
    dit = make_dit(golden.meta, golden.under("w/"))
    tensors = golden.tensors
    latents, context = channels_last(tensors["latents"]), jnp.asarray(tensors["context"])
    time, image = jnp.asarray(tensors["timestep"]), image_inputs(golden)
    checks = []
    if "out/no_memory" in tensors:
        out = velocity(dit, latents, time, context, **image)
        checks.append(Check("out/no_memory", channels_first(out), tensors["out/no_memory"]))
    out = velocity(dit, latents, time, context, plain_memory(tensors["memory"]), **image)
    checks.append(Check("out/memory", channels_first(out), tensors["out/memory"]))
    if "cotangent" in tensors:
        graph, state = nnx.split(dit)

        @jax.jit
        def gradients(state, latents, tokens, cotangent):
            def run(latents, tokens):
                given = Conditioning(context, **image)
                return nnx.merge(graph, state)(latents, time, given, plain_memory(tokens))

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


def check_given_frame(golden: GoldenFile) -> list[Check]:
    """Outputs with and without the first frame given, with and without memory, whichever the file has.

    The released program fails where both are given. A memory of absent rows must then be no memory, and a number
    for each token, all alike, must be one number for all.
    """
    dit, tensors = make_dit(golden.meta, golden.under("w/")), golden.tensors
    latents, context = channels_last(tensors["latents"]), jnp.asarray(tensors["context"])
    time, memory = jnp.asarray(tensors["timestep"]), plain_memory(tensors["memory"])
    absent = memory._replace(bias=jnp.full_like(memory.bias, -jnp.inf))
    patches = math.prod(latents.shape[2:4]) // math.prod(dit.config.patch_size)  # of a frame
    per_frame = jnp.repeat(time[:, None], latents.shape[1], axis=1)
    given = per_frame.at[:, 0].set(0.0)
    first = jnp.broadcast_to(jnp.arange(latents.shape[1]) == 0, per_frame.shape)
    held = dict(clean=latents, given=first)  # whatever stands in the places of the frames that it gives
    other = jnp.where(first[:, :, None, None, None], 7.0, latents)
    per_token = jnp.repeat(per_frame, patches, axis=1)
    runs = [
        ("text_only_no_memory", "", (latents, time), None, {}),
        ("text_only_memory", "", (latents, time), memory, {}),
        ("text_only_memory", " (a timestep per token)", (latents, per_token), memory, {}),
        ("first_frame_given_no_memory", "", (latents, given), None, {}),
        ("first_frame_given_no_memory", " (absent rows)", (latents, given), absent, {}),
        ("first_frame_given_no_memory", " (as a condition)", (other, time), absent, held),
        ("first_frame_given_memory", "", (latents, given), memory, {}),
    ]
    return [
        Check(
            f"out/{name}{note}",
            channels_first(velocity(dit, *inputs, context, rows, **condition)),
            tensors[f"out/{name}"],
        )
        for name, note, inputs, rows, condition in runs
        if f"out/{name}" in tensors
    ]


KINDS = {
    "dit_memory": check_memory,
    "dit_memory_repeated": check_repeated,
    "dit_memory_i2v": check_memory,
    "dit_ti2v": check_given_frame,
}
