"""The networks that make clips from prompts, with or without memory.

One step is one compiled program, and a loop on the host takes the steps: their number costs no compilation, and
the compiler's cache keeps the program, as it would not if that called back to tell its progress.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from ditmem_jax.bank.features import encode_video
from ditmem_jax.bank.search import Results
from ditmem_jax.conditions.condition import ImageNetworks
from ditmem_jax.conditions.kinds import prepared, require_condition
from ditmem_jax.config import Config, MeshConfig
from ditmem_jax.data.video import from_unit
from ditmem_jax.diffusion import flow
from ditmem_jax.diffusion.guidance import Latents, guided
from ditmem_jax.diffusion.solvers import SOLVERS, Carry
from ditmem_jax.diffusion.step_cache import Kept, recall
from ditmem_jax.errors import UserError, warn
from ditmem_jax.models.backbone import Experts
from ditmem_jax.models.ditmem import compute_for, with_strength
from ditmem_jax.models.encoders import Encoder, VideoEncoder, per_video
from ditmem_jax.models.free_tokens import FreeTokens, source_numbers
from ditmem_jax.models.placement import place_on
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.models.wan.tokenizer import Tokenizer
from ditmem_jax.models.wan.umt5 import UMT5
from ditmem_jax.models.wan.vae import VAE, decode
from ditmem_jax.parallel import compilation, processes
from ditmem_jax.parallel.mesh import all_gather_to_host, check_mesh, make_mesh, shard
from ditmem_jax.storage.encoders import encoder_metadata, load_encoder
from ditmem_jax.storage.weights import load_clip, load_dit, load_umt5, load_vae
from ditmem_jax.types import Conditioning, GivenFrames, Memory

Rows = tuple[Float[np.ndarray, "B R 2 M D"], ...]
"""Rows of single reference videos by an encoder, or by that of each expert (`VideoEncoder.video_rows`)."""
Given = dict[str, np.ndarray]
"""Given frames as a kind of condition encodes them: fields of `types.Conditioning` by name."""
Coefficients = Float[np.ndarray, "steps k"]
"""Of each step, as `diffusion.solvers` computes them."""
Step = Callable[[Carry, Float[np.ndarray, " k"]], Carry]
"""One step of a solver with its row of the coefficients."""


def denoise(
    step: Step, carry: Carry, coefficients: Coefficients, on_step: Callable[[], None] | None = None
) -> Carry:
    """Take the steps of these coefficients, one after the other.

    Args:
        on_step: called after every step, when that is computed.
    """
    for row in coefficients:
        carry = step(carry, row)
        if on_step is not None:
            jax.block_until_ready(carry)
            on_step()
    return carry


class NotFinite(UserError):
    """Numbers of a clip that are not finite, which would be black pixels."""


def checked(step: Step, done: int = 0) -> Step:
    """The step, which raises NotFinite when the latents that it makes are not finite; `done` were taken before."""
    numbers = itertools.count(done + 1)

    def take(carry: Carry, row: Float[np.ndarray, " k"]) -> Carry:
        carry, number = step(carry, row), next(numbers)
        if not _all_finite(carry.latents):
            raise NotFinite(
                f"the latents are not finite from step {number} on, which is from noise level {row[0]:.3g}",
                expected="finite numbers",
                fix="a smaller sample.guidance or sample.strength, or weights.dtype=float32",
            )
        return carry

    return take


_all_finite = jax.jit(lambda x: jnp.isfinite(x).all())


class _Stage(NamedTuple):
    """A transformer, and its part of the schedule."""

    graph: Any
    weights: Any
    coefficients: Coefficients
    scale: float
    programs: dict[tuple, jax.stages.Compiled]


class Sampler:
    """The networks that make clips; a step is compiled once per number of prompts and of memory rows.

    Args:
        text: text encoder and tokeniser; or the embedding of every prompt that will be asked for.
        encoder: None for a sampler without memory; two, for high noise and for low, where each expert has its own.
        on_step: called after every denoising step, for a progress bar.
        mesh: devices that share the work, by default one: they divide the clips of a batch, if their number allows,
            the tokens of each clip, and the weights as they were placed.
    """

    computed: Int[np.ndarray, " B"] | None = None
    """With a step cache, at how many steps the velocity of each of the last clips was computed."""

    def __init__(
        self,
        config: Config,
        dit: DiT | Experts,
        vae: VAE,
        text: tuple[UMT5, Tokenizer] | dict[str, Array],
        encoder: Encoder | tuple[Encoder, Encoder] | None = None,
        on_step: Callable[[], None] | None = None,
        mesh: Mesh | None = None,
    ):
        self.config, self.vae, self._text = config, vae, text
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
        self._solver = SOLVERS[config.sample.solver]
        dits = (dit.high, dit.low) if isinstance(dit, Experts) else (dit,)
        self._encoders = encoder if isinstance(encoder, tuple) else (encoder,)
        parts = zip(dits, schedule(config), strict=True)
        self._stages = [_Stage(*nnx.split(network), *part, {}) for network, part in parts]
        self._negative = self._embed([config.sample.negative_prompt], allow_empty=True)
        self._on_step = on_step

    @classmethod
    def load(
        cls,
        config: Config,
        encoder: str | Path | Sequence[str | Path] | None = None,
        on_step: Callable[[], None] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> "Sampler":
        """From `config.weights` and the file of a trained encoder, or the files of one for each expert; on `config.mesh`.

        Args:
            prompts: all that will be asked for, if that is known. The text encoder, which may be as large as the
                transformer, is then gone before that is loaded.
        Raises:
            UserError: if a file is missing or does not fit the config, or the config does not fit the devices.
        """
        mesh = make_mesh(config.mesh)
        check_mesh(config, mesh)
        memory, paths = None, []
        if encoder is not None:
            config, paths = with_encoders(config, encoder)
            loaded = tuple(load_encoder(path, place_on(mesh, "encoder")) for path in paths)
            memory = loaded[0] if len(loaded) == 1 else loaded
        if processes.is_primary():
            warn_of_size(config, paths)
        text = load_umt5(config, place_on(mesh, "text"))
        if prompts is not None:
            negative = config.sample.negative_prompt
            known = {negative: embed(text, [negative], allow_empty=True)[0]}
            text = known | {prompt: embed(text, [prompt])[0] for prompt in prompts}
        dit = load_dit(config, place_on(mesh, "dit"), compute=compute_for(config, mesh))
        vae = load_vae(config, place_on(mesh, "vae"))
        return cls(config, dit, vae, text, memory, on_step, mesh)

    def with_encoder(self, encoder: Encoder) -> "Sampler":
        """The same networks and compiled programs, with another encoder of the memory that the config names."""
        other = copy.copy(self)
        other._encoders = (encoder,)
        return other

    def with_sampling(self, **settings: Any) -> "Sampler":
        """The same networks, with other values of `config.sample`; their steps are compiled anew."""
        other = copy.copy(self)
        other.config = dataclasses.replace(
            self.config, sample=dataclasses.replace(self.config.sample, **settings)
        )
        other._solver, other.computed = SOLVERS[other.config.sample.solver], None
        parts = zip(self._stages, schedule(other.config), strict=True)
        other._stages = [_Stage(stage.graph, stage.weights, *part, {}) for stage, part in parts]
        if other.config.sample.negative_prompt != self.config.sample.negative_prompt:
            other._negative = other._embed([other.config.sample.negative_prompt], allow_empty=True)
        return other

    def step_cache_error(
        self, prompts: Sequence[str], seeds: Sequence[int], *given: Any, **named: Any
    ) -> float:
        """Relative L2 distance of clips' latents from those without a step cache; arguments as `latents`."""
        found = [
            each.latents(prompts, seeds, *given, **named)
            for each in (self, self.with_sampling(step_cache=0.0))
        ]
        ours, theirs = all_gather_to_host(found, self.mesh)
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        references: Results | Float[np.ndarray, "B R t h w C"] | Rows | None = None,
        strength: float | None = None,
        sources: Sequence[str] | None = None,
        frames: Sequence[GivenFrames] | Given | None = None,
    ) -> UInt8[np.ndarray, "B T H W 3"]:
        """Return one clip per prompt, as pixels; arguments and errors as `latents`."""
        return self.pixels(self.latents(prompts, seeds, references, strength, sources, frames))

    def pixels(self, latents: Latents) -> UInt8[np.ndarray, "B F H8 W8 3"]:
        """The clips that these latents are of; NotFinite where they are none."""
        pixels = all_gather_to_host(decode(self.vae, latents), self.mesh)
        if not np.isfinite(pixels).all():
            raise NotFinite(
                "the pixels that the VAE makes of a clip's latents are not finite",
                expected="finite numbers",
                fix="a smaller sample.guidance or sample.strength, or weights.dtype=float32",
            )
        return from_unit(pixels)

    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        references: Results | Float[np.ndarray, "B R t h w C"] | Rows | None = None,
        strength: float | None = None,
        sources: Sequence[str] | None = None,
        frames: Sequence[GivenFrames] | Given | None = None,
    ) -> Latents:
        """Return one clip per prompt, as normalised latents.

        Args:
            seeds: of each clip's noise; a clip does not depend on the others of its batch.
            references: the reference videos of each prompt: what a bank found for it, their latents, or their `rows`;
                None is no memory. Of what a bank found, videos that do not match or score below
                `config.sample.min_score` are not read; a prompt without any is exactly without memory.
            strength: instead of `config.sample.strength`.
            sources: for an encoder of free tokens, instead of references: the source of each prompt's memory.
            frames: what each clip is to hold: pictures of any size, cut to that of `config.video`; or what `given` has
                made of them.
        Raises:
            UserError: for an empty prompt, for seeds, references or frames that are not one for each prompt, for
                references or sources that do not fit the encoder, and frames that do not fit the transformer.
                NotFinite for numbers that are no clip.
        """
        _check_count("seeds", len(seeds), prompts)
        steps, noise = self.steps(prompts, references, strength, sources, frames), self.noise(seeds)
        with jax.set_mesh(self.mesh):
            carry, done, self.computed = self._initial(noise), 0, None
            for step, coefficients in steps:
                carry = denoise(checked(step, done), carry, coefficients, self._on_step)
                done += len(coefficients)
                carry = self._counted(carry)
        return carry.latents

    def _initial(self, noise: Latents) -> Carry:
        """The carry before the first step of a transformer, on the devices."""
        carry = initial(self.config, noise)
        kept = jax.tree.map(lambda x: shard(self.mesh, x, "batch", *[None] * (x.ndim - 1)), carry.kept)
        return carry._replace(kept=kept)

    def _counted(self, carry: Carry) -> Carry:
        """The carry for the next transformer, which has no velocity yet; the steps of this one are counted."""
        if carry.kept is None:
            return carry
        found = all_gather_to_host(carry.kept.computed, self.mesh)
        self.computed = found if self.computed is None else self.computed + found
        return carry._replace(kept=self._initial(carry.latents).kept)

    def noise(self, seeds: Sequence[int]) -> Latents:
        """The noise that the clips of these seeds begin with."""
        shape = self.config.latent_shape
        noise = np.stack([jax.random.normal(jax.random.key(seed), shape) for seed in seeds])
        return shard(self.mesh, noise, "batch", *[None] * 4)

    def steps(
        self,
        prompts: Sequence[str],
        references: Results | Float[np.ndarray, "B R t h w C"] | Rows | None = None,
        strength: float | None = None,
        sources: Sequence[str] | None = None,
        frames: Sequence[GivenFrames] | Given | None = None,
    ) -> list[tuple[Step, Coefficients]]:
        """The programs of `latents`: of each transformer its compiled step and the coefficients of its steps.

        Arguments and errors as `latents`.
        """
        strength = self.config.sample.strength if strength is None else strength
        memories = [None] * len(self._stages)
        if references is not None:
            rows = references if isinstance(references, tuple) else self.rows(references)
            if None in self._encoders or len(rows) != len(self._encoders):
                raise UserError(
                    "the rows do not fit the sampler",
                    expected=f"those of {sum(x is not None for x in self._encoders)} encoders",
                    found=f"of {len(rows)}",
                )
            _check_count("references", len(rows[0]), prompts)
            present = np.ones(rows[0].shape[:2], bool)
            if isinstance(references, Results):
                present = references.scores >= self.config.sample.min_score
                present &= np.arange(present.shape[1]) < np.array(references.matched)[:, None]
            rows = [shard(self.mesh, np.float32(x), "batch", *[None] * 4) for x in rows]
            present = shard(self.mesh, present, "batch", None)
        if sources is not None:
            _check_count("sources", len(sources), prompts)
            numbers = [shard(self.mesh, x, "batch") for x in self._source_numbers(sources)]
        given = {}
        if frames is None:
            prepared(self.config, None)
        else:
            frames = frames if isinstance(frames, dict) else self.given(frames)
            for name, x in frames.items():
                _check_count("given frames", len(x), prompts)
                given[name] = shard(self.mesh, x, "batch", *[None] * (x.ndim - 1))
        with jax.set_mesh(self.mesh):
            if references is not None:
                mixed = [_mix(*pair, present, strength) for pair in zip(self._encoders, rows, strict=True)]
                memories = mixed * (len(self._stages) // len(mixed))
            if sources is not None:
                chosen = [_choose(*pair, strength) for pair in zip(self._encoders, numbers, strict=True)]
                memories = chosen * (len(self._stages) // len(chosen))
            texts = self._embed(prompts), jnp.repeat(self._negative, len(prompts), axis=0)
            texts = tuple(Conditioning(text, **given) for text in texts)
            return [
                (self._step(stage, *texts, memory), stage.coefficients)
                for stage, memory in zip(self._stages, memories, strict=True)
                if len(stage.coefficients)
            ]

    def given(self, frames: Sequence[GivenFrames]) -> Given:
        """Return what the transformer is told of the frames of each clip, to be given to several calls.

        Raises:
            UserError: for frames that it does not take.
        """
        condition, clip = require_condition(self.config), None
        if self.config.dit.image_dim is not None:  # and gone when its turn is over
            clip = load_clip(self.config, place_on(self.mesh, "clip"))
        fetch = functools.partial(all_gather_to_host, mesh=self.mesh)
        return condition.encode(frames, ImageNetworks(self.vae, clip, fetch))

    def _step(self, stage: _Stage, *given: Any) -> Step:
        """The compiled step of a stage with the texts and the memory that it takes."""
        sizes = tuple(jnp.shape(x) for x in jax.tree.leaves(given))
        if sizes not in stage.programs:
            noise = self.noise([0] * len(given[0].text))
            inputs = self._initial(noise), stage.coefficients[0]
            shardings = jax.tree.map(lambda x: x.sharding, inputs[0])
            step = jax.jit(make_step(self.config, stage.graph, stage.scale), out_shardings=shardings)
            stage.programs[sizes] = compilation.compile_for(step, stage.weights, *inputs, *given)
        program = stage.programs[sizes]
        return lambda carry, row: program(stage.weights, carry, row, *given)

    def rows(self, references: Float[np.ndarray, "B R t h w C"] | Results) -> Rows:
        """Rows of each reference video by the encoders, within rounding as `bank.features` stores it.

        Raises:
            UserError: without an encoder, or with one that is not of videos.
        """
        if None in self._encoders:
            raise UserError("this sampler has no memory encoder", fix="load it with an encoder's file")
        if isinstance(references, Results):
            references = references.latents
        encoders = [per_video(encoder) for encoder in self._encoders]
        return tuple(
            np.stack(
                [
                    [all_gather_to_host(encode_video(encoder, x), self.mesh) for x in videos]
                    for videos in references
                ]
            )
            for encoder in encoders
        )

    def _source_numbers(self, sources: Sequence[str]) -> list[Int[np.ndarray, " B"]]:
        """For each encoder the numbers of sources."""
        for encoder in self._encoders:
            if not isinstance(encoder, FreeTokens):
                raise UserError(
                    "this sampler has no tokens of sources",
                    expected="memory.kind = free_tokens",
                    found="no encoder" if encoder is None else f"memory.kind = {encoder.config.kind}",
                    fix="give references instead of sources",
                )
        return [
            np.array(source_numbers(encoder.config, list(sources)), np.int32) for encoder in self._encoders
        ]

    def _embed(self, prompts: Sequence[str], *, allow_empty: bool = False) -> Float[Array, "B L E"]:
        if isinstance(self._text, tuple):
            return embed(self._text, prompts, allow_empty=allow_empty)
        known = [prompt for prompt in self._text if allow_empty or prompt.strip()]
        if unknown := [prompt for prompt in prompts if prompt not in known]:
            raise UserError(
                "the sampler was loaded for other prompts",
                expected=f"one of {known}",
                found=unknown[0],
                fix="load it with this one, or without prompts",
            )
        return jnp.stack([self._text[prompt] for prompt in prompts])


def _check_count(what: str, found: int, prompts: Sequence[str]) -> None:
    """Raise a UserError unless there is one for each prompt."""
    if found != len(prompts):
        raise UserError(
            f"the {what} do not fit the prompts", expected=f"{len(prompts)}, one a prompt", found=found
        )


def initial(config: Config, noise: Latents) -> Carry:
    """The carry before the first step, with a step cache if the config has one."""
    carry = SOLVERS[config.sample.solver].init(noise)
    return carry._replace(kept=Kept.none(noise.shape)) if config.sample.step_cache else carry


def make_step(config: Config, graph: Any, scale: float) -> Callable[..., Carry]:
    """The pure program (weights, carry, row of coefficients, positive, negative, memory or None) -> carry.

    Args:
        graph: of the transformer, as `nnx.split` gives it.
        scale: of guidance.
    """

    low, high = config.sample.memory_range

    def is_read(sigma):
        return (low <= sigma) & (sigma <= high)

    def step(weights, carry, row, positive, negative, memory):
        options = dict(memory_in_negative=config.sample.memory_in_negative)
        if memory is not None and config.sample.memory_range != (0.0, 1.0):
            memory = memory._replace(bias=jnp.where(is_read(row[0]), memory.bias, -jnp.inf))
        velocity, kept = guided(nnx.merge(graph, weights), positive, negative, memory, scale, **options), None
        if carry.kept is not None:
            tolerance, usable = config.sample.step_cache, is_read(carry.kept.sigma) == is_read(row[0])
            found, kept = recall(velocity, carry.kept, carry.latents, row[0], tolerance, usable)
            velocity = lambda x, sigma: found  # noqa: E731
        carry = SOLVERS[config.sample.solver].step(velocity, carry, row)
        return carry._replace(
            latents=positive.fill(carry.latents), kept=kept
        )  # no solver moves what is given

    return step


@nnx.jit
def _mix(
    encoder: VideoEncoder,
    videos: Float[Array, "B R 2 M D"],
    present: Bool[Array, "B R"],
    strength: float | Array,
) -> Memory:
    """The memory of every prompt, from the rows of those of its videos that are present."""
    return with_strength(encoder.mix(videos, present), strength)


@nnx.jit
def _choose(encoder: FreeTokens, source: Int[Array, " B"], strength: float | Array) -> Memory:
    """The memory of every prompt, from the number of its source."""
    return with_strength(encoder(source=source, training=False), strength)


def embed(
    text: tuple[UMT5, Tokenizer], prompts: Sequence[str], *, allow_empty: bool = False
) -> Float[Array, "B L E"]:
    """Embeddings of prompts, zero past their lengths."""
    network, tokenizer = text
    return _encode_text(network, *tokenizer(prompts, allow_empty=allow_empty))


_encode_text = nnx.jit(UMT5.__call__)


def schedule(config: Config) -> list[tuple[Coefficients, float]]:
    """The coefficients of each transformer's steps, those for high noise first, and the guidance there."""
    settings = config.sample
    sigmas = flow.sampling_sigmas(settings)
    coefficients = SOLVERS[settings.solver].coefficients(sigmas)
    if config.experts.boundary is None:
        return [(coefficients, settings.guidance)]
    of_high = config.experts.is_high(sigmas)
    guidance_high = settings.guidance if settings.guidance_high is None else settings.guidance_high
    return [(coefficients[of_high], guidance_high), (coefficients[~of_high], settings.guidance)]


def warn_of_size(config: Config, encoders: Sequence[Path] = ()) -> None:
    """Warns of clips that are longer or larger than those that the transformer or an encoder was trained on."""
    video = config.video
    trained = {} if video.trained is None else {"the transformer": video.trained}
    for path in encoders:
        size = encoder_metadata(path)[1].get("video")
        if size is not None:
            trained[f"the encoder in {path}"] = (size["frames"], size["height"], size["width"])
    for name, (frames, *sides) in trained.items():
        asked = sorted((video.height, video.width))
        if video.frames > frames or any(x > y for x, y in zip(asked, sorted(sides), strict=True)):
            warn(
                f"the clip is longer or larger than those that {name} was trained on, and may not look like them",
                expected="up to {} frames of {} x {}".format(frames, *sides),
                found=f"{video.frames} frames of {video.height} x {video.width}",
                fix="a smaller config.video",
            )


def with_encoder(config: Config, path: str | Path) -> Config:
    """`config` with the memory that the encoder in `path` was trained with.

    Raises:
        UserError: if there is no such encoder, or it is for a transformer of another width or for other latents.
    """
    if not Path(path).is_file():
        raise UserError(
            f"no encoder at {path}", expected="the encoder.safetensors of a run of ditmem_jax.train"
        )
    memory, _ = encoder_metadata(path)
    wanted = (config.dit.dim, config.vae.z_dim)
    found = (memory.dim, getattr(memory, "in_dim", config.vae.z_dim))  # not every kind reads latents
    if found != wanted:
        raise UserError(
            f"the encoder in {path} does not fit the networks of the config",
            expected="width {}, {} latent channels".format(*wanted),
            found="width {}, {} latent channels".format(*found),
            fix="the config that it was trained with, or an encoder trained with this one",
        )
    return dataclasses.replace(config, memory=memory)


def with_encoders(config: Config, files: str | Path | Sequence[str | Path]) -> tuple[Config, list[Path]]:
    """`with_encoder` of one file or of one for each of two experts; and the files, that for high noise first.

    Raises:
        UserError: also if an expert would have no encoder, or one that was trained for the other.
    """
    files = [files] if isinstance(files, (str, Path)) else files
    order, found = ("both", "high", "low"), {}
    for path in files:
        config = with_encoder(config, path)
        found[encoder_metadata(path)[1].get("expert", "both")] = Path(path)
    wanted = [("both",)] if config.experts.boundary is None else [("both",), ("high", "low")]
    if len(found) < len(files) or (kinds := tuple(sorted(found, key=order.index))) not in wanted:
        raise UserError(
            "these encoders do not serve every noise level once",
            expected=" or ".join(f"one for {' and one for '.join(names)}" for names in wanted),
            found=", ".join(f"{path} for {kind}" for kind, path in found.items()),
        )
    return config, [found[kind] for kind in kinds]
