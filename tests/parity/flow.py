"""Noise schedules, training weights and Euler steps against the released ones."""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from ditmem_jax.config.networks import TRAIN_STEPS
from ditmem_jax.diffusion import flow
from ditmem_jax.diffusion.solvers import SOLVERS
from ditmem_jax.errors import UserError
from tests.parity.golden import Check, GoldenFile


def recognise(golden: GoldenFile) -> str | None:
    names = golden.tensors
    return (
        "schedule" if "train/sigmas" in names or any(name.startswith("sample/") for name in names) else None
    )


def check(golden: GoldenFile) -> list[Check]:
    """Training schedule with its weights, noising and target; each sampling schedule with its trajectory."""
    if golden.meta.get("sigma_min", 0) != 0 or not golden.meta.get("extra_one_step", True):
        raise UserError(
            "another kind of schedule", expected="sigma_min 0 with extra_one_step", found=golden.meta
        )
    return [*_training(golden), *_sampling(golden)]


def _training(golden: GoldenFile) -> Iterator[Check]:
    want = golden.under("train/")
    if not want:
        return
    shift = float(golden.meta["shift"])
    sigmas = flow.shifted_sigmas(len(want["sigmas"]), shift)
    clean, noise = jnp.asarray(want["x0"]), jnp.asarray(want["noise"])
    yield Check("train/sigmas", sigmas, want["sigmas"])
    yield Check("train/timesteps", TRAIN_STEPS * sigmas, want["timesteps"])
    yield Check("train/weights", flow.training_weights(shift), want["weights"])
    yield Check("train/target", flow.target(clean, noise), want["target"])
    for name, noised in want.items():
        if name.startswith("noised_at_index_"):
            sigma = jnp.full(len(clean), sigmas[int(name.rsplit("_", 1)[1])], jnp.float32)
            yield Check(f"train/{name}", flow.add_noise(clean, noise, sigma), noised)


def _sampling(golden: GoldenFile) -> Iterator[Check]:
    for key in sorted({name.rsplit("/", 1)[0] for name in golden.tensors if name.startswith("sample/")}):
        want = golden.under(f"{key}/")
        steps, shift = key.removeprefix("sample/").split("_")
        sigmas = flow.shifted_sigmas(int(steps), float(shift))
        yield Check(f"{key}/sigmas", sigmas, want["sigmas"])
        yield Check(f"{key}/timesteps", TRAIN_STEPS * sigmas, want["timesteps"])
        changes = SOLVERS["euler"].coefficients(sigmas)[:, 1].reshape(-1, *[1] * (want["v"].ndim - 1))
        moved = want["x"][0] + np.cumsum(changes * want["v"], axis=0)
        yield Check(f"{key}/x", np.concatenate([want["x"][:1], moved]), want["x"])


KINDS: dict[str, Callable[[GoldenFile], list[Check]]] = {"schedule": check}
