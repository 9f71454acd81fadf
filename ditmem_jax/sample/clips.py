"""Clips from prompts as files, and beside each what it was made from."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
from ditmem_jax.sample.retrieval import Retrieved, retrieve
from ditmem_jax.sample.sampler import Rows, Sampler, with_encoders
from ditmem_jax.storage.digests import of_file
from ditmem_jax.storage.files import write_text
from ditmem_jax.types import GivenFrames


def make_clips(
    config: Config,
    prompt: str,
    out: str | Path,
    encoder: str | Path | Sequence[str | Path] | None = None,
    memory: Literal["auto", "none"] | Sequence[str] = "auto",
    seeds: Sequence[int] = (0,),
    features: str | Path | None = None,
    frames: GivenFrames | None = None,
    *,
    warm: bool = False,
) -> list[Path]:
    """Makes one clip of `prompt` per seed, and beside each a JSON file about its making, under a progress bar.

    Args:
        out: a folder, or the name of the only clip.
        encoder: file of a trained memory encoder, or one for each of two experts; needed unless `memory` is "none".
        memory: "auto" takes the videos that the bank finds for the prompt; or ids of videos.
        features: store of `bank.features` to take what the encoder makes of them from, instead of their latents.
        frames: pictures that the clips are to hold, see `conditions.files.read_frames`.
        warm: load and compile everything, which fills the compile cache, and make no clip.
    Raises:
        UserError: for an empty prompt, a missing or unfit file, a bank that cannot give the videos, or features
            of another encoder or without one of the videos; for free tokens also if these are of no such source.
    """
    if not prompt.strip():
        raise UserError("the prompt is missing or empty", expected="what the clip shows, in words")
    config = prepared(config, frames)
    phases = compilation.Phases()
    paths = _paths(Path(out), prompt, "plain" if memory == "none" else "memory", seeds)
    about = {
        "prompt": prompt,
        "seed": None,
        "strength": config.sample.strength,
        "memory": [],
        "encoder": None,
        "frames": {} if frames is None else frames.origin,
    }
    references = source = None
    if memory == "none":
        encoder = None
    else:
        if encoder is None:
            raise UserError("no encoder is named", fix="--encoder=FILE, or --memory=none")
        config, encoder = with_encoders(config, encoder)
        retrieved = retrieve(config, prompt, None if memory == "auto" else memory)
        for video, score in zip(retrieved.videos, retrieved.scores, strict=True):
            id, caption = video["id"], video["caption"]
            if processes.is_primary():
                print(f"memory {'  named' if score is None else f'{score:7.3f}'}  {id}  {caption}")
            about["memory"].append({"id": id, "caption": caption, "score": score})
        if retrieved.note and processes.is_primary():
            print(f"note: {retrieved.note}")
        if memory == "auto" and processes.is_primary():
            print(
                "memory: the nearest videos with a record, as in training; but there a record's own source, equal "
                "latents and near duplicates are left out, and here nothing is"
            )
        if isinstance(config.memory, FreeTokensConfig):
            if features is not None:
                raise UserError("free tokens are made from no video", fix="leave --features out")
            source = majority_source(References.of(retrieved.videos).entries, config.memory.column)
            about["source"] = source
            if processes.is_primary():
                print(f"memory: the free tokens of {source}")
        else:
            references = _references(retrieved, encoder, features)
        used = [{"file": path.name, "sha256": of_file(path)} for path in encoder]
        about["encoder"] = used if len(used) > 1 else used[0]
    about["config"] = to_dict(config)

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()

    def on_step():
        if "first step" not in phases.seconds:
            phases.end("first step")
            progress.console.print(phases)
        progress.advance(bar)

    with Progress(*columns, console=Console(quiet=not processes.is_primary())) as progress:
        bar = progress.add_task("loading", total=None)
        sampler = Sampler.load(config, encoder, on_step, [prompt])
        progress.console.print(f"attention by {compute_for(config, sampler.mesh).backend}")
        if references is not None and not isinstance(references, tuple):
            references = sampler.rows(references)  # once for all clips
        told = None if frames is None else sampler.given([frames])
        phases.end("load")

        def given(count: int) -> dict[str, Any]:
            held = told and {name: np.repeat(x, count, axis=0) for name, x in told.items()}
            if source is not None:
                return {"sources": [source] * count, "frames": held}
            rows = references and tuple(np.repeat(x, count, axis=0) for x in references)
            return {"references": rows, "frames": held}

        size = batch_parts(sampler.mesh)
        batches = [slice(start, start + size) for start in range(0, len(paths), size)]
        progress.update(bar, description="compiling")
        for now in {len(seeds[batch]): seeds[batch] for batch in batches}.values():
            sampler.steps([prompt] * len(now), **given(len(now)))
            if warm:
                sampler.pixels(sampler.noise(now))
        phases.end("compile")
        if warm:
            return []
        progress.update(bar, total=len(sampling_sigmas(config.sample)) * len(batches))
        for batch in batches:
            now = seeds[batch]
            progress.update(bar, description=f"steps of seed {', '.join(map(str, now))}")
            clips = sampler.generate([prompt] * len(now), now, **given(len(now)))
            for seed, path, clip in zip(now, paths[batch], clips, strict=True):
                if processes.is_primary():
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
    if processes.is_primary():
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
