"""Clips of planets as arrays: rendered by all cores, encoded by the tiny Wan's own VAE and text encoder.

Three splits, none of which shares a planet with another: to train on, to choose settings with, and to report. Each
opening of planets to report takes planets that were never rendered before.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.config import Config
from ditmem_jax.models.wan.vae import decode_scan, encode_scan
from ditmem_jax.storage.weights import load_umt5, load_vae
from ditmem_jax.worlds.captions import caption
from ditmem_jax.worlds.laws import PHENOMENA, World, splits
from ditmem_jax.worlds.simulate import Clip, sample_clip
from experiments.evidence import pixels

STREAM = 20  # of random numbers; `worlds make` and the demo draw from others
CHOOSE, REPORT = 24, 24  # planets
FIRST_REPORTED = 64  # unseen planets below are those of the demo and of earlier work, and never reported on
BATCH = 96  # clips that go through the VAE at once


@dataclasses.dataclass(frozen=True)
class Planets:
    """Clips of some planets: `clips[planet][phenomenon]` are alike in number."""

    worlds: Sequence[World]
    clips: list[list[Clip]]

    @property
    def flat(self) -> list[tuple[int, Clip]]:
        return [(number, clip) for number, clips in enumerate(self.clips) for clip in clips]


def planets(split: str, count: int, per_phenomenon: int, opening: int = 0) -> Planets:
    """Render clips of the planets of a split: "train", "choose" or "report"; `opening` counts reports from 0."""
    if split == "train":
        worlds = splits(0, train=count).train
    else:
        first = 0 if split == "choose" else FIRST_REPORTED + opening * REPORT
        worlds = splits(0, unseen=first + count).unseen[first:]
    return Planets(
        worlds,
        pixels.on_all_cores(pixels.render, [(STREAM, split, world, per_phenomenon) for world in worlds]),
    )


class Codec:
    """The frozen networks around the transformer, compiled for batches of clips."""

    def __init__(self, config: Config):
        self.config = config
        self._vae, (text, self._tokenizer) = load_vae(config), load_umt5(config)
        self._encode, self._decode = nnx.jit(encode_scan), nnx.jit(decode_scan)
        self._text = nnx.jit(lambda text, ids, mask: text(ids, mask))
        self._text_encoder = text

    def latents(self, clips: Sequence[Clip]) -> np.ndarray:
        """Latents [n, T, H, W, C] of rendered clips."""
        videos = np.stack([clip.video for clip in clips])
        return self._batched(
            lambda x: self._encode(self._vae, jnp.asarray(x.astype(np.float32) / 127.5 - 1)), videos
        )

    def videos(self, latents: np.ndarray) -> np.ndarray:
        """Pixels [n, T, H, W, 3] of latents."""
        unit = self._batched(lambda x: self._decode(self._vae, jnp.asarray(x)), latents)
        return np.rint((np.clip(unit, -1, 1) + 1) * 127.5).astype(np.uint8)

    def text(self, captions: Sequence[str]) -> np.ndarray:
        """Text embeddings [n, L, E], zero past their length."""
        ids, mask = self._tokenizer(list(captions), allow_empty=True)
        rows = np.concatenate([ids, mask.astype(ids.dtype)], axis=1)
        length = ids.shape[1]

        def run(rows):
            return self._text(
                self._text_encoder, jnp.asarray(rows[:, :length]), jnp.asarray(rows[:, length:] > 0)
            )

        return self._batched(run, rows)

    def _batched(self, run, x: np.ndarray) -> np.ndarray:
        """`run` over batches of one size, the last one filled up."""
        index = np.arange(-(-len(x) // BATCH) * BATCH) % len(x)
        parts = [np.asarray(run(x[part])) for part in index.reshape(-1, BATCH)]
        return np.concatenate(parts)[: len(x)]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Clips of planets as a backbone takes them, and which are whose.

    `members` [planets, n] are the clips of each planet, `planet` and `kind` [N] a clip's planet and phenomenon.
    """

    latents: np.ndarray
    text: np.ndarray
    planet: np.ndarray
    kind: np.ndarray
    members: np.ndarray


def encode(codec: Codec, given: Planets) -> Encoded:
    flat = given.flat
    names = list(PHENOMENA)
    planet = np.array([number for number, _ in flat])
    return Encoded(
        codec.latents([clip for _, clip in flat]),
        codec.text([caption(clip, given.worlds[number].name) for number, clip in flat]),
        planet,
        np.array([names.index(clip.scene.phenomenon) for _, clip in flat]),
        np.arange(len(flat)).reshape(len(given.worlds), -1),
    )


@dataclasses.dataclass(frozen=True)
class Trials:
    """Prompts about planets: the clip that the planet itself would give, and the references of each way to ask.

    `references[way]` [n, R] are numbers of clips of `bank`: "right" of the prompt's planet, those of its phenomenon
    first, as a search by caption finds them; "other kind" of its other phenomena that share a constant, or any;
    "wrong" of another planet, else as "right".
    """

    bank: Planets
    clips: list[Clip]
    number: np.ndarray
    references: dict[str, np.ndarray]

    def world(self, trial: int) -> World:
        return self.bank.worlds[self.number[trial]]


def draw_trials(bank: Planets, encoded: Encoded, references: int, falls: int = 2) -> Trials:
    """New clips of the bank's planets: `falls` falls of each and one of every other phenomenon."""
    names, rng = list(PHENOMENA), np.random.default_rng([STREAM, 1])
    clips, number, found = [], [], {"right": [], "other kind": [], "wrong": []}
    for index, world in enumerate(bank.worlds):
        for phenomenon in ["fall"] * (falls - 1) + names:
            clips.append(sample_clip(rng, world, phenomenon))
            number.append(index)
            kind = names.index(phenomenon)
            shares = {
                names.index(other)
                for other in names
                if other != phenomenon and set(PHENOMENA[other]) & set(PHENOMENA[phenomenon])
            }
            far = (index + 1 + int(rng.integers(len(bank.worlds) - 1))) % len(bank.worlds)
            for way, planet, first in (
                ("right", index, {kind}),
                ("other kind", index, shares or set(range(len(names))) - {kind}),
                ("wrong", far, {kind}),
            ):
                members = rng.permutation(encoded.members[planet])
                order = sorted(members, key=lambda clip: encoded.kind[clip] not in first)
                if way == "other kind":
                    order = [clip for clip in order if encoded.kind[clip] != kind]
                found[way].append(order[:references])
    return Trials(bank, clips, np.array(number), {way: np.array(x) for way, x in found.items()})


def believed(trials: Trials, encoded: Encoded) -> list[dict[str, float]]:
    """For each trial the constants of the planet that its wrong memory is from: what believing it entirely would show."""
    planets = encoded.planet[trials.references["wrong"][:, 0]]
    return [
        trials.bank.worlds[planet].shown_by(clip.scene.phenomenon)
        for planet, clip in zip(planets, trials.clips, strict=True)
    ]


def constants(trials: Trials) -> list[tuple[int, str, str, float]]:
    """(trial, phenomenon, constant, true value) of everything that could be measured."""
    rows = (
        [
            (index, clip.scene.phenomenon, name, value)
            for name, value in trials.world(index).shown_by(clip.scene.phenomenon).items()
        ]
        for index, clip in enumerate(trials.clips)
    )
    return list(itertools.chain.from_iterable(rows))
