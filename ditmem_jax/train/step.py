"""One training step: what trains, its state, the pure step and the compiled one.

What trains, the memory encoder's weights or low-rank adapters of the transformer (`objective.trains`), is float32 and
the optimiser's state lies beside it; the transformer's own weights are an argument of their own that is neither
differentiated nor given away. Everything random in a step comes from the seed and the number of the step.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from ditmem_jax.config import Config
from ditmem_jax.diffusion import objective
from ditmem_jax.diffusion.objective import Baseline
from ditmem_jax.models import adapters
from ditmem_jax.models.backbone import with_expert
from ditmem_jax.models.ditmem import Networks, encode, give_first_frame, keep_only, per_sample_mse
from ditmem_jax.models.encoders import Encoder, new_encoder
from ditmem_jax.models.memory_encoder import shuffle_videos
from ditmem_jax.models.placement import tree_shardings
from ditmem_jax.models.state import Arrays, Structure, abstract, split
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.parallel.mesh import replicated, with_shardings
from ditmem_jax.storage.weights import DTYPES, new_dit
from ditmem_jax.types import Batch, Memory

# What becomes of an array, by its path in the whole model; the first match wins.
ROLES = (
    (rf"^dit\..*\.{adapters.NAME}\.", "trained"),
    (r"^dit\.", "frozen"),
    (r"\.filter\.complex_weight$", "frozen"),
    (r"\.norm\.(mean|var)$", "running statistics"),
    (r"\.reader\.fixed_gate$", "frozen"),
    (r"^encoder\.", "trained"),
)


@struct.dataclass
class TrainState:
    """All that changes from step to step. A pytree, which orbax fills with other leaves, also in place of no arrays."""

    step: Any  # int32
    params: (
        Any  # Arrays, trained, float32: the encoder's by its paths, adapters' as "dit." and the transformer's
    )
    rest: Any  # Arrays of the encoder: running statistics and stored filters
    optimizer: Any  # optax's state
    baseline: Any  # Baseline


def make_train_step(
    config: Config,
    networks: Networks,
    optimizer: optax.GradientTransformation,
) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure step (state, frozen weights, batch) -> (state, metrics).

    Metrics of a batch: "objective", what is minimised; "loss", its mean squared error; "gain", `objective.gain` over the
    samples that had a memory, with the bins of the baseline as noise levels; "gradient_norm", before the clip;
    "parameter_norm", after the update, which shows one that is far too large before it is saved.
    """
    goal = config.objective

    def train_step(state: TrainState, backbone: Arrays, batch: Batch):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.run.seed), state.step), 5)
        size = len(batch.latents)
        sigma, high = objective.draw_sigma(goal, keys[0], size, config.experts)
        noise = jax.random.normal(keys[1], batch.latents.shape)
        keep = jax.random.bernoulli(keys[2], 1 - goal.memory_dropout, (size,)) & batch.present.any(axis=1)
        if networks.encoder is None:
            keep = jnp.zeros_like(keep)
        if goal.shuffle_references:
            references, present = shuffle_videos(batch.references, batch.present, keys[3])
            batch = batch._replace(references=references, present=present)
        batch = give_first_frame(batch, jax.random.fold_in(keys[1], 1), goal.first_frame)

        def loss_and_gradients(dit: DiT):
            def error_with(dit: DiT, memory: Memory | None) -> jax.Array:
                return per_sample_mse(dit, memory, batch, sigma, noise)

            alone = error_with(dit, None) if goal.kind == "relative" else None

            def loss(params: Arrays):
                memory, rest = None, {}
                if networks.encoder is not None:
                    encoder = networks.encoder.merge(params | state.rest)
                    memory = encode(encoder, batch, training=True, rngs=nnx.Rngs(dropout=keys[4]))
                    memory = keep_only(memory, keep)
                    _, arrays = split(encoder)  # its running statistics have moved
                    rest = {path: arrays[path] for path in state.rest}
                error = error_with(adapted(networks, dit, params), memory)
                expected = state.baseline.expected(sigma, error) if alone is None else alone
                return objective.loss(goal, sigma, error, expected), (error, expected, rest)

            return jax.value_and_grad(loss, has_aux=True)(state.params)

        dit = networks.dit.merge(jax.lax.stop_gradient(backbone))
        (value, (error, expected, rest)), gradients = with_expert(dit, high, loss_and_gradients)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        if goal.kind == "relative":
            baseline = state.baseline.observe(sigma, expected, jnp.ones_like(keep))
        else:
            baseline = state.baseline.observe(sigma, error, ~keep)
        if networks.encoder is None:  # adapters act on every sample
            keep = jnp.ones_like(keep)
        counted = objective.in_bins(sigma) & keep[None]
        errors, without = (jnp.broadcast_to(x, counted.shape) for x in (error, expected))
        metrics = {
            "objective": value,
            "loss": error.mean(),
            "gain": objective.gain(errors, without, counted),
            "gradient_norm": optax.global_norm(gradients),
            "parameter_norm": optax.global_norm(params),
        }
        return TrainState(state.step + 1, params, rest, optimizer_state, baseline), metrics

    return train_step


def adapted(networks: Networks, dit: DiT, params: Arrays) -> DiT:
    """The transformer `dit` with the adapters in `params`, if there are any."""
    if networks.adapted is None:
        return dit
    own = {path.removeprefix("dit."): x for path, x in params.items() if path.startswith("dit.")}
    return networks.adapted.merge(split(dit)[1] | own)


def make_networks(config: Config, dit: Structure) -> Networks:
    """Structures of what a step for `config` computes with, given that of the frozen transformer."""
    trains = config.objective.trains
    return Networks(
        dit,
        abstract(lambda: make_encoder(config))[0] if trains != "adapter" else None,
        adapters.attach(dit, config.adapter)[0] if trains != "memory" else None,
    )


def make_encoder(config: Config) -> Encoder:
    """A new encoder, from the run's seed."""
    return new_encoder(
        config.memory,
        rngs=nnx.Rngs(jax.random.key(config.run.seed)),
        dtype=DTYPES[config.weights.computed_in],
    )


def init_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step: a new encoder, new adapters, or both."""
    arrays, trains = {}, config.objective.trains
    if trains != "adapter":
        _, arrays = split(make_encoder(config))
    if trains != "memory":
        dit, _ = abstract(lambda: new_dit(config, config.experts.trains))
        _, shapes = adapters.attach(dit, config.adapter)
        new = adapters.init(shapes, jax.random.key(config.run.seed))
        arrays |= {f"dit.{path}": x for path, x in new.items()}
    params = {path: x for path, x in arrays.items() if role(_whole_path(path))[1] == "trained"}
    rest = {path: x for path, x in arrays.items() if path not in params}
    return TrainState(jnp.int32(0), params, rest, optimizer.init(params), Baseline.empty())


def state_layout(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, in place of its arrays."""
    shapes = jax.eval_shape(lambda: init_state(config, optimizer))
    return with_shardings(shapes, tree_shardings(shapes, mesh))


def jit_train_step(
    config: Config, networks: Networks, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled step, which takes the memory of the state that it is given."""
    shardings = jax.tree.map(lambda x: x.sharding, state_layout(config, optimizer, mesh))
    return jax.jit(
        make_train_step(config, networks, optimizer),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )


def role(path: str) -> tuple[str, str]:
    """Return the pattern that decides about an array of the whole model, and what becomes of it."""
    return next(pair for pair in ROLES if re.search(pair[0], path))


def _whole_path(path: str) -> str:
    """The path in the whole model of an array of `TrainState`."""
    return path if path.startswith("dit.") else f"encoder.{path}"


def describe(backbone: Arrays, state: TrainState) -> str:
    """One line: what trains and what does not, with the number of values."""
    sizes = {f"dit.{path}": x.size for path, x in backbone.items()}
    sizes |= {_whole_path(path): x.size for path, x in (state.params | state.rest).items()}
    totals = Counter()
    for path, size in sizes.items():
        totals[role(path)] += size
    return ", ".join(
        f"{role} {totals[pattern, role]:,} ({pattern})" for pattern, role in ROLES if totals[pattern, role]
    )
