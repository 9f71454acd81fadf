"""What can be configured: one frozen dataclass per part, built strictly from a ConfigDict.

Files under `configs/` hold values; this file holds their types, defaults and checks. An impossible
configuration raises in its constructor.
"""

import dataclasses
import re
from typing import Any, Literal

import numpy as np

from ditmem_jax.errors import UserError

TRAIN_STEPS = 1000
"""Timesteps of the noise scale: a transformer sees noise level sigma as timestep 1000 sigma."""


def _require(condition: bool, what: str, **details: Any) -> None:
    if not condition:
        raise UserError(what, **details)


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The Wan video transformer.

    Channels of `in_dim` beyond `out_dim` are those of a condition, such as a given first frame, that enters beside
    the noisy latents (the image-to-video kinds). `image_dim` is the width of CLIP image tokens, which
    cross-attention then reads as well as the text; None is a kind without them.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int | None = None

    def __post_init__(self):
        _require(
            self.in_dim >= self.out_dim,
            "dit.in_dim holds the noisy latents and a condition",
            expected=f"at least dit.out_dim = {self.out_dim}",
            found=self.in_dim,
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

    From noise level `boundary` on, the network "dit_high" of the weights serves, below it "dit"; None is a single
    transformer. `trains` names the expert for which a run trains a memory encoder, on the noise levels that fall to
    it; "both" is one encoder that feeds the two.
    """

    boundary: float | None = None
    trains: Literal["both", "high", "low"] = "both"

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

    `stages` lists (channels, kernel, stride, pool) of each convolution. `tokens` is either the released
    scheme, adaptive pooling over time to that many nominal tokens per band and video, of which equal ones
    are kept once, or a grid (t, h, w) of distinct cells per band and video. `strength` is the weight of the
    memory in attention before training, which then learns it, band by band; None is the released way, weight 1
    for good. A new memory says nothing true: the less it weighs, the less it harms until it does.
    """

    dim: int
    in_dim: int = 16
    stages: tuple[tuple[int, int, int, int], ...] = ((512, 7, 4, 2), (768, 3, 1, 2))
    latent_grid: tuple[int, int, int] = (21, 60, 104)
    filter: Literal["released", "radial"] = "released"
    tokens: int | tuple[int, int, int] = 100
    num_heads: int = 8
    norm: Literal["batch", "group"] = "batch"
    dropout: float = 0.5
    strength: float | None = None
    eps: float = 1e-6

    def __post_init__(self):
        _require(
            self.strength is None or self.strength > 0,
            "memory.strength is a weight to begin with",
            expected="above 0, or None",
            found=self.strength,
        )
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
    def feature_grid(self) -> tuple[int, int, int]:
        """The grid (t, h, w) that the convolutions leave of `latent_grid`."""
        grid = self.latent_grid
        for _, kernel, stride, pool in self.stages:
            grid = tuple(((n + 2 * (kernel // 2) - kernel) // stride + 1) // pool for n in grid)
        return grid


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters of the transformer's linear layers: x W becomes x W + (alpha / rank) x A B.

    `targets` are regular expressions that are searched in the paths of linear layers, "blocks.self_attention.q" for
    one; the default is the projections that peers adapt first.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"\b(self|cross)_attention\.[qkvo]$",)

    def __post_init__(self):
        _require(self.rank >= 1, "adapter.rank", expected="at least 1", found=self.rank)
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
    """The causal video VAE of Wan; the defaults are those of Wan 2.1.

    `patch_size` pixels along each side become channels before the first convolution. `decoder_dim` is the width of
    the decoder where it is not that of the encoder, `dim`. `shortcuts` lays a shortcut without parameters around
    each level (Wan 2.2); otherwise upsampling halves the channels.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = WAN21_LATENT_MEAN
    std: tuple[float, ...] = WAN21_LATENT_STD
    patch_size: int = 1
    decoder_dim: int | None = None
    shortcuts: bool = False

    def __post_init__(self):
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
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    vocab: int = 256384
    num_buckets: int = 32
    max_dist: int = 128


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """Size of the clips in pixels, frames and frames per second."""

    frames: int = 81
    height: int = 480
    width: int = 832
    fps: int = 16
    resize: Literal["stretch", "crop"] = "stretch"


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
    """Folder of converted weights (`ditmem convert`), and how the frozen ones are held.

    `hub` is the repository on the Hugging Face hub that they were published in, for the message when they are missing.

    "int8" is bfloat16 with the matrices of the transformer's blocks in 8 bits: half the memory. Training saves it only
    with a `run.remat` other than "none", which keeps these matrices in full for the backward pass.
    """

    path: str = ""
    hub: str = ""
    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"

    @property
    def computed_in(self) -> Literal["float32", "bfloat16"]:
        """The dtype of matrix products, and of what is not held in 8 bits."""
        return "bfloat16" if self.dtype == "int8" else self.dtype


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Records to train on, records that serve as the bank, and how they are read."""

    records: str = ""
    bank: str = ""
    validation: str = ""
    references: int = 5
    batch_size: int = 1
    workers: int = 0
    cache: bool = False

    def __post_init__(self):
        _require(self.references >= 1, "data.references", expected="at least 1", found=self.references)
        _require(self.batch_size >= 1, "data.batch_size", expected="at least 1", found=self.batch_size)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What a training step minimises.

    `kind`: "released" is the published loss, squared error times a bell-shaped weight over timesteps;
    "relative" divides each sample's squared error by its error without memory under the same noise;
    "running" divides by a running mean per noise level instead, at no extra cost.
    `density`: "shifted" draws the published shifted steps uniformly; "uniform" draws sigma uniformly from
    `sigma_range`; "spectrum" draws sigma from the histogram in `spectrum`, evenly spaced bins over [0, 1].
    `memory_dropout` is the chance that a sample trains without any memory.
    """

    kind: Literal["released", "relative", "running"] = "released"
    density: Literal["shifted", "uniform", "spectrum"] = "shifted"
    shift: float = 5.0
    sigma_range: tuple[float, float] = (0.0, 1.0)
    spectrum: tuple[float, ...] = ()
    memory_dropout: float = 0.1
    shuffle_references: bool = True

    def __post_init__(self):
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
            self.kind != "running" or self.memory_dropout > 0,
            "objective.kind 'running' needs samples without memory",
            expected="objective.memory_dropout above 0",
            found=self.memory_dropout,
        )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How the encoder's float32 weights are updated.

    `kind` is a name in `train.optimizer.OPTIMIZERS`: "adamw"; "muon" for matrices and convolutions, with NAdam for the
    rest; "lion", which wants a learning rate of about a tenth and a `b2` of 0.99; "adafactor", which keeps of the
    second moments of large matrices sums over rows and columns, and reads neither `b1` nor `b2`.

    For the memory of the tiny Wan, Muon at 3e-3 learned in 400 steps what AdamW, at 1e-3 and 3e-3, did not begin to.
    """

    kind: str = "adamw"
    learning_rate: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip: float = 1.0
    accumulate: int = 1

    def __post_init__(self):
        _require(self.accumulate >= 1, "optim.accumulate", expected="at least 1", found=self.accumulate)
        _require(self.clip >= 0, "optim.clip", expected="a norm, or 0 for none", found=self.clip)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1 takes the devices that the other axes leave.

    `attention` is what computes it on them: "auto" takes "splash" on TPUs, "cudnn" on GPUs for bfloat16 weights, and
    "xla" otherwise.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How clips are made. `strength` scales the attention weight of the memory: 0 is exactly no memory.

    `guidance_high` is the guidance of the expert for high noise, where there are two; None is `guidance`.
    """

    steps: int = 40
    shift: float = 5.0
    guidance: float = 5.0
    guidance_high: float | None = None
    strength: float = 1.0
    memory_in_negative: bool = True
    negative_prompt: str = ""
    seed: int = 0

    def __post_init__(self):
        _require(self.steps >= 1, "sample.steps", expected="at least 1", found=self.steps)
        _require(self.strength >= 0, "sample.strength", expected="0 or more", found=self.strength)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The training run: length, logging, checkpoints, generator.

    `steps` counts batches, of which `optim.accumulate` make one update. `remat` is what the backward pass finds
    kept of the forward pass (see `DiT`), from everything to nothing but the inputs of blocks, held by the host.
    """

    out: str = "runs/default"
    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    validate_every: int = 200
    validation_batches: int = 4
    validation_sigmas: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.95)
    save_every: int = 200
    keep: int = 3
    remat: Literal["none", "products", "attention", "blocks", "offload"] = "none"

    def __post_init__(self):
        for name in ("steps", "log_every", "validate_every", "validation_batches", "save_every", "keep"):
            _require(
                getattr(self, name) >= 1, f"run.{name}", expected="at least 1", found=getattr(self, name)
            )
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
    memory: MemoryConfig
    experts: ExpertsConfig = ExpertsConfig()
    vae: VAEConfig = VAEConfig()
    text: UMT5Config = UMT5Config()
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
            ("memory.in_dim", self.memory.in_dim, "vae.z_dim", self.vae.z_dim),
            ("dit.out_dim", self.dit.out_dim, "vae.z_dim", self.vae.z_dim),
            ("dit.text_dim", self.dit.text_dim, "text.dim", self.text.dim),
        )
        for name, value, other, expected in pairs:
            _require(value == expected, f"{name} must equal {other}", expected=expected, found=value)
        _require(
            self.dit.condition_dim == 0 and self.dit.image_dim is None,
            "the transformer wants an image, which training and sampling do not give",
            expected="a text-to-video kind",
            found=f"{self.dit.condition_dim} channels of a condition, dit.image_dim {self.dit.image_dim}",
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
