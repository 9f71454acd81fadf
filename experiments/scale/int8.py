"""How far weights in 8 bits move the velocity: `python -m experiments.scale.int8` (five minutes, 12 GB of memory).

Relative L2 distances, on the CPU: of int8 from bfloat16; of bfloat16 from float32, with the same weights; and of int8
from bfloat16 weights where both compute in float32, which is what rounding the weights does by itself.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from ditmem_jax.config import DiTConfig
from ditmem_jax.config.files import load_config
from ditmem_jax.config.presets import DIT_PRESETS
from ditmem_jax.encode.shards import embed
from ditmem_jax.models.quantised import to_int8
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.storage.tensors import open_tensors
from ditmem_jax.storage.weights import load_umt5
from ditmem_jax.types import Conditioning

SIGMAS = (0.1, 0.5, 0.9)
WAN = dataclasses.replace(DIT_PRESETS["wan2.1-t2v-1.3b"], text_len=64)
RANDOM = {
    "random, 1.3B widths, 4 blocks": dataclasses.replace(WAN, num_layers=4),
    "random, 768 wide, 12 blocks": dataclasses.replace(
        WAN, num_layers=12, dim=768, ffn_dim=4480, num_heads=6
    ),
    "random, 1.3B in full, 30 blocks": WAN,
}
GRID = (2, 16, 16)  # 128 tokens

Arrays = dict[str, np.ndarray]


def random_weights(config: DiTConfig) -> Arrays:
    """Matrices that keep the size of what they multiply, in bfloat16."""
    _, shapes = abstract(lambda: DiT(config, rngs=nnx.Rngs(0)))
    rng, arrays = np.random.default_rng(0), {}
    for name, x in shapes.items():
        values = rng.standard_normal(x.shape, np.float32)
        values *= x.shape[-2] ** -0.5 if name.endswith("kernel") else 0.02
        arrays[name] = (values + name.endswith("scale")).astype(ml_dtypes.bfloat16)
    return arrays


def in_8_bits(arrays: Arrays, config: DiTConfig) -> Arrays:
    """The arrays of an int8 network."""
    _, shapes = abstract(lambda: DiT(config, int8=True, rngs=nnx.Rngs(0)))
    arrays = dict(arrays)
    for name in [name for name, x in shapes.items() if x.dtype == jnp.int8]:
        arrays[name], arrays[name.removesuffix("kernel") + "scale"] = to_int8(arrays[name].astype(np.float32))
    return arrays


def distances(
    config: DiTConfig, arrays: Arrays, grid: tuple[int, int, int], prompt: np.ndarray | None = None
) -> Iterator[list[float]]:
    """Each of the three distances, at all SIGMAS, of latents of noise.

    With a prompt [L, D] over 16 samples together, since those of a trained network differ; else one with a random text.
    """
    rng, samples = np.random.default_rng(1), 1 if prompt is None else 16
    latents = rng.standard_normal((samples, *grid, config.in_dim)).astype(np.float32)
    text = rng.standard_normal((1, config.text_len, config.text_dim)).astype(np.float32)
    if prompt is not None:
        text = np.pad(prompt, ((0, config.text_len - len(prompt)), (0, 0)))[None]
    latents, text = jnp.asarray(latents), jnp.repeat(jnp.asarray(text), samples, axis=0)

    def velocities(arrays: Arrays, int8: bool, dtype) -> list[np.ndarray]:
        structure, _ = abstract(lambda: DiT(config, int8=int8, rngs=nnx.Rngs(0), dtype=dtype))
        arrays = {name: x if x.dtype == np.int8 else x.astype(dtype) for name, x in arrays.items()}
        run = jax.jit(lambda arrays, timestep: structure.merge(arrays)(latents, timestep, Conditioning(text)))
        return [np.asarray(run(arrays, jnp.full(samples, 1000 * sigma))) for sigma in SIGMAS]

    rounded = in_8_bits(arrays, config)
    half, full = (velocities(arrays, False, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    eight, eight_in_full = (velocities(rounded, True, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    for pairs in zip((eight, half, eight_in_full), (half, full, full), strict=True):
        yield [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(*pairs, strict=True)]


def _of_random_weights(config: DiTConfig) -> Iterator[list[float]]:
    yield from distances(
        config, random_weights(config), GRID
    )  # made when their turn comes, and then given back


def main() -> None:
    table = Table(
        "network", "int8 to bfloat16", "bfloat16 to float32", "both in float32", title="0.1, 0.5, 0.9"
    )
    tiny = load_config("configs/tiny.py")
    stored, _ = open_tensors(Path(tiny.weights.path) / "dit.safetensors")
    trained = {name: x.read().astype(ml_dtypes.bfloat16) for name, x in stored.items()}
    prompt = embed(*load_umt5(tiny), ["A ball falls on planet Zorvex."])[0]
    grid = tiny.latent_shape[:3]
    cases = [("trained tiny Wan", distances(tiny.dit, trained, grid, prompt))]
    cases += [(name, _of_random_weights(config)) for name, config in RANDOM.items()]
    for name, found in cases:
        table.add_row(name, *(", ".join(f"{x:.4f}" for x in distance) for distance in found))
    Console().print(table)


if __name__ == "__main__":
    main()
