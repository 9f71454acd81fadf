"""Clips from prompts as files, and beside each what it was made from."""

import contextlib
import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ditmem_jax.bank.features import Features
from ditmem_jax.conditions.kinds import prepared
from ditmem_jax.config import Config, FreeTokensConfig, to_dict
from ditmem_jax.data.references import References, majority_source
from ditmem_jax.data.video import write_video
from ditmem_jax.diffusion.flow import sampling_sigmas
from ditmem_jax.errors import UserError
from ditmem_jax.models.ditmem import compute_for
from ditmem_jax.parallel import compilation, processes
from ditmem_jax.parallel.mesh import batch_parts
from ditmem_jax.progress import make_progress
from ditmem_jax.sample.requests import Request
from ditmem_jax.sample.retrieval import Retrieved, retrieve, search
from ditmem_jax.sample.sampler import Given, NotFinite, Rows, Sampler, with_encoders
from ditmem_jax.storage.digests import of_arrays, of_file, of_json
from ditmem_jax.storage.files import make_folder, write_text
from ditmem_jax.storage.locks import owned
from ditmem_jax.storage.weights import check_weights, read_index, stored_dits
from ditmem_jax.types import GivenFrames

DECIDES = ("dit", "experts", "vae", "text", "clip", "video", "sample")
"""Parts of a config that decide what a clip shows, beside its prompt, seed, memory, given frames and weights."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip to make: what is asked for, with what was found for it, its file, and what is written beside it."""

    request: Request
    path: Path
    about: dict[str, Any]
    memory: Retrieved | None
    source: str | None

    @property
    def is_done(self) -> bool:
        """Return True if the file is there, made from just this."""
        return self.path.exists() and _digest_beside(self.path) == self.about["digest"]

    def require_free(self) -> None:
        """Raise a UserError if another clip would be lost."""
        named_after_it = self.about["digest"][:8] in self.path.stem
        beside = self.path.with_suffix(".json")
        if named_after_it or _digest_beside(self.path) == self.about["digest"]:
            return
        if taken := [path for path in (self.path, beside) if path.exists()]:
            raise UserError(
                f"{taken[0]} exists and was made otherwise, so it is not replaced",
                expected="a name that is free",
                fix="another --out, a folder, where clips made otherwise have other names, or delete it",
            )

    def write(self, frames: np.ndarray, fps: int) -> None:
        """Write the clip, after what is beside it: where both are there, they belong together."""
        make_folder(self.path.parent)
        write_text(self.path.with_suffix(".json"), json.dumps(self.about, indent=1) + "\n")
        write_video(self.path, frames, fps)


def make_clips(
    config: Config,
    prompts: str | Sequence[str | Request],
    out: str | Path,
    encoder: str | Path | Sequence[str | Path] | None = None,
    memory: Literal["auto", "none"] | Sequence[str] = "auto",
    seeds: Sequence[int] = (0,),
    features: str | Path | None = None,
    frames: GivenFrames | None = None,
    *,
    warm: bool = False,
    check_step_cache: bool = False,
) -> list[Path]:
    """Makes the clips that are asked for and beside each a JSON file about its making, under a progress bar.

    Clips in a folder are named after their prompt, seed and a digest of all that decides them: what is there already is
    left out, and nothing overwrites another.

    Args:
        prompts: one or several, each with each of `seeds`; or requests, such as those of a file.
        out: a folder, or the name of the only clip.
        encoder: file of a trained memory encoder, or one for each of two experts; needed unless `memory` is "none".
        memory: "auto" takes the videos that the bank finds for the prompt; or ids of videos.
        features: store of `bank.features` to take what the encoder makes of them from, instead of their latents.
        frames: pictures that all clips are to hold, see `conditions.files.read_frames`.
        warm: load and compile everything, which fills the compile cache, and make no clip.
        check_step_cache: make the first clips without `sample.step_cache` as well, and tell how far they are apart.
    Returns:
        the file of each clip, in the order of prompts and seeds.
    Raises:
        UserError: for an empty prompt, a missing or unfit file, a bank that cannot give the videos, or features
            of another encoder or without one of the videos; for free tokens also if these are of no such source; for a
            clip whose numbers are not finite, after the others are made.
    """
    phases, out = compilation.Phases(), Path(out)
    if check_step_cache and not config.sample.step_cache:
        raise UserError("there is no step cache to check", fix="--config.sample.step_cache=0.1")
    requests = _requests(config, prompts, memory, seeds)
    _check_out(out, len(set(requests)))
    config = prepared(config, frames)
    of_pictures = () if config.dit.image_dim is None else ("clip",)
    check_weights(config, *stored_dits(config), "vae", "text", *of_pictures)
    if all(request.memory == "none" for request in requests):
        encoder = None
    elif encoder is None:
        raise UserError("no encoder is named", fix="--encoder=FILE, or --memory=none")
    else:
        config, encoder = with_encoders(config, encoder)
    with contextlib.ExitStack() as owner:
        if processes.is_primary() and not warm:
            owner.enter_context(owned(out))
        clips = _plan(config, requests, out, encoder, features, frames)
        paths = [clip.path for clip in clips]
        clips = list({clip.path: clip for clip in clips}.values())
        with processes.primary_first():
            done = [] if warm else [clip for clip in clips if clip.is_done]
        for clip in done:
            _tell(f"{clip.path} is there already")
        todo = [clip for clip in clips if clip not in done]
        for clip in todo:
            clip.require_free()
        if todo:
            _make(
                config, todo, encoder, features, frames, phases, warm=warm, check_step_cache=check_step_cache
            )
    return [] if warm else paths


def _make(
    config: Config,
    clips: Sequence[Clip],
    encoder: Sequence[Path] | None,
    features: str | Path | None,
    frames: GivenFrames | None,
    phases: compilation.Phases,
    *,
    warm: bool,
    check_step_cache: bool,
) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )

    def on_step() -> None:
        if "first step" not in phases.seconds:
            phases.end("first step")
            progress.console.print(phases)
        progress.advance(bar)

    with make_progress(*columns, console=Console(quiet=not processes.is_primary())) as progress:
        bar = progress.add_task("loading", total=None)
        prompts = list(dict.fromkeys(clip.request.prompt for clip in clips))
        sampler = Sampler.load(config, encoder, on_step, prompts)
        progress.console.print(f"attention by {compute_for(config, sampler.mesh).backend}")
        told = None if frames is None else sampler.given([frames])
        given = functools.partial(_given, _reader(sampler, encoder, features), told)
        batches = list(_batches(clips, batch_parts(sampler.mesh)))
        first = given(batches[0])
        phases.end("load")
        progress.update(bar, description="compiling")
        for batch in {(_kind(batch[0]), len(batch)): batch for batch in batches}.values():
            sampler.steps(**(first if batch is batches[0] else given(batch)))
            if warm:
                sampler.pixels(sampler.noise([clip.request.seed for clip in batch]))
        phases.end("compile")
        if warm:
            return
        progress.update(bar, total=len(sampling_sigmas(config.sample)) * len(batches))
        made, broken, begun = 0, [], time.perf_counter()
        with _told_when_interrupted(lambda: f"{made} of {len(clips)} clips are finished"):
            for batch in batches:
                seeds = [clip.request.seed for clip in batch]
                progress.update(bar, description=f"steps of seed {', '.join(map(str, seeds))}")
                try:
                    pixels = sampler.generate(seeds=seeds, **given(batch))
                except NotFinite as error:
                    broken += [(clip, error) for clip in batch]
                    continue
                for clip, shown in zip(batch, pixels, strict=True):
                    if processes.is_primary():
                        clip.write(shown, config.video.fps)
                    progress.console.print(str(clip.path), highlight=False, soft_wrap=True)
                made += len(batch)
                if sampler.computed is not None:
                    count, steps = sampler.computed.mean(), len(sampling_sigmas(config.sample))
                    progress.console.print(f"step cache: {count:.3g} of {steps} steps computed")
                if check_step_cache and batch is batches[0]:
                    error = sampler.step_cache_error(seeds=seeds, **given(batch))
                    progress.console.print(f"step cache: latents are {error:.2%} from those of all steps")
                if len(batches) > 1 and not progress.console.is_terminal:
                    seconds = (time.perf_counter() - begun) / (made + len(broken))
                    left = seconds * (len(clips) - made - len(broken))
                    progress.console.print(
                        f"{made} of {len(clips)}, {seconds:.1f} s a clip, ETA {left:.0f} s"
                    )
        progress.console.print(f"memory in use {compilation.memory_in_use() / 1e9:.2f} GB")
    if broken:
        clip, error = broken[0]
        raise UserError(
            f"{len(broken)} of {len(clips)} clips were not made, the first for {clip.request.prompt!r}, seed "
            f"{clip.request.seed}: {error}"
        )


def _requests(
    config: Config,
    prompts: str | Sequence[str | Request],
    memory: Literal["auto", "none"] | Sequence[str],
    seeds: Sequence[int],
) -> list[Request]:
    """All clips that are asked for, each with a seed, a memory and, if that is not none, a strength."""
    memory = memory if isinstance(memory, str) else tuple(memory)
    requests = []
    for given in [prompts] if isinstance(prompts, str) else prompts:
        request = Request(given) if isinstance(given, str) else given
        if not request.prompt.strip():
            raise UserError("the prompt is missing or empty", expected="what the clip shows, in words")
        kind = memory if request.memory is None else request.memory
        strength = config.sample.strength if request.strength is None else request.strength
        for seed in seeds if request.seed is None else [request.seed]:
            dataclasses.replace(config.sample, seed=seed, strength=strength)  # which checks them
            requests.append(Request(request.prompt, seed, kind, None if kind == "none" else strength))
    if not requests:
        raise UserError("nothing is asked for", expected="a prompt and a seed")
    return requests


def _check_out(out: Path, count: int) -> None:
    if out.suffix == ".mp4":
        if count > 1:
            raise UserError(f"{count} clips do not fit into {out}", fix="a folder as --out, or --count=1")
        if out.is_dir():
            raise UserError(f"{out} is a folder", expected="the name of a clip, or a folder without .mp4")
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", expected="a folder, or a name that ends in .mp4")


def _plan(
    config: Config,
    requests: Sequence[Request],
    out: Path,
    encoder: Sequence[Path] | None,
    features: str | Path | None,
    frames: GivenFrames | None,
) -> list[Clip]:
    """Finds the memory of each clip, names its file and says what it is made from."""
    if features is not None and isinstance(config.memory, FreeTokensConfig) and encoder is not None:
        raise UserError("free tokens are made from no video", fix="leave --features out")
    found = _retrieve_all(config, requests)
    used = [{"file": path.name, "sha256": of_file(path)} for path in encoder or ()]
    index = read_index(config.weights.path)
    whole = to_dict(config)
    decides = {part: dict(whole[part]) for part in DECIDES}
    for name in ("seed", "strength"):
        del decides["sample"][name]  # what counts is those of the request
    for name in ("trained", "sampling", "clips", "hdr"):
        del decides["video"][name]  # a fact for a warning, and how videos are encoded
    common = [decides, config.weights.dtype, index["networks"], index["checksums"]]
    if frames is not None:
        last = {} if frames.last is None else {"last": frames.last}
        common.append(of_arrays({"first": frames.first} | last))
    clips = []
    for request in requests:
        memory = found.get((request.prompt, request.memory))
        if memory is not None and not memory.videos:
            memory = None
        videos = [] if memory is None else list(zip(memory.videos, memory.scores, strict=True))
        source = None
        if memory is not None and isinstance(config.memory, FreeTokensConfig):
            source = majority_source(References.of(memory.videos).entries, config.memory.column)
            _tell(f"memory: the free tokens of {source}")
        about = {
            "prompt": request.prompt,
            "seed": request.seed,
            "strength": request.strength,
            "memory": [{"id": v["id"], "caption": v["caption"], "score": score} for v, score in videos],
            "encoder": None if memory is None else used[0] if len(used) == 1 else used,
            "frames": {} if frames is None else frames.origin,
        }
        about |= {} if source is None else {"source": source}
        hashes = [] if memory is None else [each["sha256"] for each in used]
        seen = [video["checksum"] for video, _ in videos]
        about["digest"] = of_json(
            [common, request.prompt, request.seed, request.strength, seen, hashes, source]
        )
        about["config"] = whole
        clips.append(Clip(request, _path(out, request, about["digest"]), about, memory, source))
    return clips


def _path(out: Path, request: Request, digest: str) -> Path:
    """`out` itself, or a file in that folder named after the prompt, its seed, and all that decides the clip."""
    if out.suffix == ".mp4":
        return out
    words = "-".join(re.findall(r"\w+", request.prompt.lower()))[:60].encode()[:150].decode(errors="ignore")
    kind = "plain" if request.memory == "none" else "memory"
    return out / f"{words or 'clip'}-{kind}-{request.seed}-{digest[:8]}.mp4"


def _digest_beside(path: Path) -> str | None:
    """The digest in the file beside a clip, of all that it was made from; None without one."""
    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about.get("digest") if isinstance(about, dict) else None


def _retrieve_all(config: Config, requests: Sequence[Request]) -> dict[tuple[Any, Any], Retrieved]:
    """Find the memory of each prompt and kind of memory, and tell it."""
    wanted = dict.fromkeys((each.prompt, each.memory) for each in requests if each.memory != "none")
    searched = [prompt for prompt, memory in wanted if memory == "auto"]
    found = (
        {(prompt, "auto"): each for prompt, each in zip(searched, search(config, searched), strict=True)}
        if searched
        else {}
    )
    for prompt, memory in wanted:
        if memory != "auto":
            found[prompt, memory] = retrieve(config, prompt, memory)
        if len(wanted) > 1:
            _tell(f"memory of {prompt!r}")
        for video, score in zip(found[prompt, memory].videos, found[prompt, memory].scores, strict=True):
            _tell(
                f"memory {'  named' if score is None else f'{score:7.3f}'}  {video['id']}  {video['caption']}"
            )
    if searched:
        _tell(
            "memory: the nearest videos with a record, as in training; but there a record's own source, equal "
            "latents and near duplicates are left out, and here nothing is"
        )
    return found


def _kind(clip: Clip) -> tuple[Any, ...]:
    """The properties that clips of one batch share."""
    videos = None if clip.memory is None or clip.source is not None else len(clip.memory.videos)
    return videos, clip.source is not None, clip.request.strength


def _batches(clips: Sequence[Clip], size: int) -> Iterator[list[Clip]]:
    kinds: dict[tuple[Any, ...], list[Clip]] = {}
    for clip in clips:
        kinds.setdefault(_kind(clip), []).append(clip)
    for same in kinds.values():
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _given(read: Callable[[Retrieved], Rows], frames: Given | None, clips: Sequence[Clip]) -> dict[str, Any]:
    """Prompts, memories and frames of a batch, as `Sampler.steps` and `Sampler.generate` take them."""
    given: dict[str, Any] = {"prompts": [clip.request.prompt for clip in clips]}
    if clips[0].source is not None:
        given["sources"] = [clip.source for clip in clips]
    elif clips[0].memory is not None:
        parts = zip(*(read(clip.memory) for clip in clips), strict=True)
        given["references"] = tuple(np.concatenate(part) for part in parts)
    if frames is not None:
        given["frames"] = {name: np.repeat(x, len(clips), axis=0) for name, x in frames.items()}
    if clips[0].request.strength is not None:
        given["strength"] = clips[0].request.strength
    return given


def _reader(
    sampler: Sampler, encoders: Sequence[Path] | None, features: str | Path | None
) -> Callable[[Retrieved], Rows]:
    """A function from what was found for a prompt to the rows of its videos, from a store or their latents.

    It tells what it reads.
    """
    stores = [Features.open(features, path) for path in encoders or ()] if features is not None else []
    known: dict[tuple[str, ...], Rows] = {}

    def read(retrieved: Retrieved) -> Rows:
        key = tuple(retrieved.checksums)
        if key not in known:
            if len(known) > 32:  # prompts come one after the other: those long gone need no memory
                known.clear()
            start, count = time.perf_counter(), len(key)
            if stores:
                known[key] = tuple(store.rows(key)[None] for store in stores)
                size, latents = sum(x.nbytes for x in known[key]), count * stores[0].latents_bytes
                told = f"tokens of {count} videos, {size:,} bytes instead of {latents:,} of latents"
            else:
                found = retrieved.latents[None]
                told = f"latents of {count} videos, {found.nbytes:,} bytes in float32"
            _tell(f"memory: {told}, read in {time.perf_counter() - start:.3f} s")
            if not stores:
                known[key] = sampler.rows(found)
        return known[key]

    return read


@contextlib.contextmanager
def _told_when_interrupted(state: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _tell(f"{state()}; the same command makes the others")
        raise


def _tell(text: str) -> None:
    if processes.is_primary():
        print(text, flush=True)
