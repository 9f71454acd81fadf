"""Optimisers by name, behind a clip and a schedule."""

import optax

from ditmem_jax.config import OptimConfig
from ditmem_jax.models.state import Arrays


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
