"""Trains a memory encoder against a frozen transformer: `python -m ditmem_jax.train --config configs/tiny.py`.

One jitted step for any mesh. The encoder's weights are float32 and its optimiser's state lies beside them; the
transformer's are an argument of their own that is neither differentiated nor given away. Everything random in a
step comes from the seed and the number of the step, and the data's position is in every checkpoint, so a run
that was killed and started again ends bit for bit where it would have ended.
"""

import collections
import contextlib
import itertools
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx, struct
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ditmem_jax import cli, objective, runs, startup
from ditmem_jax.bank import matches
from ditmem_jax.checkpoint import DTYPES, TrainingCheckpoints, load_dit, save_encoder
from ditmem_jax.config import Config, OptimConfig
from ditmem_jax.data.pipeline import training_data
from ditmem_jax.data.records import RecordReader
from ditmem_jax.data.references import References
from ditmem_jax.errors import UserError
from ditmem_jax.models.dit import DiT, with_expert
from ditmem_jax.models.ditmem import Batch, Networks, attention_backend, encode, errors, keep_only
from ditmem_jax.models.kernels import Backend
from ditmem_jax.models.memory import MemoryEncoder, shuffle_videos
from ditmem_jax.models.state import Arrays, abstract, split
from ditmem_jax.objective import Baseline
from ditmem_jax.sharding import (
    batch_sharding,
    check_mesh,
    laid_out,
    local_rows,
    make_mesh,
    placing,
    replicated,
    tree_shardings,
    whole,
)
from ditmem_jax.types import Memory
from ditmem_jax.validate import Validator

# What becomes of an array, by its path in the whole model; the first match wins.
ROLES = (
    (r"^dit\.", "frozen"),
    (r"\.filter\.complex_weight$", "frozen"),
    (r"\.norm\.(mean|var)$", "running statistics"),
    (r"^encoder\.", "trained"),
)
SMALL = 2**28  # bytes of frozen weights: up to here memory goes to speed, beyond it is scarce
ON_DEVICE = ("latents", "context", "references", "present")


@struct.dataclass
class TrainState:
    """All that changes from step to step."""

    step: Any  # int32
    params: Arrays  # of the encoder, trained: float32
    rest: Arrays  # of the encoder: running statistics and stored filters
    optimizer: Any  # optax's state
    baseline: Any  # Baseline


# --- one step ---------------------------------------------------------------------------------------------------


def make_train_step(
    config: Config,
    networks: Networks,
    optimizer: optax.GradientTransformation,
    *,
    backend: Backend = "xla",
    unroll: bool = False,
) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure step (state, frozen weights, batch) -> (state, metrics).

    Args:
        backend: of attention.
        unroll: lay out the blocks of the transformer, for counting operations.
    """
    goal = config.objective

    def train_step(state: TrainState, backbone: Arrays, batch: Batch):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.run.seed), state.step), 5)
        size = len(batch["latents"])
        sigma, high = objective.draw_sigma(goal, keys[0], size, config.experts)
        noise = jax.random.normal(keys[1], batch["latents"].shape)
        keep = jax.random.bernoulli(keys[2], 1 - goal.memory_dropout, (size,)) & batch["present"].any(axis=1)
        if goal.shuffle_references:
            references, present = shuffle_videos(batch["references"], batch["present"], keys[3])
            batch = batch | {"references": references, "present": present}

        def loss_and_gradients(dit: DiT):
            def errors_with(memory: Memory | None) -> jax.Array:
                options = dict(remat=config.run.remat, backend=backend, unroll=unroll)
                return errors(dit, memory, batch, sigma, noise, **options)

            alone = errors_with(None) if goal.kind == "relative" else None

            def loss(params: Arrays):
                encoder = networks.encoder.merge(params | state.rest)
                memory = encode(encoder, batch, training=True, rngs=nnx.Rngs(dropout=keys[4]))
                error = errors_with(keep_only(memory, keep))
                expected = state.baseline.expected(sigma, error) if alone is None else alone
                _, arrays = split(encoder)  # its running statistics have moved
                rest = {path: arrays[path] for path in state.rest}
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
        gains = jnp.where(keep, 1 - error / expected, 0)
        metrics = {
            "objective": value,
            "loss": error.mean(),
            "gain": gains.sum() / jnp.maximum(keep.sum(), 1).astype(jnp.float32),
            "gradient_norm": optax.global_norm(gradients),
        }
        return TrainState(state.step + 1, params, rest, optimizer_state, baseline), metrics

    return train_step


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW or Muon behind a clip, with one update per `accumulate` steps."""
    updates = max(1, steps // config.accumulate)
    rate = optax.constant_schedule(config.learning_rate)
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(config.learning_rate, max(1, updates - config.warmup))
    if config.warmup:
        warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup)
        rate = optax.join_schedules([warmup, rate], [config.warmup])
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    if config.kind == "muon":
        rule = optax.contrib.muon(
            rate,
            beta=config.b1,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            weight_decay_mask=_matrices,
            muon_weight_dimension_numbers=_matrix_axes,
            consistent_rms=0.2,  # updates about as large as those of Adam, which takes the same rate for the rest
        )
    else:
        rule = optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=_matrices)
    optimizer = optax.chain(clip, rule)
    if config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return optimizer


def _matrices(params: Arrays) -> dict[str, bool]:
    """Weight decay pulls matrices and convolutions, not biases and norms."""
    return {path: path.endswith("kernel") for path in params}


def _matrix_axes(params: Arrays) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """Muon's matrices: kernels, with all inputs of all taps as rows. Adam takes what is not a matrix."""
    return {
        path: optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)
        if path.endswith("kernel")
        else None
        for path, x in params.items()
    }


def make_encoder(config: Config) -> MemoryEncoder:
    """A new encoder, from the run's seed."""
    return MemoryEncoder(
        config.memory, rngs=nnx.Rngs(config.run.seed), dtype=DTYPES[config.weights.computed_in]
    )


def init_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    _, arrays = split(make_encoder(config))
    params = {path: x for path, x in arrays.items() if _role(f"encoder.{path}")[1] == "trained"}
    rest = {path: x for path, x in arrays.items() if path not in params}
    return TrainState(jnp.int32(0), params, rest, optimizer.init(params), Baseline.empty())


def state_layout(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, in place of its arrays."""
    shapes = jax.eval_shape(lambda: init_state(config, optimizer))
    return laid_out(shapes, tree_shardings(shapes, mesh))


def jit_train_step(
    config: Config, networks: Networks, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled step, which takes the memory of the state that it is given."""
    shardings = jax.tree.map(lambda x: x.sharding, state_layout(config, optimizer, mesh))
    return jax.jit(
        make_train_step(config, networks, optimizer, backend=attention_backend(config, mesh)),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )


def _role(path: str) -> tuple[str, str]:
    """The pattern that decides about an array of the whole model, and what becomes of it."""
    return next(pair for pair in ROLES if re.search(pair[0], path))


# --- the run ----------------------------------------------------------------------------------------------------


class Setup:
    """Everything of a run but its state: checked, loaded and on the devices of the mesh.

    Raises:
        UserError: for whatever does not fit together; nothing is left behind then.
    """

    def __init__(self, config: Config):
        self.config, self.mesh = config, make_mesh(config.mesh)
        records = RecordReader(config.data.records)
        held_out = RecordReader(config.data.validation) if config.data.validation else None
        begun = Path(config.run.out) / matches.FILE
        found = [matches.read(records, config.data.bank, config.data.references, begun)]
        if held_out:
            found.append(matches.read(held_out, config.data.bank, config.data.references))
        references = [each.references(config.data.references) for each in found]
        check(config, self.mesh, [videos for videos, _ in references], *filter(None, (records, held_out)))
        self.backend = attention_backend(config, self.mesh)
        self.networks, self.backbone = load_networks(config, self.mesh)
        if sum(x.nbytes for x in self.backbone.values()) <= SMALL:
            startup.keep_freed_memory()
        self.fingerprint = runs.fingerprint(self.backbone)
        with runs.claim(config, self.fingerprint) as self.folder:
            with startup.leader_first():
                if startup.leads():
                    found[0].save(self.folder / matches.FILE)
            options = dict(workers=config.data.workers, cache=config.data.cache)
            self.data = self._stream(records, *references[0], **options)
        for each in found:
            each.warn_if_stale()
        self.optimizer = make_optimizer(config.optim, config.run.steps)
        self.state_layout = state_layout(config, self.optimizer, self.mesh)
        self.held_out: list[Batch] = []
        if held_out:
            stream = self._stream(held_out, *references[1], epochs=1)
            self.held_out = [
                self.put(batch) for batch in itertools.islice(stream, config.run.validation_batches)
            ]
        self.batch_layout = batch_layout(config, self.mesh, records.meta.dtype)

    def compile(self) -> tuple[Callable, Validator | None]:
        """The compiled step, and what validates if there is anything to do it with; under `jax.set_mesh`."""
        config, layout = self.config, self.state_layout
        step = jit_train_step(config, self.networks, self.optimizer, self.mesh)
        step = startup.compiled(step, layout, self.backbone, self.batch_layout)
        validator = None
        if self.held_out:
            validator = Validator(
                self.networks,
                self.backbone,
                (layout.params, layout.rest),
                self.held_out,
                config.run.validation_sigmas,
                config.experts,
                config.run.seed,
                self.mesh,
                self.backend,
            )
        return step, validator

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """The arrays of a batch on the devices, divided among them."""
        sharding, size = batch_sharding(self.mesh), self.config.data.batch_size

        def place(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(sharding, x, (size, *x.shape[1:]))

        return {name: place(batch[name]) for name in ON_DEVICE}

    def initial_state(self) -> TrainState:
        shardings = jax.tree.map(lambda x: x.sharding, self.state_layout)
        return jax.jit(lambda: init_state(self.config, self.optimizer), out_shardings=shardings)()

    def export(self, name: str, state: TrainState, step: int, gains: dict[str, float]) -> Path:
        """Writes the encoder to the run's folder."""
        extra = {"step": step, "gains": gains, "backbone": self.fingerprint}
        extra |= {"expert": self.config.experts.trains}
        arrays = whole(state.params | state.rest, self.mesh)
        if startup.leads():
            save_encoder(self.folder / name, arrays, self.config.memory, extra)
        return self.folder / name

    def _stream(
        self, records: RecordReader, bank: References, index: np.ndarray, **options: Any
    ) -> Iterator[dict[str, np.ndarray]]:
        options |= dict(seed=self.config.run.seed, text_len=self.config.dit.text_len, bank=bank)
        options |= dict(rows=local_rows(self.mesh, self.config.data.batch_size))
        return iter(training_data(records, index, self.config.data.batch_size, **options))


def batch_layout(config: Config, mesh: Mesh, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and places of the arrays of a batch whose records are stored in `dtype`."""
    video, data = config.video, config.data
    grid = (*config.vae.latent_grid(video.frames, video.height, video.width), config.vae.z_dim)
    shapes = {
        "latents": (grid, dtype),
        "context": ((config.dit.text_len, config.dit.text_dim), dtype),
        "references": ((data.references, *grid), dtype),
        "present": ((data.references,), bool),
    }
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((data.batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def load_networks(config: Config, mesh: Mesh) -> tuple[Networks, Arrays]:
    """Structures of both networks, and the frozen weights on the mesh."""
    dit, backbone = split(load_dit(config, placing(mesh, "dit"), config.experts.trains))
    encoder, _ = abstract(lambda: make_encoder(config))
    return Networks(dit, encoder), backbone


def check(config: Config, mesh: Mesh, references: Sequence[References], *streams: RecordReader) -> None:
    """Raises UserError for a mesh, references or records to read batches from that this config cannot train with."""
    check_mesh(config, mesh, config.data.batch_size)
    if config.experts.boundary is not None:
        below = objective.share_below(config.objective, config.experts.boundary)
        if {"high": 1 - below, "low": below, "both": 1.0}[config.experts.trains] == 0:
            raise UserError(
                "no noise level of objective.density falls to the expert that trains",
                expected=f"some on the {config.experts.trains} side of {config.experts.boundary}",
                fix="another objective.sigma_range, or the other expert",
            )
    video = config.video
    grid = config.vae.latent_grid(video.frames, video.height, video.width)
    expected = ((*grid, config.vae.z_dim), config.text.dim)
    for records in (*references, *streams):
        if (found := (records.meta.latents, records.meta.text_dim)) != expected:
            raise UserError(
                f"the records in {records.folder} do not fit the config",
                expected=f"latents {list(expected[0])}, text width {expected[1]}",
                found=f"latents {list(found[0])}, text width {found[1]}",
                fix="encode the videos with this config",
            )
    for records in streams:
        if len(records) < config.data.batch_size:
            raise UserError(
                f"the records in {records.folder} do not fill a batch",
                expected=f"at least data.batch_size = {config.data.batch_size}",
                found=len(records),
                fix="a smaller data.batch_size, or more videos",
            )


def describe(backbone: Arrays, state: TrainState) -> str:
    """One line: what trains and what does not, with the number of values."""
    sizes = {f"dit.{path}": x.size for path, x in backbone.items()}
    sizes |= {f"encoder.{path}": x.size for path, x in (state.params | state.rest).items()}
    totals = collections.Counter()
    for path, size in sizes.items():
        totals[_role(path)] += size
    return ", ".join(
        f"{role} {totals[pattern, role]:,} ({pattern})" for pattern, role in ROLES if totals[pattern, role]
    )


def train(config: Config, *, warm: bool = False) -> Path:
    """Trains, or continues, the run in `config.run.out`; returns the file of the encoder.

    Args:
        warm: load and compile everything, which fills the compile cache, and make no step.
    Raises:
        UserError: for input that does not fit together, and at a step whose loss or gradient is not finite.
    """
    phases = startup.Phases()
    setup, options = Setup(config), config.run
    with (
        jax.set_mesh(setup.mesh),
        TrainingCheckpoints(setup.folder / "checkpoints", options.keep) as checkpoints,
        _termination() as terminated,
    ):
        start = checkpoints.latest() or 0
        if start:
            restored = checkpoints.restore(setup.state_layout)
            state, notes = restored.state, restored.extra
            setup.data.set_state(restored.position)
        else:
            state, notes = setup.initial_state(), {"gains": {}, "best": None}
        with runs.Monitor(setup.folder, start, options.steps) as monitor:
            monitor.console.print(describe(setup.backbone, state))
            monitor.console.print(f"attention by {setup.backend}")
            phases.end("load")
            train_step, validator = setup.compile()
            phases.end("compile")
            if warm:
                return setup.folder
            if start == 0:
                _validate(setup, validator, monitor, state, 0, notes)
                phases.end("validation")
            for step in range(start + 1, options.steps + 1):
                batch = next(setup.data)
                on_devices = setup.put(batch)
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, setup.backbone, on_devices)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    phases.end("first batch")
                    monitor.console.print(phases)
                monitor.add(step, metrics, batch["id"])

                last = step == options.steps
                validate, save = (
                    last or step % options.validate_every == 0,
                    last or step % options.save_every == 0,
                )
                ask = jax.process_count() == 1 or step % options.log_every == 0
                stop = ask and startup.any_process(bool(terminated))
                if validate or save or stop or step % options.log_every == 0:
                    monitor.flush()  # nothing that is not finite is saved
                gain = _validate(setup, validator, monitor, state, step, notes) if validate else None
                if save or stop:
                    checkpoints.save(step, state, setup.data.get_state(), gain, notes)
                if stop and not last:
                    checkpoints.close()
                    monitor.console.print(f"stopped after step {step}; the same command continues")
                    sys.exit(128 + signal.SIGTERM)
    if runs.fingerprint(setup.backbone) != setup.fingerprint:
        raise RuntimeError("the frozen weights have changed")
    return setup.export("encoder.safetensors", state, options.steps, notes["gains"])


def _validate(
    setup: Setup,
    validator: Validator | None,
    monitor: runs.Monitor,
    state: TrainState,
    step: int,
    notes: dict[str, Any],
) -> float | None:
    """Notes the gains at this step and keeps the encoder if they are the best so far; returns the mean gain."""
    if validator is None:
        return None
    notes["gains"] = validator(state.params, state.rest)
    monitor.validated(step, notes["gains"])
    gain = notes["gains"]["gain"]
    if notes["best"] is None or gain > notes["best"]:
        notes["best"] = gain
        setup.export("encoder_best.safetensors", state, step, notes["gains"])
    return gain


@contextlib.contextmanager
def _termination() -> Iterator[list[int]]:
    """Yields a list that SIGTERM puts itself into, so that the loop can stop between two steps."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    with startup.Program():
        path = train(cli.load_config(CONFIG), warm=WARM.value)
        if startup.leads():
            print(f"all is compiled for the run in {path}" if WARM.value else f"the encoder is in {path}")


if __name__ == "__main__":
    CONFIG = cli.define_config()
    WARM = flags.DEFINE_bool("warm", False, "Compile everything, into --compile_cache, and make no step.")
    cli.run(main)
