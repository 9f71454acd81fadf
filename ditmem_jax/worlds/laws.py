"""Worlds: made-up planets, each with its own constants of nature, and the phenomena that show them.

Every phenomenon isolates its own constants: a dropped ball feels no drag, a thrown one no friction.
So a clip is explained by its caption, its start and the constants that `PHENOMENA` lists, by nothing else.
"""

import math
from dataclasses import dataclass

import numpy as np

from ditmem_jax.errors import UserError


@dataclass(frozen=True)
class Range:
    """Values a constant takes over all worlds: uniform, or uniform in the logarithm."""

    low: float
    high: float
    log: bool
    unit: str

    def at(self, fraction: float) -> float:
        """The value at `fraction` (0 to 1) of the range."""
        if self.log:
            return self.low * (self.high / self.low) ** fraction
        return self.low + (self.high - self.low) * fraction

    def fraction(self, value: float) -> float:
        """Inverse of `at`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


# Chosen so that 1.5 seconds in a view of four metres show each constant: the slowest ball still bounces, the
# weakest spring still passes half a period, the faintest drag still bends the path by more than a pixel.
RANGES = {
    "gravity": Range(2.0, 12.0, True, "m/s^2"),
    "bounciness": Range(0.3, 0.95, False, ""),  # coefficient of restitution: speed after over speed before
    "drag": Range(0.5, 3.0, True, "1/s"),  # linear: acceleration = -drag * velocity
    "friction": Range(0.8, 5.0, True, "m/s^2"),  # deceleration of a sliding body, mu * g
    "stiffness": Range(8.0, 80.0, True, "1/s^2"),  # spring constant over mass: the angular frequency squared
}

PHENOMENA = {
    "fall": ("gravity", "bounciness"),
    "throw": ("gravity", "drag"),
    "pendulum": ("gravity",),
    "spring": ("stiffness",),
    "slide": ("friction",),
    "collision": ("bounciness",),
}


@dataclass(frozen=True)
class World:
    """A planet. `name` is None for worlds that captions must not name; units as in `RANGES`."""

    name: str | None
    gravity: float
    bounciness: float
    drag: float
    friction: float
    stiffness: float

    def shown_by(self, phenomenon: str) -> dict[str, float]:
        """The constants that `phenomenon` shows, by name."""
        return {constant: getattr(self, constant) for constant in PHENOMENA[phenomenon]}


@dataclass(frozen=True)
class Splits:
    """Disjoint sets: unnamed worlds for the backbone, named to train the memory, unseen for the bank only."""

    backbone: tuple[World, ...]
    train: tuple[World, ...]
    unseen: tuple[World, ...]


_FIRST = (
    "zor mel tav quin bor sil nar pyx dra fen gal hux jor kel lum myr "
    "nol orb pel ryn sar tul ulm vor wex xan yll zem brix cal dov eth"
)
_LAST = (
    "vex dara mir thos gan lux bel neth rio sha dun zar phi kor wen tash "
    "yol rax pim luth gor vane ska duun fyr mos jax hal tev nook bri zu"
)


def planet_names(seed: int) -> list[str]:
    """All 1,024 planet names in an order drawn from `seed`."""
    names = [first + last for first in _FIRST.split() for last in _LAST.split()]
    return [names[i] for i in np.random.default_rng([seed, 99]).permutation(len(names))]


def sample_world(rng: np.random.Generator, name: str | None = None) -> World:
    """A world with constants drawn independently over their ranges."""
    return World(name, **{constant: span.at(rng.random()) for constant, span in RANGES.items()})


def splits(seed: int, *, backbone: int = 512, train: int = 128, unseen: int = 32) -> Splits:
    """The worlds of a seed. A larger count keeps the worlds of a smaller one and adds to them."""
    names = planet_names(seed)
    pools = {"train": names[::2], "unseen": names[1::2]}
    for split, wanted in (("train", train), ("unseen", unseen)):
        if wanted > len(pools[split]):
            raise UserError(
                f"too many {split} worlds",
                expected=f"at most {len(pools[split])}",
                found=wanted,
                fix="ask for fewer worlds",
            )

    def draw(stream: int, names: list[str] | list[None]) -> tuple[World, ...]:
        rng = np.random.default_rng([seed, stream])
        return tuple(sample_world(rng, name) for name in names)

    return Splits(
        draw(0, [None] * backbone), draw(1, pools["train"][:train]), draw(2, pools["unseen"][:unseen])
    )
