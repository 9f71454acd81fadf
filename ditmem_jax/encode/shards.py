"""The encoding of videos and captions by the frozen networks: embeddings, and the shards of records that `encode` collects.

A shard is made of a fixed range of rows, whatever happens to other shards: its videos that can be read go through the
networks `batch` at a time, in order. So it does not depend, but for rounding, on who makes it, or when.
"""

import dataclasses
import functools
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ditmem_jax.conditions.condition import ImageNetworks
from ditmem_jax.conditions.kinds import condition_for, condition_layout
from ditmem_jax.config import Config, build
from ditmem_jax.data.record import Entry, Record
from ditmem_jax.data.records import CONTINUES, Meta, Shard, write_shard
from ditmem_jax.data.sources import Row
from ditmem_jax.data.video import Clip, Frames, to_unit
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import split
from ditmem_jax.models.wan.clip import CLIPVision
from ditmem_jax.models.wan.tokenizer import Tokenizer
from ditmem_jax.models.wan.umt5 import UMT5
from ditmem_jax.models.wan.vae import VAE, encode
from ditmem_jax.storage.digests import of_arrays, of_file, of_json
from ditmem_jax.storage.files import read_json, write_text
from ditmem_jax.storage.weights import load_clip

Networks = tuple[VAE, tuple[UMT5, Tokenizer]]


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings and networks that all shards of one run share.

    Args:
        parts: the folder for shards that wait for their place among the records.
        batch: clips that go through the networks at once.
        minimum: frames that a video must have.
        strict: whether videos of which FFmpeg tells errors are left out.
    """

    config: Config
    meta: Meta
    parts: Path
    batch: int
    minimum: int
    strict: bool = False

    @property
    def reading(self) -> dict[str, Any]:
        """The options of `data.sources.read_row`."""
        video = self.config.video
        size = dict(frames=video.frames, height=video.height, width=video.width)
        options = dict(mode=video.resize, minimum=self.minimum, hdr=video.hdr, strict=self.strict)
        return size | options | dict(fps=video.fps if video.sampling == "rate" else None)


@dataclasses.dataclass(frozen=True)
class Part:
    """A finished shard in the folder of parts, and why the other rows are not in it, by id."""

    shard: Shard
    skipped: dict[str, str]


def write_part(rows: Sequence[Row], clips: Iterable[Clip | str], networks: Networks, job: Job) -> Part:
    """Encodes the rows of a shard, each of which has a clip or the reason why it has none."""
    skipped: dict[str, str] = {}

    def good() -> Iterator[tuple[Entry, Clip]]:
        for (entry, _), clip in zip(rows, clips, strict=True):
            if isinstance(clip, str):
                skipped[entry.id] = clip
            else:
                yield entry, clip

    told = functools.partial(_condition, job.config, networks[0])

    def records() -> Iterator[Record]:
        todo = good()
        while group := list(itertools.islice(todo, job.batch)):
            yield from _encode_batch(group, job.batch, *networks, told)

    name = (
        uuid.uuid4().hex
    )  # a worker that was thought lost must not write to the files of the one in its place
    part = Part(write_shard(job.parts, name, records(), job.meta), skipped)
    write_text(_note(rows, job), json.dumps(dataclasses.asdict(part)), fix=CONTINUES)
    return part


def find_part(rows: Sequence[Row], job: Job) -> Part | None:
    """The part that an interrupted run made of these rows, if it did."""
    if not (note := _note(rows, job)).exists():
        return None
    part = build(
        Part, read_json(note, f"delete {note}; the same command then encodes its videos again"), str(note)
    )
    files = [job.parts / f"{part.shard.name}.{suffix}" for suffix in ("jsonl", "array_record")]
    return part if all(file.exists() for file in files) else None


def _note(rows: Sequence[Row], job: Job) -> Path:
    """The file that tells of the part of these rows, once that is finished."""
    files = [
        None if isinstance(place, UserError) else [place.state_if_there(), str(place.part)]
        for _, place in rows
    ]
    made_from = [
        job.meta.to_json(),
        job.batch,
        job.minimum,
        job.strict,
        [vars(entry) for entry, _ in rows],
        files,
    ]
    return job.parts / f"{of_json(made_from)[:32]}.json"


def describe(config: Config, networks: Networks) -> Meta:
    """The identity of records made with this config and these networks."""
    video, (vae, (umt5, tokenizer)) = config.video, networks
    grid = vae.config.latent_grid(video.frames, video.height, video.width)
    return Meta(
        latents=(*grid, vae.config.z_dim),
        text_dim=umt5.config.dim,
        dtype=config.weights.computed_in,
        made_by=_describe_condition(config)
        | {
            "frames": video.frames,
            "height": video.height,
            "width": video.width,
            "resize": video.resize,
            **({"sampling": f"{video.fps} fps", "clips": video.clips} if video.sampling == "rate" else {}),
            **({"hdr": video.hdr} if video.hdr != "map" else {}),
            "text_len": tokenizer.length,
            "vae": fingerprint(vae),
            "text": fingerprint(umt5),
            "tokenizer": of_file(tokenizer.path),
        },
    )


def _describe_condition(config: Config) -> dict[str, Any]:
    layout = condition_layout(config)
    if not layout:
        return {}
    clip = {"clip": fingerprint(_clip(config))} if config.dit.image_dim is not None else {}
    return {"condition": {name: list(shape) for name, shape in layout.items()}} | clip


def embed(umt5: UMT5, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[Float[np.ndarray, "L D"]]:
    """The embedding of each prompt, without padding; a prompt may be empty."""
    ids, mask = tokenizer(prompts, allow_empty=True)
    graph, state = nnx.split(umt5)
    embeddings = np.asarray(_embed(graph, state, jnp.asarray(ids), jnp.asarray(mask)))
    return [embedding[: row.sum()] for embedding, row in zip(embeddings, mask, strict=True)]


@partial(jax.jit, static_argnums=0)
def _embed(graph: nnx.GraphDef, state: nnx.State, ids: Array, mask: Array) -> Array:
    return nnx.merge(graph, state)(ids, mask)


def _condition(config: Config, vae: VAE, frames: Frames) -> dict[str, np.ndarray]:
    """The condition that training gives the transformer for these frames of a clip, where records keep it."""
    condition = condition_for(config)
    if condition is None or (given := condition.stored(frames)) is None:
        return {}
    clip = _clip(config) if config.dit.image_dim is not None else None
    told = condition.encode([given], ImageNetworks(vae, clip))
    return {name: x[0] for name, x in told.items()}


@functools.lru_cache(maxsize=1)
def _clip(config: Config) -> CLIPVision:
    return load_clip(config)


def _encode_batch(
    group: list[tuple[Entry, Clip]],
    size: int,
    vae: VAE,
    text: tuple[UMT5, Tokenizer],
    told: Callable[[Frames], dict[str, np.ndarray]],
) -> Iterator[Record]:
    padded = group + group[-1:] * (size - len(group))  # one shape, one compilation
    latents = np.asarray(encode(vae, jnp.asarray(to_unit(np.stack([clip.frames for _, clip in padded])))))
    embeddings = embed(*text, [entry.caption for entry, _ in padded])
    for (entry, clip), x, embedding in zip(group, latents, embeddings, strict=False):
        made = dict(latents=x, text_embedding=embedding, condition=told(clip.frames))
        yield Record(**vars(entry), **made, facts=clip.facts, stamp=clip.stamp)


def fingerprint(module: nnx.Module) -> str:
    """A hash of the module's weights."""
    return of_arrays(split(module)[1])
