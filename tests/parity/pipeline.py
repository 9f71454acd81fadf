"""The parts together: one training loss with its gradients, and sampling with guidance and memory."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.config import ObjectiveConfig
from ditmem_jax.config.schema import TRAIN_STEPS
from ditmem_jax.diffusion import flow, objective
from ditmem_jax.diffusion.guidance import guided
from ditmem_jax.diffusion.solvers import SOLVERS
from ditmem_jax.models.ditmem import encode, velocity
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.sample.sampler import denoise
from ditmem_jax.types import Batch, Conditioning
from tests.parity.dit import channels_first, channels_last, make_dit
from tests.parity.golden import Check, GoldenFile
from tests.parity.memory import compare_gradients, make_encoder, released_layout, videos


def recognise(golden: GoldenFile) -> str | None:
    names = set(golden.tensors)
    if {"loss", "latents", "noise", "reference_latents", "timestep"} <= names:
        return "train_loss"
    return "sample" if {"context_positive", "context_negative", "noise"} <= names else None


def _networks(golden: GoldenFile) -> tuple[DiT, MemoryEncoder, jax.Array]:
    dit = make_dit(golden.meta["dit"], golden.under("dit/"))
    encoder = make_encoder(golden.meta["encoder"], golden.under("encoder/"))
    return dit, encoder, videos(golden.tensors["reference_latents"])


def check_training(golden: GoldenFile) -> list[Check]:
    """The released loss through the frozen transformer, and its gradient for every weight of the encoder."""
    tensors = golden.tensors
    dit, encoder, references = _networks(golden)
    noise, sigma = channels_last(tensors["noise"]), jnp.asarray(tensors["timestep"]) / TRAIN_STEPS
    batch = Batch(
        channels_last(tensors["latents"]),
        Conditioning(jnp.asarray(tensors["context"])),
        references,
        jnp.ones(references.shape[:2], bool),
    )
    frozen, dit_state = nnx.split(dit)
    structure, params, rest = nnx.split(encoder, nnx.Param, ...)

    @jax.jit
    def step(params, rest, dit_state):
        def loss(params):
            encoder = nnx.merge(structure, params, rest, copy=True)
            memory = encode(encoder, batch, training=True)
            prediction = velocity(nnx.merge(frozen, dit_state), memory, batch, sigma, noise)
            error = jnp.square(prediction - flow.target(batch.latents, noise)).mean((1, 2, 3, 4))
            return objective.loss(ObjectiveConfig(kind="released"), sigma, error, error), prediction

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, prediction), gradients = step(params, rest, dit_state)
    return [
        Check("loss", np.asarray(loss)[None], tensors["loss"]),
        Check("prediction", channels_first(prediction), tensors["prediction"]),
        *compare_gradients("grad", golden, encoder.config, gradients),
    ]


def check_sampling(golden: GoldenFile) -> list[Check]:
    """Memory tokens of the sibling's encoder in evaluation mode, and clips with and without them."""
    tensors, meta = golden.tensors, golden.meta
    dit, encoder, references = _networks(golden.sibling("train_loss"))
    positive, negative = (
        Conditioning(jnp.asarray(tensors[f"context_{name}"])) for name in ("positive", "negative")
    )
    sigmas = flow.shifted_sigmas(int(meta["steps"]), float(meta["shift"]))
    solver = SOLVERS["euler"]
    graph, state = nnx.split(dit)

    @jax.jit
    def sample(state, noise, memory):
        guide = guided(nnx.merge(graph, state), positive, negative, memory, float(meta["cfg_scale"]))
        step = functools.partial(solver.step, guide)
        return denoise(step, solver.init(noise), solver.coefficients(sigmas)).latents

    memory = nnx.jit(lambda encoder, x: encoder(x, training=False))(encoder, references)
    checks = [Check("tokens", np.asarray(released_layout(memory, encoder.config)), tensors["tokens"])]
    for name, rows in (("out/memory", memory), ("out/no_memory", None)):
        if name in tensors:
            clip = sample(state, channels_last(tensors["noise"]), rows)
            checks.append(Check(name, channels_first(clip), tensors[name]))
    return checks


KINDS: dict[str, Callable[[GoldenFile], list[Check]]] = {
    "train_loss": check_training,
    "sample": check_sampling,
}
