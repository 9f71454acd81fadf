"""The configuration: one frozen dataclass per part, built strictly from a ConfigDict.

Files under `configs/` hold values; this file holds their types, defaults, meanings and checks. An impossible
configuration raises in its constructor. The string below a field says what it means, after its unit in brackets;
`--help_config` reads it from here.
"""

import dataclasses
import itertools
import re
from typing import Literal

from ditmem_jax.config.checks import check, require
from ditmem_jax.config.networks import (
    AdapterConfig,
    CLIPConfig,
    DiTConfig,
    EncoderConfig,
    ExpertsConfig,
    MemoryConfig,
    UMT5Config,
    VAEConfig,
)


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

    trained: tuple[int, int, int] | None = None
    """(frames, height, width) Largest clips that the transformer was trained on, beyond which a clip is warned of, in
    portrait or landscape; None: not known."""

    def __post_init__(self):
        check("video", self, "at least 1", "frames", "height", "width", "fps", "trained")
        require(
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
    verify: bool = True
    """Compare all arrays that are read with the checksums of their conversion, in a thread beside the reading:
    about half a second of one core for a GB. Every process then reads whole files, not its share of them alone. False
    leaves that to `ditmem convert --verify`."""

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
        check("data", self, "at least 1", "references", "batch_size")
        check("data", self, "0 or more", "workers")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The objective of a training step."""

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
    """The part that trains. memory: a memory encoder. adapter: an adapter of the transformer in its place, by the same samples,
    noise and budget, which is what a memory must beat; the mean of "running" is then over errors with it, and
    "relative" divides by those of the bare transformer. both: the two together."""

    def __post_init__(self):
        check("objective", self, "above 0", "shift")
        check("objective", self, "a finite number", "spectrum")
        low, high = self.sigma_range
        require(
            0 <= low < high <= 1,
            "objective.sigma_range",
            expected="0 <= low < high <= 1",
            found=self.sigma_range,
        )
        require(
            self.density != "spectrum"
            or (len(self.spectrum) > 0 and min(self.spectrum) >= 0 < sum(self.spectrum)),
            "objective.density is 'spectrum' but objective.spectrum is no histogram",
            expected="non-negative numbers with a positive sum",
            found=self.spectrum,
        )
        require(
            0 <= self.memory_dropout < 1,
            "objective.memory_dropout is a probability",
            expected="0 <= p < 1",
            found=self.memory_dropout,
        )
        require(
            0 <= self.first_frame <= 1,
            "objective.first_frame is a probability",
            expected="0 <= p <= 1",
            found=self.first_frame,
        )
        require(
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
        check("optim", self, "above 0", "learning_rate", "gate_rate")
        check("optim", self, "0 or more", "warmup", "weight_decay", "clip")
        check("optim", self, "at least 0 and below 1", "b1", "b2")
        check("optim", self, "at least 1", "accumulate")


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
    """The kernel of attention. auto: splash on TPUs, cudnn on GPUs for bfloat16 weights, xla
    otherwise."""

    def __post_init__(self):
        axes = ("data", "fsdp", "context", "tensor")
        check("mesh", self, "at least 1, or -1", *axes)
        rest = [f"mesh.{axis}" for axis in axes if getattr(self, axis) == -1]
        require(len(rest) <= 1, "mesh", expected="one -1 at most", found=f"-1 for {' and '.join(rest)}")


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
    step_cache: float = 0.0
    """[relative change] A velocity that is expected to have changed by less than this since it was computed is taken
    again, see `diffusion.step_cache`; 0: every step computes its own."""
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
    than none. By words the score is 0 to 1, and videos of 0 match nothing; by vectors it is a cosine. -1: all that match
    are read."""
    negative_prompt: str = ""
    """Text of the negative branch of guidance."""
    follow_image: bool = True
    """Clips take the shape of a given first frame, at the area of `video`, as Wan's own programs make them; otherwise
    the picture is cut to the shape of `video`."""
    seed: int = 0
    """Seed of the first clip; the next clips take the seeds after it."""

    def __post_init__(self):
        check("sample", self, "at least 1", "steps")
        check("sample", self, "above 0", "shift")
        check("sample", self, "a finite number", "guidance", "guidance_high")
        check("sample", self, "0 or more", "strength")
        check("sample", self, "at least 0 and below 1", "step_cache")
        check("sample", self, "0 to 4294967295", "seed")
        low, high = self.memory_range
        require(
            0 <= low < high <= 1,
            "sample.memory_range",
            expected="0 <= low < high <= 1",
            found=self.memory_range,
        )
        levels = (*self.sigmas, 0.0)
        require(
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
    init_from: str = ""
    """File of a trained encoder that a new run begins from; empty: from random weights."""
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
    """Evaluators of a validation: names in `evaluate.kinds.EVALUATORS`. gain: from memory, at the noise levels of
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
    """Values that are kept of the forward pass for the backward pass. none: everything, nothing is computed
    again. products: results of matrix products and attention. attention: results of attention. blocks:
    inputs of blocks. offload: those, held by the host."""

    def __post_init__(self):
        positive = ("steps", "log_every", "validate_every", "validation_batches", "save_every", "keep")
        check("run", self, "at least 1", *positive)
        check("run", self, "0 to 4294967295", "seed")
        require(
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
                require(
                    self.memory.blocks[1] < self.dit.num_layers,
                    "memory.blocks go beyond the transformer",
                    expected=f"blocks below dit.num_layers = {self.dit.num_layers}",
                    found=self.memory.blocks,
                )
        for name, value, other, expected in pairs:
            require(value == expected, f"{name} must equal {other}", expected=expected, found=value)
        require(
            self.objective.trains == "memory"
            or self.experts.boundary is None
            or self.experts.trains != "both",
            "an adapter is of one transformer, and here two train",
            expected="experts.trains 'high' or 'low'",
            found=self.experts.trains,
        )
        require(
            self.objective.first_frame == 0 or (self.dit.clean_frames and self.latent_shape[0] > 1),
            "objective.first_frame is for a transformer that takes clean frames, and for clips of more than one",
            expected="dit.clean_frames = True and more latent frames than one, or 0",
            found=f"dit.clean_frames = {self.dit.clean_frames}, {self.latent_shape[0]} latent frames",
        )
        channels = self.vae.temporal_stride + self.vae.z_dim
        require(
            self.dit.condition_dim in (0, channels),
            "dit.in_dim holds the noisy latents, and beside them a mask and latents of given frames",
            expected=f"dit.out_dim + {channels}, or dit.out_dim",
            found=f"dit.out_dim + {self.dit.condition_dim}",
        )
        require(
            self.dit.image_dim in (None, self.clip.dim)
            and (self.dit.condition_dim > 0 or not self.dit.image_dim),
            "dit.image_dim is the width of clip's tokens, for a transformer that takes given frames as channels",
            expected=f"clip.dim = {self.clip.dim} with a dit.in_dim above dit.out_dim, or None",
            found=f"{self.dit.image_dim} with {self.dit.condition_dim} channels",
        )
        require(
            self.dit.image_positions in (None, 2 * self.clip.tokens),
            "dit.image_positions are those of the tokens of two pictures",
            expected=f"twice {self.clip.tokens}, or None",
            found=self.dit.image_positions,
        )
        require(
            any(map(self.experts.trained_at, self.run.validation_sigmas)),
            "none of run.validation_sigmas falls to the expert that trains",
            expected=f"one on the {self.experts.trains} side of {self.experts.boundary}",
            found=self.run.validation_sigmas,
        )
        grid = self.latent_shape[:3]
        for size, patch in zip(grid, self.dit.patch_size, strict=True):
            require(
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
