"""The parts together: one training loss with its gradients, and sampling with guidance and memory."""

import functools
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ditmem_jax.config import Config, ObjectiveConfig, OptimConfig, UMT5Config, VAEConfig
from ditmem_jax.config.networks import TRAIN_STEPS
from ditmem_jax.diffusion import flow, objective
from ditmem_jax.diffusion.guidance import guided
from ditmem_jax.diffusion.objective import Baseline
from ditmem_jax.diffusion.solvers import SOLVERS
from ditmem_jax.models.ditmem import Networks, encode, velocity
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.state import split
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.sample.sampler import denoise
from ditmem_jax.train.optimizer import make_optimizer
from ditmem_jax.train.step import TrainState, make_train_step, role
from ditmem_jax.types import Batch, Conditioning
from tests.parity.dit import channels_first, channels_last, make_dit
from tests.parity.golden import Check, GoldenFile
from tests.parity.memory import compare_gradients, in_our_names, make_encoder, released_layout, videos


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
    """A training step with the golden noise and noise level in place of those it draws: loss, gradients, one update.

    The first update of AdamW is its rate against the sign of each gradient. Gradients that are nothing beside the
    largest have the sign of rounding, such as those of convolutions' biases (see `compare_gradients`), and are left out.
    """
    tensors = golden.tensors
    dit, encoder, references = _networks(golden)
    noise, sigma = channels_last(tensors["noise"]), jnp.asarray(tensors["timestep"]) / TRAIN_STEPS
    batch = Batch(
        channels_last(tensors["latents"]),
        Conditioning(jnp.asarray(tensors["context"])),
        references,
        jnp.ones(references.shape[:2], bool),
    )
    (dit_structure, backbone), (encoder_structure, arrays) = split(dit), split(encoder)
    params = {path: x for path, x in arrays.items() if role(f"encoder.{path}")[1] == "trained"}
    rest = {path: x for path, x in arrays.items() if path not in params}
    config = Config(
        dit.config,
        encoder.config,
        vae=VAEConfig(z_dim=4, mean=(0.0,) * 4, std=(1.0,) * 4),
        text=UMT5Config(dim=dit.config.text_dim),
        objective=ObjectiveConfig(kind="released", memory_dropout=0.0, shuffle_references=False),
        optim=OptimConfig("adamw", learning_rate=0.01, clip=0.0),
    )
    networks, optimizer = Networks(dit_structure, encoder_structure), make_optimizer(config.optim, 1)
    state = TrainState(jnp.int32(0), params, rest, optimizer.init(params), Baseline.empty())
    with (
        mock.patch.object(objective, "draw_sigma", lambda *_: (sigma, False)),
        mock.patch.object(jax.random, "normal", lambda *_: noise),
    ):
        after, metrics = jax.jit(make_train_step(config, networks, optimizer))(state, backbone, batch)

    @jax.jit
    def predict(params, backbone):
        memory = encode(encoder_structure.merge(params | rest), batch, training=True)
        return velocity(dit_structure.merge(backbone), memory, batch, sigma, noise)

    moment = optax.tree_utils.tree_get(after.optimizer, "mu")
    gradients = {path: np.asarray(x) / (1 - config.optim.b1) for path, x in moment.items()}
    updates = {path: np.asarray(after.params[path]) - np.asarray(params[path]) for path in params}
    _, expected = in_our_names("grad", golden, encoder.config, gradients)
    got, slopes = (np.concatenate([side[path].ravel() for path in params]) for side in (updates, expected))
    clear = np.abs(slopes) > 1e-4 * np.abs(slopes).max()
    moves = got[clear], (-0.01 * slopes / (np.abs(slopes) + 1e-8))[clear]
    return [
        Check("loss", np.asarray(metrics["objective"])[None], tensors["loss"]),
        Check("prediction", channels_first(predict(params, backbone)), tensors["prediction"]),
        *compare_gradients("grad", golden, encoder.config, gradients),
        Check("update", *moves, 1e-4),
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
