"""The loop of a training run, which the same command continues after a kill: see "The same result again" in docs/training.md."""

import contextlib
import functools
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from ditmem_jax.config import Config
from ditmem_jax.errors import UserError
from ditmem_jax.evaluate.evaluator import Evaluator
from ditmem_jax.models.ditmem import compute_for
from ditmem_jax.parallel import compilation, processes
from ditmem_jax.storage.encoders import encoder_metadata, load_encoder
from ditmem_jax.storage.locks import owned
from ditmem_jax.storage.weights import check_weights, stored_dits
from ditmem_jax.train import folder as runs
from ditmem_jax.train.checkpoints import TrainingCheckpoints
from ditmem_jax.train.optimizer import rate_of_step
from ditmem_jax.train.setup import Setup
from ditmem_jax.train.step import TrainState, describe


def train_memory(config: Config, *, warm: bool = False) -> Path:
    """Trains, or continues, the run in `config.run.out`; returns the file of the encoder.

    SIGTERM and Ctrl-C save a checkpoint after the step that is being taken and end the program; a second one ends it at
    once.

    Args:
        warm: load and compile everything, which fills the compile cache, and make no step.
    Raises:
        UserError: for input that does not fit together, for a run that is longer already, and at a step whose loss or
            gradient is not finite.
    """
    check_weights(config, *stored_dits(config, config.experts.trains))  # before anything is written
    phases, owner = compilation.Phases(), contextlib.ExitStack()
    if processes.is_primary():
        owner.enter_context(owned(config.run.out))
    with owner:
        return _train(config, phases, warm=warm)


def _train(config: Config, phases: compilation.Phases, *, warm: bool) -> Path:
    setup, options = Setup(config), config.run
    file = setup.folder / "encoder.safetensors"
    rate = functools.partial(rate_of_step, config.optim, options.steps)
    with (
        jax.set_mesh(setup.mesh),
        TrainingCheckpoints(setup.folder / "checkpoints", options.keep, options.best) as checkpoints,
    ):
        start = checkpoints.latest() or 0
        if start > options.steps:
            raise UserError(
                f"the run in {setup.folder} is past step {options.steps}",
                expected=f"run.steps of {start}, where it stands, or more",
                found=options.steps,
                fix=f"run.steps={start} or more, or another run.out",
            )
        with runs.Monitor(setup.folder, start, options.steps, rate) as monitor:
            if start == options.steps and not warm and _is_whole(file, start):
                monitor.print(f"the run in {setup.folder} is already finished: it stands at step {start}")
                return file
            if start:
                restored = checkpoints.restore(setup.state_layout)
                state, notes = restored.state, restored.extra
                monitor.print(f"the run in {setup.folder} continues from step {start}")
            else:
                state, notes = setup.initial_state(), {"gains": {}, "best": None}
            for key, (before, now) in setup.changes.items():
                monitor.print(f"{key}: {before!r} until step {start}, {now!r} from then on")
            monitor.print(describe(setup.backbone, state))
            monitor.print(f"attention by {compute_for(config, setup.mesh).backend}")
            phases.end("load")
            train_step, evaluators = setup.compile()
            for evaluator in evaluators:
                monitor.print(evaluator.about)
            phases.end("compile")
            if warm:
                return setup.folder
            if processes.is_primary():
                runs.note_start(setup.folder, setup.config, start, setup.changes)
            if start == 0:
                _validate(setup, evaluators, monitor, state, 0, notes)
                phases.end("validation")
            # what workers read ahead lies in shared memory until the iterator is closed
            with contextlib.closing(setup.batches(start)) as batches, _termination() as received:
                for step in range(start + 1, options.steps + 1):
                    batch = _first(batches) if step == start + 1 else next(batches)
                    on_devices = setup.put(batch)
                    if step == start + 1:
                        monitor.start_clock()
                    with jax.transfer_guard("disallow"):
                        state, metrics = train_step(state, setup.backbone, on_devices)
                    if step == start + 1:
                        jax.block_until_ready(metrics)
                        phases.end("first batch")
                        monitor.print(phases)
                    monitor.add(step, metrics, batch.ids)

                    last = step == options.steps
                    validate, save = (
                        last or step % options.validate_every == 0,
                        last or step % options.save_every == 0,
                    )
                    ask = jax.process_count() == 1 or step % options.log_every == 0
                    stop = ask and processes.any_process(bool(received))
                    if validate or save or stop or step % options.log_every == 0:
                        monitor.flush()  # nothing that is not finite is saved
                    score = _validate(setup, evaluators, monitor, state, step, notes) if validate else None
                    if save or stop:
                        checkpoints.save(step, state, score, notes)
                    if validate or save:
                        monitor.start_clock()
                    if stop and not last:
                        checkpoints.close()
                        monitor.print(f"stopped after step {step}; the same command continues")
                        sys.exit(128 + (received[0] if received else signal.SIGTERM))
    if runs.fingerprint(setup.backbone) != setup.fingerprint:
        raise RuntimeError("the frozen weights have changed")
    return setup.export(file.name, state, options.steps, notes["gains"])


def _is_whole(file: Path, step: int) -> bool:
    """Return True if `file` holds an encoder of this step, to the last bit as it was written."""
    try:
        load_encoder(file)
        return encoder_metadata(file)[1].get("step") == step
    except UserError:
        return False


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


def _first(batches: Iterator[Any]) -> Any:
    """The first batch. What reads it starts processes, which are not to hear a Ctrl-C that is for this one."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return next(batches)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _termination() -> Iterator[list[int]]:
    """Yields a list that SIGTERM and SIGINT put themselves into, so that the loop can stop between two steps.

    A SIGINT after either ends the process at once, as a kill would: what is on the disk is whole.
    """
    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number)
        received.append(number)
        if not multiprocessing.active_children():
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # which does not wait for the end of a step, as Python does
        text = "stopping after this step, which is saved; Ctrl-C ends at once and loses the steps since the last save"
        print(text, file=sys.stderr, flush=True)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
