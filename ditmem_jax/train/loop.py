"""The loop of a training run, which the same command continues after a kill: see "The same result again" in docs/training.md."""

import contextlib
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from ditmem_jax.config import Config
from ditmem_jax.evaluate.evaluator import Evaluator
from ditmem_jax.models.ditmem import compute_for
from ditmem_jax.parallel import compilation, processes
from ditmem_jax.storage.locks import owned
from ditmem_jax.storage.weights import check_weights, stored_dits
from ditmem_jax.train import folder as runs
from ditmem_jax.train.checkpoints import TrainingCheckpoints
from ditmem_jax.train.setup import Setup
from ditmem_jax.train.step import TrainState, describe


def train_memory(config: Config, *, warm: bool = False) -> Path:
    """Trains, or continues, the run in `config.run.out`; returns the file of the encoder.

    Args:
        warm: load and compile everything, which fills the compile cache, and make no step.
    Raises:
        UserError: for input that does not fit together, and at a step whose loss or gradient is not finite.
    """
    check_weights(config, *stored_dits(config, config.experts.trains))  # before anything is written
    phases, owner = compilation.Phases(), contextlib.ExitStack()
    if processes.is_primary():
        owner.enter_context(owned(config.run.out))
    with owner:
        return _train(config, phases, warm=warm)


def _train(config: Config, phases: compilation.Phases, *, warm: bool) -> Path:
    setup, options = Setup(config), config.run
    with (
        jax.set_mesh(setup.mesh),
        TrainingCheckpoints(setup.folder / "checkpoints", options.keep, options.best) as checkpoints,
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
            monitor.console.print(f"attention by {compute_for(config, setup.mesh).backend}")
            phases.end("load")
            train_step, evaluators = setup.compile()
            for evaluator in evaluators:
                monitor.console.print(evaluator.about)
            phases.end("compile")
            if warm:
                return setup.folder
            if start == 0:
                _validate(setup, evaluators, monitor, state, 0, notes)
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
                monitor.add(step, metrics, batch.ids)

                last = step == options.steps
                validate, save = (
                    last or step % options.validate_every == 0,
                    last or step % options.save_every == 0,
                )
                ask = jax.process_count() == 1 or step % options.log_every == 0
                stop = ask and processes.any_process(bool(terminated))
                if validate or save or stop or step % options.log_every == 0:
                    monitor.flush()  # nothing that is not finite is saved
                score = _validate(setup, evaluators, monitor, state, step, notes) if validate else None
                if save or stop:
                    checkpoints.save(step, state, setup.data.get_state(), score, notes)
                if stop and not last:
                    checkpoints.close()
                    monitor.console.print(f"stopped after step {step}; the same command continues")
                    sys.exit(128 + signal.SIGTERM)
    if runs.fingerprint(setup.backbone) != setup.fingerprint:
        raise RuntimeError("the frozen weights have changed")
    return setup.export("encoder.safetensors", state, options.steps, notes["gains"])


def _validate(
    setup: Setup,
    evaluators: Sequence[Evaluator],
    monitor: runs.Monitor,
    state: TrainState,
    step: int,
    notes: dict[str, Any],
) -> float | None:
    """Notes what the evaluators measure and keeps the encoder if it is the best so far; returns its score, if any."""
    if not evaluators:
        return None
    found = [evaluator(state.params, state.rest) for evaluator in evaluators]
    notes["gains"] = numbers = {name: value for each in found for name, value in each.items()}
    best = setup.config.run.best
    summaries = [evaluator.summary(each) for evaluator, each in zip(evaluators, found, strict=True)]
    monitor.validated(step, numbers, summaries, best)
    score = numbers.get(best, math.nan)
    if math.isnan(score):
        return None
    if notes["best"] is None or score > notes["best"]:
        notes["best"] = score
        setup.export("encoder_best.safetensors", state, step, numbers)
    return score


@contextlib.contextmanager
def _termination() -> Iterator[list[int]]:
    """Yields a list that SIGTERM puts itself into, so that the loop can stop between two steps."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
