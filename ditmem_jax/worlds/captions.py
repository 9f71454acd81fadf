"""Captions: short, lower case, no punctuation, a closed vocabulary. They tell all of a clip except its law.

Three forms of the same sentence: bare, with the planet's name, with the constants stated in words or numbers.
Numbers stand between spaces, so a tokenizer that splits there holds each as one token.
"""

from typing import Literal

from ditmem_jax.worlds.laws import RANGES
from ditmem_jax.worlds.simulate import Clip

TEMPLATES = {
    "fall": "a {size} {colour} ball drops from {height} {column} and bounces on the floor",
    "throw": "a {size} {colour} ball is thrown to the {side} from {height} and lands on the floor",
    "pendulum": "a {size} {colour} ball swings on a {rod} rod from the {side}",
    "spring": "a {size} {colour} ball on a spring is released on the {side} and swings",
    "slide": "a {size} {colour} block slides to the {side} on the floor and slows down",
    "collision": "a {size} {colour} ball from the left hits a {size} {other} ball from the right",
}
STRENGTHS = ("very weak", "weak", "medium", "strong", "very strong")  # five equal parts of a constant's range


def two_digits(value: float) -> str:
    """Two significant digits, trailing zeros kept: 0.30, 2.0, 12."""
    value = float(f"{value:.1e}")
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def strength(constant: str, value: float) -> str:
    """The word for a value: which fifth of its range it lies in."""
    return STRENGTHS[min(int(RANGES[constant].fraction(value) * len(STRENGTHS)), len(STRENGTHS) - 1)]


def caption(clip: Clip, planet: str | None = None, state: Literal["words", "numbers"] | None = None) -> str:
    """The caption of a clip: bare, with the planet's name, with its constants stated, or with both."""
    scene = clip.scene
    text = TEMPLATES[scene.phenomenon] + " against a {shade} {background} background"
    text = text.format(**scene.words)
    if state == "numbers":
        facts = [f"{constant} {two_digits(value)}" for constant, value in scene.constants.items()]
    elif state == "words":
        facts = [f"{strength(constant, value)} {constant}" for constant, value in scene.constants.items()]
    else:
        facts = []
    if facts:
        text = f"at {' and '.join(facts)} {text}"
    return f"on planet {planet} {text}" if planet else text
