"""Optimisers by name, behind a clip and a schedule.

A new one is an entry of `OPTIMIZERS`: a function of the settings and of the rate, a schedule over updates. It takes
what it needs of `OptimConfig`; weight decay is decoupled (rate times decay) and pulls only what `matrices` tells.
"""

from collections.abc import Callable

import optax

from ditmem_jax.config import OptimConfig
from ditmem_jax.errors import UserError, nearest
from ditmem_jax.models.state import Arrays


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
    updates = max(1, steps // config.accumulate)
    rate = optax.constant_schedule(config.learning_rate)
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(config.learning_rate, max(1, updates - config.warmup))
    if config.warmup:
        warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup)
        rate = optax.join_schedules([warmup, rate], [config.warmup])
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    parts = [clip, OPTIMIZERS[config.kind](config, rate)]
    if config.gate_rate != 1:
        parts.append(optax.masked(optax.scale(config.gate_rate), _gates))
    optimizer = optax.chain(*parts)
    if config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return optimizer


def matrices(params: Arrays) -> dict[str, bool]:
    """What weight decay pulls: matrices and convolutions, not biases and norms."""
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
