"""Common parts of the tiny-Wan training scripts: sizes, initial weights, clips, file names."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ditmem_jax.config import DiTConfig, UMT5Config, VAEConfig
from ditmem_jax.worlds.laws import PHENOMENA, sample_world
from ditmem_jax.worlds.simulate import Clip, sample_clip

WEIGHTS = Path(__file__).parent / "weights"
BUILD = Path("build/tiny_wan")
TEXT_LENGTH = 32

VAE_CONFIG = VAEConfig(dim=8, z_dim=8, num_res_blocks=1, mean=(0.0,) * 8, std=(1.0,) * 8)
TEXT_CONFIG = UMT5Config(dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2, vocab=512)
DIT_CONFIG = DiTConfig(
    dim=160,
    ffn_dim=640,
    num_heads=5,
    num_layers=6,
    in_dim=8,
    out_dim=8,
    text_dim=64,
    text_len=TEXT_LENGTH,
    freq_dim=64,
)


def initialise(make: Callable[[], nnx.Module], seed: int) -> nnx.Module:
    """A module with random weights drawn by numpy: far quicker than compiling hundreds of small generators."""
    rng = np.random.default_rng(seed)
    module = nnx.eval_shape(make)
    state = nnx.state(module)
    for path, variable in nnx.to_flat_state(state):
        name, shape = str(path[-1]), variable.get_value().shape
        if isinstance(variable, nnx.RngState):
            continue
        if name == "bias":
            value = np.zeros(shape)
        elif name == "scale":
            value = np.ones(shape)
        elif name in ("kernel",):
            stacked = path[0] == "blocks"
            value = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:-1] if stacked else shape[:-1]))
        else:  # modulations and embeddings
            value = rng.normal(size=shape) * shape[-1] ** -0.5
        variable.set_value(jnp.asarray(value, jnp.float32))
    nnx.update(module, state)
    return module


def draw_clip(seed: int, index: int) -> Clip:
    """Clip `index` of an endless stream: a new unnamed world each, falls twice as often as the rest."""
    rng = np.random.default_rng([seed, index])
    phenomenon = rng.choice(["fall", *PHENOMENA])
    return sample_clip(rng, sample_world(rng), str(phenomenon))


def to_float(video: np.ndarray) -> np.ndarray:
    """uint8 frames -> float32 in [-1, 1]."""
    return video.astype(np.float32) / 127.5 - 1


def prefetch(make: Callable[[int], object], steps: range) -> Iterator[object]:
    """`make(step)` for each step, computed one ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(make, steps[0])
        for step in steps:
            value, future = future.result(), pool.submit(make, step + 1)
            yield value


def muon(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon for matrices and convolutions, Adam at a tenth of its rate for the rest.

    Adam alone kept the narrow VAE at the mean picture for as long as it was tried, 600 steps.
    """
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule,
            beta=0.9,
            adam_b2=0.99,
            adam_learning_rate=lambda step: 0.1 * schedule(step),
            muon_weight_dimension_numbers=_matrices,
        ),
    )


def _matrices(weights: nnx.State) -> nnx.State:
    """The axes that make a kernel a matrix: all inputs of a tap by outputs, layer by layer where layers are stacked."""

    def axes(path, weight):
        if "kernel" not in jax.tree_util.keystr(path):
            return None
        first = 1 if "blocks" in jax.tree_util.keystr(path) else 0
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, weight.ndim - 1)), weight.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, weights)


def ema(average, new, decay: float):
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average, new)
