"""Optimisers by name, behind a clip and a schedule.

A new one is an entry of `OPTIMIZERS`: a function of the settings and of the rate, a schedule over updates. It takes
what it needs of `OptimConfig`; weight decay is decoupled (rate times decay) and pulls only what `matrices` tells.
"""

from collections.abc import Callable

import optax

from ditmem_jax.config import OptimConfig
from ditmem_jax.errors import UserError, nearest, warn
from ditmem_jax.models.state import Arrays
from ditmem_jax.parallel import processes


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of `config` behind a clip, with one update per `accumulate` of `steps` steps.

    Raises:
        UserError: for a kind that is not in `OPTIMIZERS`.
    """
    if config.kind not in OPTIMIZERS:
        raise UserError(
            "optim.kind has an unknown value",
            expected=f"one of: {nearest(config.kind, OPTIMIZERS)}",
            found=repr(config.kind),
        )
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    gates = optax.masked(
        optax.scale(config.gate_rate), _gates
    )  # at 1 too: a state has one form whatever the rate
    optimizer = optax.chain(clip, OPTIMIZERS[config.kind](config, schedule(config, steps)), gates)
    if config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return optimizer


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of each update, from 0, of a run of `steps` steps."""
    updates = max(1, steps // config.accumulate)
    rate = optax.constant_schedule(config.learning_rate)
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(config.learning_rate, max(1, updates - config.warmup))
    if config.warmup:
        warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup)
        rate = optax.join_schedules([warmup, rate], [config.warmup])
    return rate


def rate_of_step(config: OptimConfig, steps: int, step: int) -> float:
    """The learning rate of the update that a step, counted from 1, goes into."""
    return float(schedule(config, steps)((step - 1) // config.accumulate))


def check_updates(config: OptimConfig, steps: int) -> None:
    """Checks that a run of `steps` steps trains; warns of a warm-up that does not end and of steps without an update.

    Raises:
        UserError: if the run ends before the first update.
    """
    updates, left = divmod(steps, config.accumulate)
    if not updates:
        raise UserError(
            "a run that ends before its first update trains nothing",
            expected=f"run.steps of at least optim.accumulate = {config.accumulate}",
            found=f"run.steps = {steps}",
            fix="more run.steps, or a smaller optim.accumulate",
        )
    if not processes.is_primary():
        return
    if left:
        warn(
            f"the last {left} of {steps} steps make no update",
            expected=f"run.steps that are a multiple of optim.accumulate = {config.accumulate}",
            found=steps,
            fix=f"run.steps={steps - left} or {steps - left + config.accumulate}",
        )
    if config.warmup >= updates:
        warn(
            "the run ends within its warm-up: the learning rate does not come to its largest value",
            expected=f"optim.warmup below the {updates} updates of the run",
            found=config.warmup,
            fix="a shorter optim.warmup, or more run.steps",
        )


def matrices(params: Arrays) -> dict[str, bool]:
    """The parameters that weight decay pulls: matrices and convolutions, not biases and norms."""
    return {path: path.endswith("kernel") for path in params}


def _gates(params: Arrays) -> dict[str, bool]:
    return {path: path.endswith("reader.gate") for path in params}


def _adamw(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=matrices)


def _muon(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon for kernels, with all inputs of all taps as rows; NAdam for the rest."""

    def axes(params: Arrays) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
        return {
            path: optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)
            if path.endswith("kernel")
            else None
            for path, x in params.items()
        }

    return optax.contrib.muon(
        rate,
        beta=config.b1,
        adam_b1=config.b1,
        adam_b2=config.b2,
        weight_decay=config.weight_decay,
        weight_decay_mask=matrices,
        muon_weight_dimension_numbers=axes,
        consistent_rms=0.2,  # updates about as large as those of Adam, which takes the same rate for the rest
    )


def _lion(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=matrices)


def _adafactor(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor at the rate of the schedule, without momentum; `optax.adafactor` would not decay in step with it."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, matrices),
        optax.scale_by_learning_rate(rate),
    )


OPTIMIZERS: dict[str, Callable[[OptimConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
    "lion": _lion,
    "adafactor": _adafactor,
}
