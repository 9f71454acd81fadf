"""Frames as channels: a mask and the latents of a clip that is grey but for its given frames, beside the noisy latents.

Wan 2.1's transformers also read CLIP tokens of the pictures, those of FLF2V of the first and the last one. Those of
Wan 2.2 (I2V-A14B) read none, and take a last frame where there is one.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from ditmem_jax.conditions.condition import ImageNetworks
from ditmem_jax.conditions.images import bicubic, cover
from ditmem_jax.config import Config, DiTConfig
from ditmem_jax.data.video import Frames, to_unit
from ditmem_jax.errors import UserError
from ditmem_jax.models.wan.clip import image_tokens
from ditmem_jax.models.wan.vae import encode
from ditmem_jax.types import GivenFrames


class FrameChannels:
    """Any number of first frames, and a last one."""

    def __init__(self, config: Config):
        self.config = config

    @staticmethod
    def serves(dit: DiTConfig) -> bool:
        return dit.condition_dim > 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Each side of the picture's shape rounded down to whole tokens by itself."""
        video, (_, *patch) = self.config.video, self.config.dit.patch_size
        area, step = video.height * video.width, self.config.vae.spatial_stride
        exact = np.sqrt(area * height / width), np.sqrt(area * width / height)
        return tuple(max(int(side // step // p), 1) * p * step for side, p in zip(exact, patch, strict=True))

    def check(self, frames: GivenFrames | None) -> None:
        dit = self.config.dit
        if frames is None:
            raise UserError(
                "this transformer makes clips of pictures",
                expected="a first frame" if dit.image_positions is None else "a first and a last frame",
                found="none",
            )
        last = frames.last is not None
        if last != (dit.image_positions is not None) and (dit.image_dim is not None):
            raise UserError(
                "the given frames do not fit the transformer",
                expected="no last frame" if last else "a last frame too",
                found="one" if last else "none",
            )
        if (count := len(frames.first) + last) >= self.config.video.frames:
            expected = f"fewer than video.frames = {self.config.video.frames}"
            raise UserError("as many frames are given as a clip has", expected=expected, found=count)

    def encode(self, frames: Sequence[GivenFrames], networks: ImageNetworks) -> dict[str, np.ndarray]:
        for each in frames:
            self.check(each)
        made = {"frames": np.stack([self._channels(each, networks) for each in frames])}
        if self.config.dit.image_dim is not None:
            made["image"] = np.stack([self._tokens(each, networks) for each in frames])
        return made

    def stored(self, clip: Frames) -> GivenFrames:
        return GivenFrames(clip[:1], clip[-1] if self.config.dit.image_positions else None)

    def layout(self) -> dict[str, tuple[int, ...]]:
        dit, (time, height, width, _) = self.config.dit, self.config.latent_shape
        shapes = {"frames": (time, height, width, dit.condition_dim)}
        if dit.image_dim is not None:
            shapes["image"] = (dit.image_positions or self.config.clip.tokens, dit.image_dim)
        return shapes

    def _pictures(
        self, frames: GivenFrames
    ) -> tuple[UInt8[np.ndarray, "n H W 3"], UInt8[np.ndarray, "m H W 3"]]:
        """The first frames and the last one, or none, in one shape: that of the first, which is stretched to a clip
        whose shape follows it (see `size`); else that of the clip, which they are cut to."""
        shape, video = frames.first.shape[1:3], self.config.video
        clip, step = np.array([video.height, video.width]), self.config.vae.spatial_stride
        steps = step * np.array(self.config.dit.patch_size[1:])
        least, most = (clip / shape).max(), ((clip + steps) / shape).min()
        if least >= most:  # no scale takes the picture's shape to one that is rounded down to the clip's
            shape = video.height, video.width
        last = frames.first[:0] if frames.last is None else frames.last[None]
        return cover(frames.first, *shape), cover(last, *shape)

    def _channels(self, frames: GivenFrames, networks: ImageNetworks) -> np.ndarray:
        """The mask, with a channel for each frame that a latent frame is of, then the latents."""
        video, stride = self.config.video, self.config.vae.temporal_stride
        pixels = np.zeros((video.frames, video.height, video.width, 3), np.float32)  # grey
        mask = np.zeros(video.frames, np.float32)
        first, last = self._pictures(frames)
        for pictures, start in ((first, 0), (last, video.frames - len(last))):
            where = slice(start, start + len(pictures))
            pixels[where], mask[where] = bicubic(to_unit(pictures), video.height, video.width), 1
        latents = networks.to_host(encode(networks.vae, jnp.asarray(pixels[None])))[0]
        mask = np.concatenate([np.repeat(mask[:1], stride - 1), mask]).reshape(-1, 1, 1, stride)
        return np.concatenate([np.broadcast_to(mask, (*latents.shape[:3], stride)), latents], axis=-1)

    def _tokens(self, frames: GivenFrames, networks: ImageNetworks) -> np.ndarray:
        """CLIP tokens of the first picture, then of the last."""
        first, last = self._pictures(frames)
        side = self.config.clip.image_size
        pictures = bicubic(to_unit(np.concatenate([first[:1], last])), side, side)
        tokens = networks.to_host(image_tokens(networks.clip, jnp.asarray(pictures))).astype(np.float32)
        return tokens.reshape(-1, tokens.shape[-1])
