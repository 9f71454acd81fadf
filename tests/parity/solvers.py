"""Solvers over whole schedules against the schedulers of diffusers, with a nonlinear velocity.

`python -m tests.parity.solvers FILE` makes the golden file, where torch and diffusers are (`make peers`): noise and
the matrix of the velocity from a seed, and of each case of `CASES` the scheduler's own noise levels and its latents
after every step, in float32. That of the repository was made with diffusers 0.42.1.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from ditmem_jax.diffusion.solvers import SOLVERS
from tests.parity.golden import Check, GoldenFile

SHAPE = (1, 1, 1, 2, 4)
FEW = (1.0, 0.9375, 0.8333, 0.625)
"""A schedule of few steps, such as distilled models have."""
CASES = [(kind, *each) for kind in ("euler", "unipc", "dpm++") for each in ((4, 5.0), (20, 3.0), (40, 1.0))]
"""Solver, steps and shift."""


def recognise(golden: GoldenFile) -> str | None:
    return "solvers" if "velocity/matrix" in golden.tensors else None


def check(golden: GoldenFile) -> list[Check]:
    """The latents after every step."""
    noise, matrix = (golden.tensors[f"velocity/{name}"] for name in ("noise", "matrix"))
    cases = sorted({name.rpartition("/")[0] for name in golden.tensors} - {"velocity"})
    checks = []
    for case in cases:
        want = golden.under(f"{case}/")
        checks.append(Check(case, path(case.split("/")[0], want["sigmas"], noise, matrix), want["x"]))
    return checks


KINDS: dict[str, Callable[[GoldenFile], list[Check]]] = {"solvers": check}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Noise, and the matrix of the velocity."""
    rng = np.random.default_rng(0)
    channels = SHAPE[-1]
    return rng.standard_normal(SHAPE, np.float32), rng.standard_normal((channels, channels), np.float32)


def path(kind: str, sigmas: np.ndarray, noise: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Latents after every step by this library, `[steps, *shape]`."""

    def velocity(x, sigma):
        return jnp.tanh(x @ matrix) * (1 + sigma) - x

    solver = SOLVERS[kind]
    step = jax.jit(lambda carry, row: solver.step(velocity, carry, row))
    carry, latents = solver.init(jnp.asarray(noise)), []
    for row in solver.coefficients(np.float64(sigmas)):
        carry = step(carry, row)
        latents.append(np.asarray(carry.latents))
    return np.stack(latents)


def diffusers_path(
    kind: str, steps: int, shift: float, sigmas: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Noise levels without the final 0, and latents after every step, by diffusers.

    Args:
        sigmas: instead of the scheduler's own.
    """
    import diffusers
    import torch

    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2)
    scheduler = {
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow, solver_type="bh2"),
        "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**flow, algorithm_type="dpmsolver++"),
    }[kind]()
    scheduler.set_timesteps(steps)
    if sigmas is not None:
        first = min(sigmas[0], 1 - 1e-6)  # as UniPC's own schedule has it; at 1 its weights are not finite
        scheduler.sigmas = torch.tensor([first, *sigmas[1:], 0.0])
    noise, matrix = map(torch.from_numpy, inputs())
    x, latents = noise, []
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        velocity = torch.tanh(x @ matrix) * (1 + sigma) - x
        x = scheduler.step(velocity, timestep, x).prev_sample
        latents.append(x.numpy())
    return scheduler.sigmas.numpy()[:-1], np.stack(latents)


def make(file: str | Path) -> None:
    import diffusers

    noise, matrix = inputs()
    tensors = {"velocity/noise": noise, "velocity/matrix": matrix}
    for kind, steps, shift in CASES:
        sigmas, latents = diffusers_path(kind, steps, shift)
        tensors |= {f"{kind}/{steps}_{shift:g}/sigmas": sigmas, f"{kind}/{steps}_{shift:g}/x": latents}
    save_file(tensors, file, {"diffusers": json.dumps(diffusers.__version__)})


if __name__ == "__main__":
    make(sys.argv[1])
