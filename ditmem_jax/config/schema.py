"""What can be configured: one frozen dataclass per part, built strictly from a ConfigDict.

Files under `configs/` hold values; this file holds their types, defaults, meanings and checks. An impossible
configuration raises in its constructor. The string below a field says what it means, after its unit in brackets;
`--help_config` reads it from here.
"""

import dataclasses
import itertools
import math
import re
from typing import Any, Literal

import numpy as np

from ditmem_jax.errors import UserError

TRAIN_STEPS = 1000
"""Timesteps of the noise scale: a transformer sees noise level sigma as timestep 1000 sigma."""


def _require(condition: bool, what: str, **details: Any) -> None:
    if not condition:
        raise UserError(what, **details)


RANGES = {
    "a finite number": math.isfinite,
    "above 0": lambda x: 0 < x < math.inf,
    "0 or more": lambda x: 0 <= x < math.inf,
    "at least 1": lambda x: 1 <= x < math.inf,
    "at least 1, or -1": lambda x: x == -1 or 1 <= x < math.inf,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
}
"""Ranges of numbers, as messages name them. None of them holds an infinity or a NaN."""


def _check(part: str, config: Any, expected: str, *names: str) -> None:
    """Raise a UserError unless each number in the fields `names` is in the range `expected`; None is in each."""
    for name in names:
        value = getattr(config, name)
        if not all(x is None or RANGES[expected](x) for x in np.ravel(value)):
            raise UserError(f"{part}.{name}", expected=expected, found=value)


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
        _check("dit", self, "at least 1", "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim")
        _check("dit", self, "at least 1", "text_dim", "text_len", "freq_dim", "patch_size", "image_dim")
        _check("dit", self, "at least 1", "image_positions")
        _check("dit", self, "above 0", "eps")
        _require(
            self.image_positions is None or self.image_dim is not None,
            "dit.image_positions are of image tokens",
            expected="a dit.image_dim",
            found=f"dit.image_dim = None, dit.image_positions = {self.image_positions}",
        )
        _require(
            self.in_dim >= self.out_dim,
            "dit.in_dim holds the noisy latents and a condition",
            expected=f"at least dit.out_dim = {self.out_dim}",
            found=self.in_dim,
        )
        _require(
            not self.clean_frames or (self.in_dim == self.out_dim and self.patch_size[0] == 1),
            "dit.clean_frames are given among the noisy ones",
            expected="no channels for a condition, and a patch of one latent frame",
            found=f"{self.in_dim - self.out_dim} channels, {self.patch_size[0]} frames",
        )
        _require(
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
        _require(
            self.boundary is None or 0 < self.boundary < 1,
            "experts.boundary is a noise level",
            expected="0 < level < 1, or None",
            found=self.boundary,
        )
        _require(
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
        _require(
            self.num_layers is not None or (self.gate == "none" and not self.reading),
            "memory.gate and memory.reading need to know the blocks of the transformer",
            expected="memory.num_layers = dit.num_layers",
            found=self.num_layers,
        )
        if self.blocks is not None:
            first, last = self.blocks
            _require(
                0 <= first <= last and (self.num_layers is None or last < self.num_layers),
                "memory.blocks are the first and the last block that read the memory",
                expected=f"0 <= first <= last < {self.num_layers or 'the number of blocks'}",
                found=self.blocks,
            )
        _require(
            self.gate == "none" or self.strength is None,
            "memory.gate begins at a measured weight, and memory.strength names one",
            expected="memory.strength = None with a gate",
            found=self.strength,
        )
        _require(
            0 < self.gate_share < 0.5,
            "memory.gate_share",
            expected="a share of attention below 0.5",
            found=self.gate_share,
        )
        _require(self.reading >= 0, "memory.reading is a rank", expected="0 or more", found=self.reading)
        _require_strength(self.strength)
        _check("memory", self, "at least 1", "dim", "in_dim", "stages", "latent_grid", "tokens", "num_heads")
        _check("memory", self, "above 0", "eps")
        _require(
            self.dim % self.num_heads == 0,
            "memory.dim must divide into memory.num_heads",
            expected=f"a multiple of {self.num_heads}",
            found=self.dim,
        )
        _require(
            0 <= self.dropout < 1,
            "memory.dropout is a probability",
            expected="0 <= p < 1",
            found=self.dropout,
        )
        grid = self.latent_grid
        for _, kernel, stride, pool in self.stages:
            grid = tuple(((n + 2 * (kernel // 2) - kernel) // stride + 1) // pool for n in grid)
        _require(
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
        _check("adapter", self, "at least 1", "rank")
        _check("adapter", self, "a finite number", "alpha")
        _require(len(self.targets) > 0, "adapter.targets", expected="some linear layers", found="none")
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
        _check("memory", self, "at least 1", "dim", "tokens")
        _require_strength(self.strength)


def _require_strength(strength: float | None) -> None:
    _require(
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
    """Whether time is halved as well, for each step between two levels."""
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
        _check("vae", self, "at least 1", *sizes)
        _check("vae", self, "a finite number", "mean")
        _check("vae", self, "above 0", "std")
        _require(
            len(self.mean) == len(self.std) == self.z_dim,
            "vae.mean and vae.std need one number per latent channel",
            expected=self.z_dim,
            found=f"{len(self.mean)} and {len(self.std)}",
        )
        _require(
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
        _require(
            frames >= 1 and (frames - 1) % time == 0,
            "the number of frames does not fit the VAE",
            expected=f"{time}n + 1 frames",
            found=frames,
            fix=f"use {nearest_frames} frames",
        )
        for name, size in (("height", height), ("width", width)):
            _require(
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
        _check("text", self, "at least 1", *(field.name for field in dataclasses.fields(self)))
        _require(
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
        _check("clip", self, "at least 1", *numbers)
        _check("clip", self, "above 0", "eps")
        for name, part, whole in (
            ("dim", "num_heads", self.dim),
            ("image_size", "patch_size", self.image_size),
        ):
            _require(
                whole % getattr(self, part) == 0,
                f"clip.{name} must divide into clip.{part}",
                expected=f"a multiple of {getattr(self, part)}",
                found=whole,
            )

    @property
    def tokens(self) -> int:
        """Tokens of a picture: one a patch, after the class token."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """Size of the clips."""

    frames: int = 81
    """[frames] Length of a clip."""
    height: int = 480
    """[px] Height of a clip."""
    width: int = 832
    """[px] Width of a clip."""
    fps: int = 16
    """[frames per second] Frame rate of the clips that are written."""
    resize: Literal["stretch", "crop"] = "stretch"
    """How videos of another shape become clips: both sides scaled by themselves, or a centre of the
    clip's shape."""
    sampling: Literal["even", "rate"] = "even"
    """Frames of a video that make a clip. even: spread over the whole video, as released, so that a clip of a long one
    is a time lapse. rate: at `fps`, from a window of the video."""
    clips: str = "middle"
    """Windows of "rate": head, middle, or uniform:N for up to N clips of a video that do not overlap."""
    hdr: Literal["map", "skip"] = "map"
    """Videos of high dynamic range (HLG and PQ). map: to what ordinary screens show. skip: they are left out."""

    def __post_init__(self):
        _check("video", self, "at least 1", "frames", "height", "width", "fps")
        _require(
            re.fullmatch(r"head|middle|uniform:[1-9]\d{0,5}", self.clips) is not None,
            "video.clips",
            expected="head, middle or uniform:N",
            found=self.clips,
        )


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
    """The frozen networks: where their weights are, and how they are held."""

    path: str = ""
    """Folder that `ditmem convert` wrote."""
    hub: str = ""
    """Repository on the Hugging Face hub that they were published in, for the message when they are
    missing."""
    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Type of the weights. int8: bfloat16 with the matrices of the transformer's blocks in 8 bits, half
    the memory. Training saves it only with a `run.remat` other than "none", which keeps these matrices
    in full for the backward pass."""

    @property
    def computed_in(self) -> Literal["float32", "bfloat16"]:
        """The dtype of matrix products, and of what is not held in 8 bits."""
        return "bfloat16" if self.dtype == "int8" else self.dtype


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Records to train on, records that serve as the bank, and how they are read."""

    records: str = ""
    """Folder of records to train on, made by `ditmem encode`."""
    bank: str = ""
    """Bank that references come from: a folder, or an address such as s3://bucket/bank."""
    validation: str = ""
    """Folder of records to validate on; empty: no validation."""
    kind: str = ""
    """Column of the records to validate on that tells kinds apart, such as phenomenon: another's memory is of the
    same kind; empty: of any, with the caption nearest in words."""
    group: str = ""
    """Column that tells apart what a memory is of, such as world: another's memory is of another; empty: of
    another source."""
    references: int = 5
    """[videos] Reference videos of a sample."""
    batch_size: int = 1
    """[clips] Size of a batch, of all devices together."""
    workers: int = 0
    """[processes] Processes that read ahead; 0: none but the one that trains."""
    cache: bool = False
    """Keep all records that were read in memory, in each worker."""

    def __post_init__(self):
        _check("data", self, "at least 1", "references", "batch_size")
        _check("data", self, "0 or more", "workers")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What a training step minimises."""

    kind: Literal["released", "relative", "running"] = "released"
    """released: the published loss, squared error times a bell-shaped weight over timesteps. relative:
    each sample's squared error divided by its error without memory under the same noise. running:
    divided by a running mean per noise level instead, at no extra cost."""
    density: Literal["shifted", "uniform", "spectrum"] = "shifted"
    """How noise levels are drawn. shifted: uniformly from the published shifted steps. uniform:
    uniformly from `sigma_range`. spectrum: from the histogram in `spectrum`."""
    shift: float = 5.0
    """Shift of the noise schedule of "shifted"; more than 1 moves its steps to high noise."""
    sigma_range: tuple[float, float] = (0.0, 1.0)
    """[noise level] Lowest and highest noise level of "uniform"."""
    spectrum: tuple[float, ...] = ()
    """Histogram of "spectrum": weights of evenly spaced bins of noise levels over [0, 1]."""
    memory_dropout: float = 0.1
    """[probability] Chance that a sample trains without any memory."""
    shuffle_references: bool = True
    """Give a sample its references in random order."""
    first_frame: float = 0.0
    """[probability] Chance that a sample is given its own first frame, whose latents then stay clean and count in no
    error; for a transformer with `dit.clean_frames`."""
    trains: Literal["memory", "adapter", "both"] = "memory"
    """What trains. memory: a memory encoder. adapter: an adapter of the transformer in its place, by the same samples,
    noise and budget, which is what a memory must beat; the mean of "running" is then over errors with it, and
    "relative" divides by those of the bare transformer. both: the two together."""

    def __post_init__(self):
        _check("objective", self, "above 0", "shift")
        _check("objective", self, "a finite number", "spectrum")
        low, high = self.sigma_range
        _require(
            0 <= low < high <= 1,
            "objective.sigma_range",
            expected="0 <= low < high <= 1",
            found=self.sigma_range,
        )
        _require(
            self.density != "spectrum"
            or (len(self.spectrum) > 0 and min(self.spectrum) >= 0 < sum(self.spectrum)),
            "objective.density is 'spectrum' but objective.spectrum is no histogram",
            expected="non-negative numbers with a positive sum",
            found=self.spectrum,
        )
        _require(
            0 <= self.memory_dropout < 1,
            "objective.memory_dropout is a probability",
            expected="0 <= p < 1",
            found=self.memory_dropout,
        )
        _require(
            0 <= self.first_frame <= 1,
            "objective.first_frame is a probability",
            expected="0 <= p <= 1",
            found=self.first_frame,
        )
        _require(
            self.kind != "running" or self.memory_dropout > 0,
            "objective.kind 'running' needs samples without memory",
            expected="objective.memory_dropout above 0",
            found=self.memory_dropout,
        )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How the encoder's float32 weights are updated.

    For the memory of the tiny Wan, Muon at 3e-3 learned in 400 steps what AdamW, at 1e-3 and 3e-3, did not begin to.
    """

    kind: str = "adamw"
    """A name in `train.optimizer.OPTIMIZERS`. adamw. muon: for matrices and convolutions, with NAdam for
    the rest. lion: wants a learning rate of about a tenth and a `b2` of 0.99. adafactor: keeps of the
    second moments of large matrices sums over rows and columns, and reads neither `b1` nor `b2`."""
    learning_rate: float = 1e-5
    """[per update] Size of an update, the largest of the schedule."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: held, or lowered to 0 along half a cosine until the last
    update."""
    warmup: int = 0
    """[updates] Updates over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Share, times the learning rate, that an update takes from matrices and convolutions."""
    b1: float = 0.9
    """Decay of the first moment of gradients, an average over about 1 / (1 - b1) updates."""
    b2: float = 0.999
    """Decay of the second moment of gradients."""
    clip: float = 1.0
    """Largest norm of all gradients together, which are scaled down to it; 0: none."""
    accumulate: int = 1
    """[batches] Batches whose mean gradient makes one update."""
    gate_rate: float = 1.0
    """Factor of the learning rate for `memory.gate`, whose values are logarithms and have far to go."""

    def __post_init__(self):
        _check("optim", self, "above 0", "learning_rate", "gate_rate")
        _check("optim", self, "0 or more", "warmup", "weight_decay", "clip")
        _check("optim", self, "at least 0 and below 1", "b1", "b2")
        _check("optim", self, "at least 1", "accumulate")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1, of one axis, takes the devices that the others leave."""

    data: int = -1
    """[devices] Devices over which batches are divided."""
    fsdp: int = 1
    """[devices] Devices over which batches and the weights are divided."""
    context: int = 1
    """[devices] Devices over which the tokens of a clip are divided."""
    tensor: int = 1
    """[devices] Devices over which attention heads and widths of layers are divided."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """What computes attention. auto: splash on TPUs, cudnn on GPUs for bfloat16 weights, xla
    otherwise."""

    def __post_init__(self):
        axes = ("data", "fsdp", "context", "tensor")
        _check("mesh", self, "at least 1, or -1", *axes)
        rest = [f"mesh.{axis}" for axis in axes if getattr(self, axis) == -1]
        _require(len(rest) <= 1, "mesh", expected="one -1 at most", found=f"-1 for {' and '.join(rest)}")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How clips are made."""

    steps: int = 40
    """Denoising steps."""
    shift: float = 5.0
    """Shift of the noise schedule; more than 1 moves its steps to high noise."""
    sigmas: tuple[float, ...] = ()
    """[noise levels] Levels in place of those of `steps` and `shift`, as distilled models of few steps have them:
    strictly falling, from 1 or below, without the final 0."""
    solver: Literal["euler", "unipc", "dpm++"] = "euler"
    """One of `diffusion.solvers.SOLVERS`."""
    guidance: float = 5.0
    """Scale of classifier-free guidance; 1: none."""
    guidance_high: float | None = None
    """Guidance of the expert for high noise, where there are two; None: `guidance`."""
    strength: float = 1.0
    """Scale of the memory's weight in attention; 0: exactly no memory."""
    memory_in_negative: bool = True
    """Give the memory to the negative branch of guidance too, as released; otherwise guidance pushes
    towards it."""
    memory_range: tuple[float, float] = (0.0, 1.0)
    """[noise levels] Where a memory is read; elsewhere a step is exactly the one without memory."""
    min_score: float = -1.0
    """[score] References that a search scores lower for the prompt are not read: a memory that does not fit is worse
    than none. -1: all are read."""
    negative_prompt: str = ""
    """Text of the negative branch of guidance."""
    follow_image: bool = True
    """Clips take the shape of a given first frame, at the area of `video`, as Wan's own programs make them; otherwise
    the picture is cut to the shape of `video`."""
    seed: int = 0
    """Seed of the first clip; the next clips take the seeds after it."""

    def __post_init__(self):
        _check("sample", self, "at least 1", "steps")
        _check("sample", self, "above 0", "shift")
        _check("sample", self, "a finite number", "guidance", "guidance_high")
        _check("sample", self, "0 or more", "strength", "seed")
        low, high = self.memory_range
        _require(
            0 <= low < high <= 1,
            "sample.memory_range",
            expected="0 <= low < high <= 1",
            found=self.memory_range,
        )
        levels = (*self.sigmas, 0.0)
        _require(
            levels[0] <= 1 and all(high > low for high, low in itertools.pairwise(levels)),
            "sample.sigmas",
            expected="noise levels that strictly fall, in (0, 1]",
            found=self.sigmas,
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The training run: length, logging, checkpoints, generator."""

    out: str = "runs/default"
    """Folder of the run: checkpoints, curves and the trained encoder."""
    steps: int = 1000
    """[batches] Length of the run; `optim.accumulate` of them make one update."""
    seed: int = 0
    """Seed of everything random in a run: the encoder's first weights, noise, dropout, the order of the
    data."""
    log_every: int = 10
    """[steps] Steps between two lines of the log."""
    validate_every: int = 200
    """[steps] Steps between two validations."""
    evaluators: tuple[str, ...] = ("gain",)
    """What a validation measures: names in `evaluate.kinds.EVALUATORS`. gain: from memory, at the noise levels of
    `validation_sigmas`. law: error of the laws that clips made from held-out captions show, for records of `worlds`;
    it costs the clips."""
    best: str = "gain"
    """The number of an evaluator that decides which encoder and which checkpoint are the best: the larger the
    better. Of gain: gain. Of law: law_gain."""
    validation_batches: int = 4
    """[batches] Batches of a validation."""
    validation_sigmas: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
    """[noise level] Noise levels at which a validation measures errors."""
    save_every: int = 200
    """[steps] Steps between two checkpoints."""
    keep: int = 3
    """[checkpoints] Latest checkpoints that are kept, beside the best."""
    remat: Literal["none", "products", "attention", "blocks", "offload"] = "none"
    """What the backward pass finds kept of the forward pass. none: everything, nothing is computed
    again. products: results of matrix products and attention. attention: results of attention. blocks:
    inputs of blocks. offload: those, held by the host."""

    def __post_init__(self):
        positive = ("steps", "log_every", "validate_every", "validation_batches", "save_every", "keep")
        _check("run", self, "at least 1", *positive)
        _check("run", self, "0 or more", "seed")
        _require(
            len(self.validation_sigmas) > 0 and all(0 < sigma <= 1 for sigma in self.validation_sigmas),
            "run.validation_sigmas",
            expected="noise levels above 0, up to 1",
            found=self.validation_sigmas,
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run needs. Fields without a value of their own keep their part's defaults."""

    dit: DiTConfig
    memory: EncoderConfig
    adapter: AdapterConfig = AdapterConfig()
    experts: ExpertsConfig = ExpertsConfig()
    vae: VAEConfig = VAEConfig()
    text: UMT5Config = UMT5Config()
    clip: CLIPConfig = CLIPConfig()
    video: VideoConfig = VideoConfig()
    weights: WeightsConfig = WeightsConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    sample: SampleConfig = SampleConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self):
        pairs = (
            ("memory.dim", self.memory.dim, "dit.dim", self.dit.dim),
            ("dit.out_dim", self.dit.out_dim, "vae.z_dim", self.vae.z_dim),
            ("dit.text_dim", self.dit.text_dim, "text.dim", self.text.dim),
        )
        if isinstance(self.memory, MemoryConfig):
            pairs += (("memory.in_dim", self.memory.in_dim, "vae.z_dim", self.vae.z_dim),)
            if self.memory.num_layers is not None:
                pairs += (
                    ("memory.num_layers", self.memory.num_layers, "dit.num_layers", self.dit.num_layers),
                )
            if self.memory.blocks is not None:
                _require(
                    self.memory.blocks[1] < self.dit.num_layers,
                    "memory.blocks go beyond the transformer",
                    expected=f"blocks below dit.num_layers = {self.dit.num_layers}",
                    found=self.memory.blocks,
                )
        for name, value, other, expected in pairs:
            _require(value == expected, f"{name} must equal {other}", expected=expected, found=value)
        _require(
            self.objective.trains == "memory"
            or self.experts.boundary is None
            or self.experts.trains != "both",
            "an adapter is of one transformer, and here two train",
            expected="experts.trains 'high' or 'low'",
            found=self.experts.trains,
        )
        _require(
            self.objective.first_frame == 0 or (self.dit.clean_frames and self.latent_shape[0] > 1),
            "objective.first_frame is for a transformer that takes clean frames, and for clips of more than one",
            expected="dit.clean_frames = True and more latent frames than one, or 0",
            found=f"dit.clean_frames = {self.dit.clean_frames}, {self.latent_shape[0]} latent frames",
        )
        channels = self.vae.temporal_stride + self.vae.z_dim
        _require(
            self.dit.condition_dim in (0, channels),
            "dit.in_dim holds the noisy latents, and beside them a mask and latents of given frames",
            expected=f"dit.out_dim + {channels}, or dit.out_dim",
            found=f"dit.out_dim + {self.dit.condition_dim}",
        )
        _require(
            self.dit.image_dim in (None, self.clip.dim)
            and (self.dit.condition_dim > 0 or not self.dit.image_dim),
            "dit.image_dim is the width of clip's tokens, for a transformer that takes given frames as channels",
            expected=f"clip.dim = {self.clip.dim} with a dit.in_dim above dit.out_dim, or None",
            found=f"{self.dit.image_dim} with {self.dit.condition_dim} channels",
        )
        _require(
            self.dit.image_positions in (None, 2 * self.clip.tokens),
            "dit.image_positions are those of the tokens of two pictures",
            expected=f"twice {self.clip.tokens}, or None",
            found=self.dit.image_positions,
        )
        _require(
            any(map(self.experts.trained_at, self.run.validation_sigmas)),
            "none of run.validation_sigmas falls to the expert that trains",
            expected=f"one on the {self.experts.trains} side of {self.experts.boundary}",
            found=self.run.validation_sigmas,
        )
        grid = self.latent_shape[:3]
        for size, patch in zip(grid, self.dit.patch_size, strict=True):
            _require(
                size % patch == 0,
                "the latent grid does not divide into patches of the transformer",
                expected=f"multiples of {self.dit.patch_size}",
                found=grid,
            )

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape (T, H, W, C) of the latents of one clip."""
        video = self.video
        return (*self.vae.latent_grid(video.frames, video.height, video.width), self.vae.z_dim)

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """The grid (t, h, w) of video tokens that the transformer makes of one clip."""
        return tuple(
            size // patch for size, patch in zip(self.latent_shape, self.dit.patch_size, strict=False)
        )
