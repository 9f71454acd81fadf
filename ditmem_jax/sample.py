"""Clips from prompts: a schedule, an Euler stepper and a scan, with or without memory.

python -m ditmem_jax.sample --config configs/tiny.py --encoder runs/tiny/encoder.safetensors --prompt "..."
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ditmem_jax import cli, flow, startup
from ditmem_jax.bank import Bank, Table
from ditmem_jax.bank.features import Features, encode_video
from ditmem_jax.checkpoint import encoder_metadata, load_dit, load_encoder, load_umt5, load_vae
from ditmem_jax.config import Config, MeshConfig, to_dict
from ditmem_jax.data.files import write_text
from ditmem_jax.data.references import References
from ditmem_jax.data.tokenizer import Tokenizer
from ditmem_jax.data.video import from_unit, write_video
from ditmem_jax.errors import UserError
from ditmem_jax.models.dit import DiT, Experts
from ditmem_jax.models.ditmem import attention_backend, with_strength
from ditmem_jax.models.kernels import Backend
from ditmem_jax.models.memory import MemoryEncoder
from ditmem_jax.models.umt5 import UMT5
from ditmem_jax.models.vae import VAE, decode
from ditmem_jax.sharding import batch_parts, check_mesh, divided, make_mesh, placing, whole
from ditmem_jax.types import Memory

Latents = Float[Array, "B T H W C"]
Rows = tuple[Float[np.ndarray, "B R 2 M D"], ...]
"""What an encoder, or that of each expert, makes of single reference videos (`MemoryEncoder.video_rows`)."""
Velocity = Callable[[Latents, Float[Array, ""]], Latents]
"""Velocity of noisy latents at a noise level sigma."""


def denoise(
    velocity: Velocity,
    noise: Latents,
    sigmas: Float[np.ndarray, " steps"],
    on_step: Callable[[], None] | None = None,
    end: float = 0.0,
) -> Latents:
    """Euler steps from noise at `sigmas[0]` = 1 down to clean latents at `end` = 0.

    Args:
        on_step: called on the host after every step.
    """

    def step(x, now):
        sigma, change = now
        x = x + change * velocity(x, sigma)
        if on_step is not None:
            jax.debug.callback(lambda _: on_step(), x[0, 0, 0, 0, 0])  # the value makes it wait for the step
        return x, None

    schedule = jnp.asarray(sigmas, jnp.float32), jnp.asarray(flow.euler_steps(sigmas, end), jnp.float32)
    return jax.lax.scan(step, noise, schedule)[0]


def guided(
    dit: Callable[..., Latents],
    positive: Float[Array, "B L E"],
    negative: Float[Array, "B L E"],
    memory: Memory | None,
    scale: float,
    *,
    memory_in_negative: bool = True,
) -> Velocity:
    """Classifier-free guidance, negative + scale (positive - negative), with both branches in one batch.

    Args:
        dit: velocity of (latents, timestep, text embeddings, memory), such as a `DiT`.
        positive, negative: text embeddings, zero past their lengths.
        memory_in_negative: give the memory to both branches, as released; otherwise guidance pushes towards it.
    """

    def plain(x, sigma):
        return dit(x, jnp.full(x.shape[:1], flow.TRAIN_STEPS * sigma), positive, memory)

    def both(x, sigma):
        time = jnp.full((2 * x.shape[0],), flow.TRAIN_STEPS * sigma)
        toward, away = jnp.split(dit(_twice(x), time, context, memories), 2)
        return away + scale * (toward - away)

    if scale == 1:
        return plain
    context = jnp.concatenate([positive, negative])
    memories = None
    if memory is not None:
        other = memory.bias if memory_in_negative else jnp.full_like(memory.bias, -jnp.inf)
        memories = Memory(_twice(memory.tokens), jnp.concatenate([memory.bias, other]))
    return both


def _twice(x: Float[Array, "B ..."]) -> Float[Array, "C ..."]:
    return jnp.concatenate([x, x])


class Sampler:
    """The networks that make clips; compiled once per number of prompts and of reference videos.

    Args:
        text: text encoder and tokeniser; or the embedding of every prompt that will be asked for.
        encoder: None for a sampler without memory; two, for high noise and for low, where each expert has its own.
        on_step: called after every denoising step, for a progress bar.
        mesh: devices that share the work, by default one: they divide the clips of a batch, if their number allows,
            the tokens of each clip, and the weights as they were placed.
    """

    def __init__(
        self,
        config: Config,
        dit: DiT | Experts,
        vae: VAE,
        text: tuple[UMT5, Tokenizer] | dict[str, Array],
        encoder: MemoryEncoder | tuple[MemoryEncoder, MemoryEncoder] | None = None,
        on_step: Callable[[], None] | None = None,
        mesh: Mesh | None = None,
    ):
        self.config, self.vae, self._text = config, vae, text
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
        self.backend = attention_backend(config, self.mesh)
        self._with_memory = encoder is not None
        dits = (dit.high, dit.low) if isinstance(dit, Experts) else (dit,)
        self._encoders = encoder if isinstance(encoder, tuple) else (encoder,)
        encoders = self._encoders * (len(dits) // len(self._encoders))
        pairs = [nnx.split(network) for network in (*dits, *encoders)]  # the same encoder twice is held once
        self._networks, self._states = zip(*pairs, strict=True)
        self._negative = self._embed([config.sample.negative_prompt], allow_empty=True)
        self._denoise = jax.jit(make_denoise(config, self._networks, self.backend, on_step))

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
        memory = None
        if encoder is not None:
            config, paths = with_encoders(config, encoder)
            loaded = tuple(load_encoder(path, placing(mesh, "encoder")) for path in paths)
            memory = loaded if len(loaded) > 1 else loaded[0]
        text = load_umt5(config, placing(mesh, "text"))
        if prompts is not None:
            negative = config.sample.negative_prompt
            known = {negative: embed(text, [negative], allow_empty=True)[0]}
            text = known | {prompt: embed(text, [prompt])[0] for prompt in prompts}
        dit, vae = load_dit(config, placing(mesh, "dit")), load_vae(config, placing(mesh, "vae"))
        return cls(config, dit, vae, text, memory, on_step, mesh)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        references: Float[np.ndarray, "B R t h w C"] | Rows | None = None,
        strength: float | None = None,
    ) -> UInt8[np.ndarray, "B T H W 3"]:
        """One clip per prompt, as pixels; arguments and errors as `latents`."""
        latents = self.latents(prompts, seeds, references, strength)
        return from_unit(whole(decode(self.vae, latents), self.mesh))

    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        references: Float[np.ndarray, "B R t h w C"] | Rows | None = None,
        strength: float | None = None,
    ) -> Latents:
        """One clip per prompt, as normalised latents.

        Args:
            seeds: of each clip's noise; a clip does not depend on the others of its batch.
            references: latents of the reference videos of each prompt, or their `rows`; None is no memory.
            strength: instead of `config.sample.strength`.
        Raises:
            UserError: for an empty prompt, or references that do not fit the encoder.
        """
        config = self.config
        if references is not None and not self._with_memory:
            raise UserError("this sampler has no memory encoder", fix="load it with an encoder's file")
        rows = references if references is None or isinstance(references, tuple) else self.rows(references)
        video = config.video
        shape = (*config.vae.latent_grid(video.frames, video.height, video.width), config.vae.z_dim)
        noise = np.stack([jax.random.normal(jax.random.key(seed), shape) for seed in seeds])
        if rows is not None:
            rows = tuple(divided(self.mesh, np.asarray(x), "batch", *[None] * 4) for x in rows)
        with jax.set_mesh(self.mesh):
            return self._denoise(
                self._states,
                divided(self.mesh, noise, "batch", *[None] * 4),
                self._embed(prompts),
                jnp.repeat(self._negative, len(prompts), axis=0),
                rows,
                config.sample.strength if strength is None else strength,
            )

    def rows(self, references: Float[np.ndarray, "B R t h w C"]) -> Rows:
        """What the encoders make of each reference video, to the last bit as `bank.features` stores it."""
        return tuple(
            np.stack([[whole(encode_video(encoder, x), self.mesh) for x in videos] for videos in references])
            for encoder in self._encoders
        )

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


def make_denoise(
    config: Config,
    networks: Sequence[Any],
    backend: Backend,
    on_step: Callable[[], None] | None = None,
) -> Callable[..., Latents]:
    """The pure program (states, noise, positive, negative, rows, strength) -> latents.

    Args:
        networks: the transformers, then as many encoders; `states` holds their weights. `rows` holds what each
            encoder made of the single reference videos, or once what the only one did; None is no memory.
    """

    def denoised(states, noise, positive, negative, rows, strength):
        merged = [nnx.merge(*network) for network in zip(networks, states, strict=True)]
        dits, encoders = merged[: len(merged) // 2], merged[len(merged) // 2 :]
        options = dict(memory_in_negative=config.sample.memory_in_negative)
        x, memory = noise, None
        rows = [None] * len(dits) if rows is None else rows * (len(dits) // len(rows))
        for dit, encoder, videos, (sigmas, end, scale) in zip(
            dits, encoders, rows, _schedule(config), strict=True
        ):
            if videos is not None:
                memory = with_strength(encoder.mix(videos, jnp.ones(videos.shape[:2], bool)), strength)
            dit = functools.partial(dit, backend=backend)
            velocity = guided(dit, positive, negative, memory, scale, **options)
            x = denoise(velocity, x, sigmas, on_step, end)
        return x

    return denoised


def embed(
    text: tuple[UMT5, Tokenizer], prompts: Sequence[str], *, allow_empty: bool = False
) -> Float[Array, "B L E"]:
    """Embeddings of prompts, zero past their lengths."""
    network, tokenizer = text
    return _encode_text(network, *tokenizer(prompts, allow_empty=allow_empty))


_encode_text = nnx.jit(UMT5.__call__)


def _schedule(config: Config) -> list[tuple[np.ndarray, float, float]]:
    """The noise levels of each transformer, high ones first, where they end, and the guidance there."""
    settings, boundary = config.sample, config.experts.boundary
    sigmas = flow.shifted_sigmas(settings.steps, settings.shift)
    if boundary is None:
        return [(sigmas, 0.0, settings.guidance)]
    high, low = flow.split_schedule(sigmas, boundary)
    guidance_high = settings.guidance if settings.guidance_high is None else settings.guidance_high
    return [(*high, guidance_high), (*low, settings.guidance)]


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
    wanted, found = (config.dit.dim, config.vae.z_dim), (memory.dim, memory.in_dim)
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


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """Videos of the bank for one prompt, as its rows, and the score of each (None if the user named it)."""

    videos: list[dict[str, Any]]
    scores: list[float | None]

    @functools.cached_property
    def latents(self) -> Float[np.ndarray, "R T H W C"]:
        """Raises UserError for a video without a record, or whose record is gone or altered."""
        return np.stack([record.latents.astype(np.float32) for record in References.of(self.videos)])

    @property
    def checksums(self) -> list[str]:
        return [video["checksum"] for video in self.videos]


def retrieve(config: Config, prompt: str, ids: Sequence[str] | None = None) -> Retrieved:
    """The `config.data.references` videos of the bank nearest to `prompt`, or those with the given ids.

    Raises:
        UserError: if there is no bank, it is smaller than that, or has no such id.
    """
    if ids is None:
        found = Bank.open(config.data.bank).search([prompt], config.data.references)
        return Retrieved(found.rows[0], found.scores[0].tolist())
    return Retrieved(Table.open(config.data.bank).by_id(ids).to_pylist(), [None] * len(ids))


def make_clips(
    config: Config,
    prompt: str,
    out: str | Path,
    encoder: str | Path | Sequence[str | Path] | None = None,
    memory: Literal["auto", "none"] | Sequence[str] = "auto",
    seeds: Sequence[int] = (0,),
    features: str | Path | None = None,
) -> list[Path]:
    """Makes one clip of `prompt` per seed, and beside each a JSON file about its making, under a progress bar.

    Args:
        out: a folder, or the name of the only clip.
        encoder: file of a trained memory encoder, or one for each of two experts; needed unless `memory` is "none".
        memory: "auto" takes the videos that the bank finds for the prompt; or ids of videos.
        features: store of `bank.features` to take what the encoder makes of them from, instead of their latents.
    Raises:
        UserError: for an empty prompt, a missing or unfit file, a bank that cannot give the videos, or features
            of another encoder or without one of the videos.
    """
    if not prompt.strip():
        raise UserError("the prompt is missing or empty", expected="what the clip shows, in words")
    begun = time.perf_counter()
    paths = _paths(Path(out), prompt, "plain" if memory == "none" else "memory", seeds)
    about = {
        "prompt": prompt,
        "seed": None,
        "strength": config.sample.strength,
        "memory": [],
        "encoder": None,
    }
    references = None
    if memory == "none":
        encoder = None
    else:
        if encoder is None:
            raise UserError("no encoder is named", fix="--encoder=FILE, or --memory=none")
        config, encoder = with_encoders(config, encoder)
        retrieved = retrieve(config, prompt, None if memory == "auto" else memory)
        for video, score in zip(retrieved.videos, retrieved.scores, strict=True):
            id, caption = video["id"], video["caption"]
            if startup.leads():
                print(f"memory {'  named' if score is None else f'{score:7.3f}'}  {id}  {caption}")
            about["memory"].append({"id": id, "caption": caption, "score": score})
        references = _references(retrieved, encoder, features)
        used = [
            {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in encoder
        ]
        about["encoder"] = used if len(used) > 1 else used[0]
    about["config"] = to_dict(config)

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    steps = itertools.count()

    def on_step():
        if next(steps) == 0:
            progress.console.print(f"first step done after {time.perf_counter() - begun:.1f} s")
        progress.advance(bar)

    with Progress(*columns, console=Console(quiet=not startup.leads())) as progress:
        bar = progress.add_task("loading")
        sampler = Sampler.load(config, encoder, on_step, [prompt])
        progress.console.print(f"attention by {sampler.backend}")
        if references is not None and not isinstance(references, tuple):
            references = sampler.rows(references)  # once for all clips
        size = batch_parts(sampler.mesh)
        progress.update(bar, total=config.sample.steps * math.ceil(len(paths) / size))
        for start in range(0, len(paths), size):
            now = seeds[start : start + size]
            progress.update(bar, description=f"steps of seed {', '.join(map(str, now))}")
            given = references and tuple(np.repeat(x, len(now), axis=0) for x in references)
            clips = sampler.generate([prompt] * len(now), now, given)
            for seed, path, clip in zip(now, paths[start : start + size], clips, strict=True):
                if startup.leads():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_video(path, clip, config.video.fps)
                    write_text(path.with_suffix(".json"), json.dumps(about | {"seed": seed}, indent=1) + "\n")
                progress.console.print(str(path), highlight=False, soft_wrap=True)
    return paths


def _references(
    retrieved: Retrieved, encoders: Sequence[Path], features: str | Path | None
) -> Float[np.ndarray, "1 R T H W C"] | Rows:
    """Latents of the videos, or their rows from a store; tells what was read."""
    start, count = time.perf_counter(), len(retrieved.videos)
    if features is None:
        found = retrieved.latents[None]
        read = f"latents of {count} videos, {found.nbytes:,} bytes in float32"
    else:
        stores = [Features.open(features, path) for path in encoders]
        found = tuple(store.rows(retrieved.checksums)[None] for store in stores)
        size, latents = sum(rows.nbytes for rows in found), count * stores[0].latents_bytes
        read = f"tokens of {count} videos, {size:,} bytes instead of {latents:,} of latents"
    if startup.leads():
        print(f"memory: {read}, read in {time.perf_counter() - start:.3f} s")
    return found


def _paths(out: Path, prompt: str, kind: str, seeds: Sequence[int]) -> list[Path]:
    """The file of each seed: `out` itself, or named after the prompt in the folder `out`."""
    if out.suffix == ".mp4":
        if len(seeds) > 1:
            raise UserError(
                f"{len(seeds)} clips do not fit into {out}", fix="a folder as --out, or --count=1"
            )
        return [out]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", expected="a folder, or a name that ends in .mp4")
    words = "-".join(re.findall(r"\w+", prompt.lower()))[:60]
    return [out / f"{words}-{kind}-{seed}.mp4" for seed in seeds]


def main() -> None:
    config = cli.load_config(CONFIG)
    given = {"strength": STRENGTH.value, "seed": SEED.value}
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, **given))
    memory = MEMORY.value
    if memory not in ("auto", "none"):
        memory = [name.strip() for name in memory.split(",")]
    seeds = range(config.sample.seed, config.sample.seed + COUNT.value)
    with startup.Program():
        make_clips(config, PROMPT.value, OUT.value, ENCODER.value or None, memory, seeds, FEATURES.value)


if __name__ == "__main__":
    CONFIG = cli.define_config()
    ENCODER = flags.DEFINE_list(
        "encoder",
        None,
        "File of a trained memory encoder; FILE,FILE for one of each expert; --memory=none needs none.",
    )
    PROMPT = flags.DEFINE_string("prompt", None, "What the clip shows.", required=True)
    MEMORY = flags.DEFINE_string(
        "memory", "auto", "auto: what the bank finds for the prompt; none; or ids as ID,ID."
    )
    FEATURES = flags.DEFINE_string(
        "features",
        None,
        "What `ditmem_jax.bank tokens` made of the bank with this encoder; saves reading latents.",
    )
    COUNT = flags.DEFINE_integer("count", 1, "Number of clips, with seeds from the first on.", lower_bound=1)
    SEED = flags.DEFINE_integer(
        "seed", None, "Seed of the first clip, instead of sample.seed.", lower_bound=0
    )
    STRENGTH = flags.DEFINE_float(
        "strength", None, "Weight of the memory, instead of sample.strength; 0 is none."
    )
    OUT = flags.DEFINE_string("out", "samples", "Folder for the clips, or one clip.mp4.")
    cli.run(main)
