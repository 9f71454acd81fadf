"""The measured case: one model, one clip, and operations that both sides know by name."""

import dataclasses
import math

from ditmem_jax.config import (
    Config,
    MemoryConfig,
    ObjectiveConfig,
    RunConfig,
    SampleConfig,
    VideoConfig,
    WeightsConfig,
)
from ditmem_jax.config.presets import DIT_PRESETS

OPERATIONS = ("train", "denoise", "denoise without memory", "encoder", "vae encode", "vae decode", "matmul")
# Latent grids (T, H, W) by how many tokens they make.
GRIDS = {500: (5, 20, 20), 2_000: (5, 40, 40), 4_000: (5, 40, 80), 8_000: (5, 80, 80), 32_760: (21, 60, 104)}
# Sides of the square matrices whose product is the measured peak: where bfloat16 is fast, small ones end too soon.
MATMUL = {"float32": 4_096, "bfloat16": 16_384}
REFERENCES = (21, 60, 104)  # latent grid of reference videos: 81 frames of 480 x 832


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one measurement: a transformer as wide as Wan's 1.3B with `layers` blocks, one clip of `tokens`."""

    tokens: int = 2_000
    layers: int = 4
    videos: int = 5
    dtype: str = "float32"
    remat: str = "none"
    small: bool = False  # networks and references so small that a test can run both sides

    @property
    def grid(self) -> tuple[int, int, int]:
        return GRIDS[self.tokens]

    @property
    def references(self) -> tuple[int, int, int]:
        return (5, 20, 20) if self.small else REFERENCES

    def config(self) -> Config:
        dit = dataclasses.replace(DIT_PRESETS["wan2.1-t2v-1.3b"], num_layers=self.layers)
        memory = dict(dim=dit.dim, latent_grid=self.references)
        if self.small:
            dit = dataclasses.replace(dit, dim=96, ffn_dim=192, num_heads=4, text_len=16)
            memory |= dict(dim=96, num_heads=4, stages=((16, 3, 2, 1), (24, 3, 1, 2)))
        frames, height, width = self.grid
        return Config(
            dit=dit,
            memory=MemoryConfig(**memory),
            video=VideoConfig(frames=4 * (frames - 1) + 1, height=8 * height, width=8 * width),
            weights=WeightsConfig(dtype=self.dtype),
            objective=ObjectiveConfig(memory_dropout=0.0),  # every step trains
            sample=SampleConfig(guidance=5.0),
            run=RunConfig(remat=self.remat),
        )

    @property
    def matmul(self) -> int:
        return MATMUL[self.dtype]

    @property
    def flops(self) -> dict[str, float]:
        """Multiplications and additions of the matrix products that an operation cannot do without.

        A frozen transformer's backward pass computes gradients of activations only: as many operations as forward, but
        twice in self-attention, where query, key and value all have one.
        """
        config, rows = self.config(), 2 * self.videos
        dit, length = config.dit, self.tokens
        square = dit.dim**2
        rest = 2 * length * (6 * square + 2 * dit.dim * dit.ffn_dim)  # q, k, v, o; q, o of text; feed-forward
        rest += 2 * dit.text_len * 2 * square + 4 * length * dit.text_len * dit.dim + 4 * rows * square
        scores = 4 * length * (length + rows) * dit.dim
        forward = self.layers * (rest + scores)
        encoder = _encoder_flops(config.memory) * self.videos
        return {
            "train": self.layers * (2 * rest + 3 * scores) + 3 * encoder,
            "denoise": 2 * forward,  # with and without the prompt
            "denoise without memory": 2 * forward,
            "encoder": encoder,
            "matmul": 2 * self.matmul**3,
        }


def _encoder_flops(config: MemoryConfig) -> float:
    grid, inputs, total = config.latent_grid, config.in_dim, 0
    for channels, kernel, stride, pool in config.stages:
        grid = tuple((n + 2 * (kernel // 2) - kernel) // stride + 1 for n in grid)
        total += 2 * math.prod(grid) * inputs * kernel**3 * channels
        grid, inputs = tuple(n // pool for n in grid), channels
    return 2 * (total + 2 * inputs * math.prod(grid) * config.dim)
