"""The trials: prompts about unseen planets, their clips with and without memory, and the laws these show."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from ditmem_jax.bank.search import Bank
from ditmem_jax.config import Config
from ditmem_jax.data.references import References
from ditmem_jax.evaluate.laws import told
from ditmem_jax.progress import track
from ditmem_jax.sample.sampler import Sampler
from ditmem_jax.storage.files import replacing
from ditmem_jax.worlds.captions import caption
from ditmem_jax.worlds.laws import PHENOMENA, World
from ditmem_jax.worlds.simulate import Clip, sample_clip

SAMPLED = ("without", "right", "wrong", "stated")  # ways to make a clip
ALL = ("real", *SAMPLED, "copy")  # and the clip of the planet itself, and the nearest reference as it is
BATCH = 24  # clips that are made at once
STREAM = 10  # of random numbers; none that `worlds` draws from


@dataclasses.dataclass(frozen=True)
class Trial:
    """A prompt about a planet, and the clip that the planet itself would give.

    Attributes:
        other: the planet whose clips serve as wrong memory.
        seed: of the noise that all ways to make the clip start from.
    """

    number: int
    world: World
    other: World
    phenomenon: str
    clip: Clip
    seed: int

    @property
    def prompt(self) -> str:
        return caption(self.clip, self.world.name)

    @property
    def stated(self) -> str:
        """The prompt with the constants in numbers."""
        return caption(self.clip, self.world.name, "numbers")

    @property
    def asks_other(self) -> str:
        """The query for the wrong memory: the prompt with the other planet's name."""
        return caption(self.clip, self.other.name)


def draw(worlds: Sequence[World], counts: dict[str, int], known: set[str], seed: int) -> list[Trial]:
    """`counts[phenomenon]` trials of every world, with prompts that are not among the captions `known`.

    Wrong memory is from another planet each time, every third one counted from the prompt's own.
    """
    trials = []
    for number, world in enumerate(worlds):
        others = itertools.cycle([*worlds[number + 1 :], *worlds[:number]][::3])
        for kind, phenomenon in enumerate(PHENOMENA):
            rng = np.random.default_rng([seed, STREAM, number, kind])
            for _ in range(counts[phenomenon]):
                clip = sample_clip(rng, world, phenomenon)
                while caption(clip, world.name) in known:
                    clip = sample_clip(rng, world, phenomenon)
                trials.append(Trial(number, world, next(others), phenomenon, clip, seed + len(trials)))
    return trials


def find(
    bank: str, prompts: Sequence[str], k: int
) -> tuple[list[list[str]], Float32[np.ndarray, "P k T H W C"]]:
    """Return the ids and the latents of the k clips that the bank finds for each prompt, the nearest first."""
    found = Bank.open(bank).search_records(prompts, k)
    rows = {row["id"]: row for hits in found.rows for row in hits}
    latents = {record.id: record.latents.astype(np.float32) for record in References.of(rows.values())}
    return found.ids, np.stack([[latents[id] for id in ids] for ids in found.ids])


def scores(bank: Bank, prompts: Sequence[str], ids: Sequence[Sequence[str]]) -> Float32[np.ndarray, "P k"]:
    """Return how well each of these clips fits the prompt, by whatever search they were found."""
    everything = bank.search(prompts, len(bank))
    by_id = [dict(zip(*row, strict=True)) for row in zip(everything.ids, everything.scores, strict=True)]
    return np.array([[row[id] for id in chosen] for row, chosen in zip(by_id, ids, strict=True)], np.float32)


def make(
    config: Config, encoder: str, trials: Sequence[Trial]
) -> tuple[dict[str, UInt8[np.ndarray, "..."]], dict[str, np.ndarray]]:
    """Return clips [trial, T, H, W, 3] by the way they were made, and of the references [trial, k] of right and wrong
    memory the ids and the scores for the prompt.

    All of them are read, also those that `sample.min_score` leaves out: how a memory is read that does not fit is a
    finding, and without any of its references a clip is the one without memory.
    """
    k, bank = config.data.references, config.data.bank
    prompts, seeds = [trial.prompt for trial in trials], [trial.seed for trial in trials]
    ids, right = find(bank, prompts, k)
    others, wrong = find(bank, [trial.asks_other for trial in trials], k)
    ways = {
        "without": (prompts, None),
        "right": (prompts, right),
        "wrong": (prompts, wrong),
        "stated": ([trial.stated for trial in trials], None),
    }
    sampler = Sampler.load(config, encoder)
    batches = [(way, start) for way in SAMPLED for start in range(0, len(trials), BATCH)]
    clips = {way: [] for way in SAMPLED}
    for way, start in track(batches, "clips"):
        texts, references = ways[way]
        rows = np.minimum(np.arange(start, start + BATCH), len(trials) - 1)  # one size, one compilation
        made = sampler.generate(
            [texts[row] for row in rows],
            [seeds[row] for row in rows],
            None if references is None else references[rows],
        )
        clips[way].append(made[: len(trials) - start])
    found = {"references": np.array(ids)}
    opened = Bank.open(bank)
    found |= {"scores.right": scores(opened, prompts, ids), "scores.wrong": scores(opened, prompts, others)}
    return {way: np.concatenate(parts) for way, parts in clips.items()}, found


class Kind(NamedTuple):
    """The subject of a clip."""

    planet: str
    phenomenon: str


def alike(pairs: Iterable[tuple[Kind, Sequence[Kind]]]) -> dict[str, float]:
    """Return the share of references that are of the planet, and of planet and phenomenon, of what they are for.

    Args:
        pairs: what a record or a prompt is of, and what its references are of.
    """
    found = [(one.planet == kind.planet, one == kind) for kind, references in pairs for one in references]
    planet, both = np.mean(found, axis=0).tolist()
    return {"planet": planet, "planet and phenomenon": both}


@dataclasses.dataclass(frozen=True)
class Findings:
    """Constants measured in the clips, one entry per trial and constant.

    Attributes:
        trial, world: their numbers.
        true, other: the constant on the prompt's planet and on that of the wrong memory.
        measured: by way of making; NaN where the clip does not tell the constant.
    """

    trial: np.ndarray
    world: np.ndarray
    phenomenon: np.ndarray
    constant: np.ndarray
    true: np.ndarray
    other: np.ndarray
    measured: dict[str, np.ndarray]

    def save(self, path: Path) -> None:
        columns = {name: values for name, values in vars(self).items() if name != "measured"}
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **columns, **{f"measured.{way}": values for way, values in self.measured.items()})

    @classmethod
    def load(cls, path: Path) -> "Findings":
        with np.load(path, allow_pickle=False) as stored:
            measured = {way: stored[f"measured.{way}"] for way in ALL}
            columns = {name: stored[name] for name in stored.files if not name.startswith("measured.")}
        return cls(**columns, measured=measured)


def examine(trials: Sequence[Trial], clips: dict[str, np.ndarray]) -> Findings:
    """Measure every clip as one of its trial's phenomenon; `clips` holds all but the real, which the trials have."""
    films = {"real": [trial.clip.video for trial in trials], **clips}
    entries, measured = [], {way: [] for way in ALL}
    for index, trial in enumerate(track(trials, "measuring")):
        shown = {way: told(films[way][index], trial.phenomenon) for way in ALL}
        for constant, value in trial.world.shown_by(trial.phenomenon).items():
            other = getattr(trial.other, constant)
            entries.append((index, trial.number, trial.phenomenon, constant, value, other))
            for way in ALL:
                measured[way].append(shown[way].get(constant, np.nan))
    columns = map(np.array, zip(*entries, strict=True))
    return Findings(*columns, measured={way: np.array(values) for way, values in measured.items()})
