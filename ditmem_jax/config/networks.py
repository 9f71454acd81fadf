"""The configuration of networks: sizes and kinds of all that has weights. `config.schema` says how they are used."""

import dataclasses
import math
import re
from typing import Literal

import numpy as np

from ditmem_jax.config.checks import check, require
from ditmem_jax.errors import UserError

TRAIN_STEPS = 1000
"""Timesteps of the noise scale: a transformer sees noise level sigma as timestep 1000 sigma."""


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The Wan video transformer."""

    dim: int
    """[channels] Width of the tokens."""
    ffn_dim: int
    """[channels] Width inside the feed-forward layers."""
    num_heads: int
    """Attention heads."""
    num_layers: int
    """Transformer blocks."""
    in_dim: int = 16
    """[channels] Channels of the noisy latents, and beyond `out_dim` a condition beside them, such as a first frame."""
    out_dim: int = 16
    """[channels] Channels of the predicted velocity: those of the latents."""
    text_dim: int = 4096
    """[channels] Width of the text embeddings."""
    text_len: int = 512
    """[tokens] Length that text embeddings are cut and padded to."""
    freq_dim: int = 256
    """[channels] Width of the sinusoidal embedding of a timestep."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """[latents] Latent cells along time, height and width in one video token."""
    eps: float = 1e-6
    """Added to variances in normalisation layers."""
    image_dim: int | None = None
    """[channels] Width of CLIP image tokens that cross-attention reads beside the text; None: a kind
    without them."""
    image_positions: int | None = None
    """[tokens] Image tokens that have learned positions: those of a first and a last frame together (FLF2V); None: a
    kind that reads the tokens of a first frame, if any."""
    clean_frames: bool = False
    """Takes given frames as clean latents at timestep 0 among the noisy ones, as it was trained to (Wan 2.2 TI2V-5B)."""

    def __post_init__(self):
        check("dit", self, "at least 1", "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim")
        check("dit", self, "at least 1", "text_dim", "text_len", "freq_dim", "patch_size", "image_dim")
        check("dit", self, "at least 1", "image_positions")
        check("dit", self, "above 0", "eps")
        require(
            self.image_positions is None or self.image_dim is not None,
            "dit.image_positions are of image tokens",
            expected="a dit.image_dim",
            found=f"dit.image_dim = None, dit.image_positions = {self.image_positions}",
        )
        require(
            self.in_dim >= self.out_dim,
            "dit.in_dim holds the noisy latents and a condition",
            expected=f"at least dit.out_dim = {self.out_dim}",
            found=self.in_dim,
        )
        require(
            not self.clean_frames or (self.in_dim == self.out_dim and self.patch_size[0] == 1),
            "dit.clean_frames are given among the noisy ones",
            expected="no channels for a condition, and a patch of one latent frame",
            found=f"{self.in_dim - self.out_dim} channels, {self.patch_size[0]} frames",
        )
        require(
            self.dim % self.num_heads == 0 and (self.dim // self.num_heads) % 2 == 0,
            "dit.dim must split into heads of even size",
            expected=f"a multiple of 2 * num_heads = {2 * self.num_heads}",
            found=self.dim,
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def condition_dim(self) -> int:
        """Channels of the condition; 0 for a kind without one."""
        return self.in_dim - self.out_dim


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Two transformers as one model (Wan 2.2 A14B).

    The network "dit_high" of the weights serves at high noise, "dit" below it.
    """

    boundary: float | None = None
    """[noise level] Noise level from which on the expert for high noise serves; None: a single transformer."""
    trains: Literal["both", "high", "low"] = "both"
    """Expert whose memory encoder a run trains, on the noise levels that fall to it; both: one encoder
    for the two."""

    def __post_init__(self):
        require(
            self.boundary is None or 0 < self.boundary < 1,
            "experts.boundary is a noise level",
            expected="0 < level < 1, or None",
            found=self.boundary,
        )
        require(
            self.boundary is not None or self.trains == "both",
            "experts.trains names one of two experts, but there is no experts.boundary",
            expected="both",
            found=self.trains,
        )

    def trained_at(self, sigma: float) -> bool:
        """Return True if noise level `sigma` falls to an expert whose memory a run trains."""
        return self.trains == "both" or bool(self.is_high(sigma)) == (self.trains == "high")

    def is_high(self, sigma: float | np.ndarray) -> np.bool_ | np.ndarray:
        """Return True where `sigma` falls to the expert for high noise: from timestep 1000 `boundary` on.

        Timesteps are compared in float32, as the transformer sees them: rounding in a schedule decides nothing. Without
        a boundary no level is high.
        """
        boundary = np.inf if self.boundary is None else self.boundary
        return np.float32(TRAIN_STEPS * sigma) >= np.float32(TRAIN_STEPS * boundary)


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """The DiT-Mem memory encoder.

    A new memory says nothing true: the less it weighs in attention (`strength`), the less it harms until it does.
    Blocks of the transformer read it alike, as released, or each in its own way (`gate`, `reading`).
    """

    dim: int
    """[channels] Width of the memory tokens: that of the transformer."""
    in_dim: int = 16
    """[channels] Channels of a reference video's latents."""
    stages: tuple[tuple[int, int, int, int], ...] = ((512, 7, 4, 2), (768, 3, 1, 2))
    """(channels, kernel, stride, pool) of each convolution, the last three in cells along every axis."""
    latent_grid: tuple[int, int, int] = (21, 60, 104)
    """[latents] Size of a reference's latents along time, height and width."""
    filter: Literal["released", "radial"] = "released"
    """How a band filters frequencies. released: stored weights, for one grid only. radial: by the true
    distance from frequency zero, for any grid."""
    tokens: int | tuple[int, int, int] = 100
    """[tokens] Tokens per band and video. A number: the released scheme, pooled over time to that many, of
    which equal ones are kept once. A grid (t, h, w): distinct cells."""
    num_heads: int = 8
    """Heads of the self-attention over the tokens of all references."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation after a convolution."""
    dropout: float = 0.5
    """[probability] Dropout of what the filters let through, in training."""
    strength: float | None = None
    """Weight of the memory in attention before training, which learns it band by band; None: 1 for
    good, as released."""
    eps: float = 1e-6
    """Added to mean squares in the normalisation of tokens."""
    num_layers: int | None = None
    """[blocks] Blocks of the transformer, which a gate or a reading needs to know."""
    blocks: tuple[int, int] | None = None
    """[blocks] First and last block that read the memory; None: all. Blocks before the first need no backward pass."""
    gate: Literal["none", "fixed", "learned"] = "none"
    """Weight of the memory by block, band and noise level. fixed: from a measured start. learned: from there on."""
    gate_share: float = 0.01
    """[share of attention] Attention that the memory takes of every block at the gate's start, at noise level 1."""
    reading: int = 0
    """[rank] Rank of what each block adds to its keys and values of memory tokens; 0: nothing."""

    kind: Literal["dit_mem"] = "dit_mem"
    """The kind of memory encoder: one of reference videos."""

    def __post_init__(self):
        require(
            self.num_layers is not None or (self.gate == "none" and not self.reading),
            "memory.gate and memory.reading need to know the blocks of the transformer",
            expected="memory.num_layers = dit.num_layers",
            found=self.num_layers,
        )
        if self.blocks is not None:
            first, last = self.blocks
            require(
                0 <= first <= last and (self.num_layers is None or last < self.num_layers),
                "memory.blocks are the first and the last block that read the memory",
                expected=f"0 <= first <= last < {self.num_layers or 'the number of blocks'}",
                found=self.blocks,
            )
        require(
            self.gate == "none" or self.strength is None,
            "memory.gate begins at a measured weight, and memory.strength names one",
            expected="memory.strength = None with a gate",
            found=self.strength,
        )
        require(
            0 < self.gate_share < 0.5,
            "memory.gate_share",
            expected="a share of attention below 0.5",
            found=self.gate_share,
        )
        require(self.reading >= 0, "memory.reading is a rank", expected="0 or more", found=self.reading)
        _require_strength(self.strength)
        check("memory", self, "at least 1", "dim", "in_dim", "stages", "latent_grid", "tokens", "num_heads")
        check("memory", self, "above 0", "eps")
        require(
            self.dim % self.num_heads == 0,
            "memory.dim must divide into memory.num_heads",
            expected=f"a multiple of {self.num_heads}",
            found=self.dim,
        )
        require(
            0 <= self.dropout < 1,
            "memory.dropout is a probability",
            expected="0 <= p < 1",
            found=self.dropout,
        )
        grid = self.latent_grid
        for _, kernel, stride, pool in self.stages:
            grid = tuple(((n + 2 * (kernel // 2) - kernel) // stride + 1) // pool for n in grid)
        require(
            all(grid),
            "memory.stages pool the latents away",
            expected="at least one cell left on every axis",
            found=f"{self.latent_grid} becomes {grid}",
            fix="smaller strides or pools, or larger latents",
        )

    @property
    def reading_blocks(self) -> int:
        """How many blocks of the transformer read the memory; 0 where the configuration does not tell."""
        first, last = self.blocks or (0, (self.num_layers or 0) - 1)
        return last - first + 1

    @property
    def feature_grid(self) -> tuple[int, int, int]:
        """The grid (t, h, w) that the convolutions leave of `latent_grid`."""
        grid = self.latent_grid
        for _, kernel, stride, pool in self.stages:
            grid = tuple(((n + 2 * (kernel // 2) - kernel) // stride + 1) // pool for n in grid)
        return grid


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters of the transformer's linear layers: x W becomes x W + (alpha / rank) x A B."""

    rank: int = 16
    """Columns of A and rows of B."""
    alpha: float = 16.0
    """Scale of what adapters add, times `rank`."""
    targets: tuple[str, ...] = (r"\b(self|cross)_attention\.[qkvo]$",)
    """Regular expressions that are searched in the paths of linear layers, such as
    "blocks.self_attention.q". By default the projections of attention, which peers adapt first."""

    def __post_init__(self):
        check("adapter", self, "at least 1", "rank")
        check("adapter", self, "a finite number", "alpha")
        require(len(self.targets) > 0, "adapter.targets", expected="some linear layers", found="none")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise UserError(
                    "adapter.targets", expected="regular expressions", found=f"{target}: {error}"
                ) from error

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class FreeTokensConfig:
    """Memory tokens learned for each source, without any encoder: a control for what reference videos add.

    A sample's source is that of most of its reference videos.
    """

    dim: int
    """[channels] Width of the memory tokens: that of the transformer."""
    tokens: int = 100
    """[tokens] Tokens of each source."""
    column: str = "source"
    """Column of the records that names the source of a video: "source", or another of the user's table."""
    sources: tuple[str, ...] = ()
    """Names that have tokens; a run fills them in from the references of its records."""
    strength: float | None = None
    """Weight of the memory in attention before training, which learns it; None: 1 for good."""
    kind: Literal["free_tokens"] = "free_tokens"
    """The kind of memory encoder: tokens of sources."""

    def __post_init__(self):
        check("memory", self, "at least 1", "dim", "tokens")
        _require_strength(self.strength)


def _require_strength(strength: float | None) -> None:
    require(
        strength is None or 0 < strength < math.inf,
        "memory.strength is a weight to begin with",
        expected="above 0, or None",
        found=strength,
    )


EncoderConfig = MemoryConfig | FreeTokensConfig
"""Kinds of memory encoders, told apart by `kind`; the first is meant where none is named."""


# Statistics of Wan 2.1's latents over its training videos, one pair per channel.
WAN21_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The causal video VAE of Wan; the defaults are those of Wan 2.1."""

    dim: int = 96
    """[channels] Width of the first level of the encoder."""
    z_dim: int = 16
    """[channels] Channels of the latents."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level as a multiple of `dim`. Between two levels, height and width are halved."""
    num_res_blocks: int = 2
    """Residual blocks of a level."""
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """True where time is halved as well, for each step between two levels."""
    mean: tuple[float, ...] = WAN21_LATENT_MEAN
    """Mean of each latent channel over the training videos of the VAE."""
    std: tuple[float, ...] = WAN21_LATENT_STD
    """Standard deviation of each latent channel over the same videos."""
    patch_size: int = 1
    """[px] Pixels along each side that become channels before the first convolution."""
    decoder_dim: int | None = None
    """[channels] `dim` of the decoder; None: that of the encoder."""
    shortcuts: bool = False
    """A shortcut without parameters around each level (Wan 2.2); otherwise upsampling halves the
    channels."""

    def __post_init__(self):
        sizes = ("dim", "z_dim", "dim_mult", "num_res_blocks", "patch_size", "decoder_dim")
        check("vae", self, "at least 1", *sizes)
        check("vae", self, "a finite number", "mean")
        check("vae", self, "above 0", "std")
        require(
            len(self.mean) == len(self.std) == self.z_dim,
            "vae.mean and vae.std need one number per latent channel",
            expected=self.z_dim,
            found=f"{len(self.mean)} and {len(self.std)}",
        )
        require(
            len(self.temporal_downsample) == len(self.dim_mult) - 1,
            "vae.temporal_downsample needs one entry per downsampling",
            expected=len(self.dim_mult) - 1,
            found=len(self.temporal_downsample),
        )

    @property
    def spatial_stride(self) -> int:
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The latent grid (T, H, W) of a clip in pixels; raises for a clip that does not divide."""
        time, space = self.temporal_stride, self.spatial_stride
        nearest_frames = max(1, round((frames - 1) / time) * time + 1)
        require(
            frames >= 1 and (frames - 1) % time == 0,
            "the number of frames does not fit the VAE",
            expected=f"{time}n + 1 frames",
            found=frames,
            fix=f"use {nearest_frames} frames",
        )
        for name, size in (("height", height), ("width", width)):
            require(
                size >= space and size % space == 0,
                f"the {name} does not fit the VAE",
                expected=f"a multiple of {space} pixels",
                found=size,
                fix=f"use {max(1, round(size / space)) * space}",
            )
        return (frames - 1) // time + 1, height // space, width // space


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """The UMT5 text encoder."""

    dim: int = 4096
    """[channels] Width of the embeddings."""
    dim_attn: int = 4096
    """[channels] Width of all attention heads together."""
    dim_ffn: int = 10240
    """[channels] Width inside the feed-forward layers."""
    num_heads: int = 64
    """Attention heads."""
    num_layers: int = 24
    """Transformer blocks."""
    vocab: int = 256384
    """[tokens] Size of the vocabulary."""
    num_buckets: int = 32
    """Ranges of distance that relative positions are told apart by."""
    max_dist: int = 128
    """[tokens] Distance from which on all relative positions are one."""

    def __post_init__(self):
        check("text", self, "at least 1", *(field.name for field in dataclasses.fields(self)))
        require(
            self.dim_attn % self.num_heads == 0,
            "text.dim_attn must divide into text.num_heads",
            expected=f"a multiple of {self.num_heads}",
            found=self.dim_attn,
        )


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """CLIP's image encoder, for transformers that read image tokens; the defaults are those of Wan 2.1."""

    dim: int = 1280
    """[channels] Width of the tokens."""
    ffn_dim: int = 5120
    """[channels] Width inside the feed-forward layers."""
    num_heads: int = 16
    """Attention heads."""
    num_layers: int = 31
    """Transformer blocks that are computed: all but the last."""
    image_size: int = 224
    """[px] Side of the pictures."""
    patch_size: int = 14
    """[px] Side of the patch that becomes a token."""
    eps: float = 1e-5
    """Added to variances in normalisation layers."""

    def __post_init__(self):
        numbers = ("dim", "ffn_dim", "num_heads", "num_layers", "image_size", "patch_size")
        check("clip", self, "at least 1", *numbers)
        check("clip", self, "above 0", "eps")
        for name, part, whole in (
            ("dim", "num_heads", self.dim),
            ("image_size", "patch_size", self.image_size),
        ):
            require(
                whole % getattr(self, part) == 0,
                f"clip.{name} must divide into clip.{part}",
                expected=f"a multiple of {getattr(self, part)}",
                found=whole,
            )

    @property
    def tokens(self) -> int:
        """Tokens of a picture: one a patch, after the class token."""
        return 1 + (self.image_size // self.patch_size) ** 2
