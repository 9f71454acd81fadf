"""Clean frames: latents of the first frames stay clean among the noisy ones, at timestep 0 (Wan 2.2 TI2V-5B)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from ditmem_jax.conditions.condition import ImageNetworks
from ditmem_jax.conditions.images import cover
from ditmem_jax.config import Config, DiTConfig
from ditmem_jax.data.video import Frames, to_unit
from ditmem_jax.errors import UserError
from ditmem_jax.models.wan.vae import encode
from ditmem_jax.types import GivenFrames


class CleanFrames:
    """First frames of a number that fills latent frames: one, or one and a multiple of the VAE's stride in time."""

    def __init__(self, config: Config):
        self.config = config

    @staticmethod
    def serves(dit: DiTConfig) -> bool:
        return dit.clean_frames

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Of the two ways to round the shape of the picture to whole tokens, one side first, the nearer one."""
        video, (_, *patch) = self.config.video, self.config.dit.patch_size
        step_h, step_w = (self.config.vae.spatial_stride * size for size in patch)
        area, ratio = video.height * video.width, width / height
        exact_width = (area * ratio) ** 0.5

        def down(size: float, step: int) -> int:
            return max(int(size // step), 1) * step

        first_width, first_height = down(exact_width, step_w), down(area / exact_width, step_h)
        candidates = (
            (first_height, down(area / first_height, step_w)),
            (down(area / first_width, step_h), first_width),
        )

        def distance(size: tuple[int, int]) -> float:
            found = size[1] / size[0]
            return max(ratio / found, found / ratio)

        return min(candidates, key=distance)

    def encode(self, frames: Sequence[GivenFrames], networks: ImageNetworks) -> dict[str, np.ndarray]:
        video, shape = self.config.video, self.config.latent_shape
        clean = np.zeros((len(frames), *shape), np.float32)
        given = np.zeros((len(frames), shape[0]), bool)
        for sample, each in enumerate(frames):
            self.check(each)
            pixels = to_unit(cover(each.first, video.height, video.width))
            latents = networks.to_host(encode(networks.vae, jnp.asarray(pixels[None])))[0]
            clean[sample, : len(latents)], given[sample, : len(latents)] = latents, True
        return {"clean": clean, "given": given}

    def stored(self, clip: Frames) -> None:
        """Nothing: the clean frames of a record are the first of its latents."""

    def layout(self) -> dict[str, tuple[int, ...]]:
        return {}

    def check(self, frames: GivenFrames | None) -> None:
        if frames is None:
            return
        count, stride = len(frames.first), self.config.vae.temporal_stride
        if frames.last is not None:
            raise UserError(
                "this transformer takes no last frame",
                expected="the first frames alone",
                fix="leave the last frame out, or a model such as Wan2.1-FLF2V-14B",
            )
        if (count - 1) % stride or count >= self.config.video.frames:
            most = self.config.video.frames - stride
            raise UserError(
                "the number of given frames does not fit",
                expected=f"1, {1 + stride}, ... up to {most}: {stride}n + 1, fewer than video.frames",
                found=count,
                fix=f"use {min(max(count - 1, 0) // stride * stride + 1, most)} frames",
            )
