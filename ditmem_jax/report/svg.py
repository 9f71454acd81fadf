"""Charts as inline SVG. Colours are classes, so that a page's light and dark dress fit them."""

# Both ends of an axis that was fitted are numbers.
# pyright: reportOperatorIssue=false

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from ditmem_jax.report.html import Html, tag

Number = int | float
Tone = Literal["grey", "blue", "orange", "pink", "green"]


@dataclasses.dataclass(frozen=True)
class Series:
    """Numbers to draw; pairs that are not finite or beyond the axes are left out.

    Attributes:
        mark: "line", "dashed" or "dots".
        notes: for each pair a text that shows while the pointer rests on its dot.
    """

    x: Sequence[Number]
    y: Sequence[Number]
    tone: Tone = "blue"
    mark: Literal["line", "dashed", "dots"] = "line"
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Axis:
    """The label and the range of an axis; `low` and `high` come from the numbers where they are None."""

    label: str = ""
    low: Number | None = None
    high: Number | None = None
    log: bool = False
    percent: bool = False

    def fitted(self, values: Sequence[Number]) -> "Axis":
        """The axis with both ends known, a little wider than `values` where they decide."""
        values = [value for value in values if math.isfinite(value) and (value > 0 or not self.log)]
        scaled = [math.log(value) if self.log else value for value in values] or [0.0, 1.0]
        room = 0.05 * (max(scaled) - min(scaled)) or 0.5
        back = math.exp if self.log else float
        low = back(min(scaled) - room) if self.low is None else self.low
        high = back(max(scaled) + room) if self.high is None else self.high
        return dataclasses.replace(self, low=low, high=high)

    def place(self, value: Number) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers from end to end: about five, or 1, 2 and 5 times powers of ten."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            found = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
            found.append(10.0 ** math.ceil(math.log10(self.high)))
            return [tick for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-6), math.floor(self.high / step + 1e-6)
        return [number * step for number in range(first, last + 1)]

    def write(self, value: Number) -> str:
        if self.percent:
            return f"{round(100 * value, 6):g} %"
        return f"{value:g}" if abs(value) > 1e-9 else "0"


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The plotting area within a chart of `width` x `height`; axes that say something get wider margins."""

    x: Axis
    y: Axis
    width: int
    height: int
    top: int = 10
    margin: int = 12

    @property
    def left(self) -> int:
        return 46 if self.y.label else 30

    @property
    def right(self) -> int:
        return self.width - self.margin

    @property
    def bottom(self) -> int:
        return self.height - (38 if self.x.label else 24)

    def at(self, x: Number, y: Number) -> tuple[str, str]:
        across, up = self.right - self.left, self.bottom - self.top
        return f"{self.left + across * self.x.place(x):.1f}", f"{self.bottom - up * self.y.place(y):.1f}"

    def shows(self, x: Number, y: Number) -> bool:
        pairs = (x, self.x), (y, self.y)
        return all(math.isfinite(value) and axis.low <= value <= axis.high for value, axis in pairs)


def plot(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    title: str = "",
    size: tuple[int, int] = (320, 260),
    diagonal: bool = False,
    cursor: bool = False,
) -> Html:
    """A chart of lines and dots.

    Args:
        title: stands above the chart, and is read out in place of it.
        size: width and height in units of which 11 make a letter.
        diagonal: draw the line where y equals x.
        cursor: draw an upright line that runs along while the films beside it play.
    """
    x = x.fitted([value for one in series for value in one.x])
    y = y.fitted([value for one in series for value in one.y])
    frame = _Frame(x, y, *size)
    parts = _grid(frame)
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        parts.append(_line("diagonal", frame.at(low, low), frame.at(high, high)))
    for one in series:
        parts += _draw(one, frame)
    if cursor:
        ends = frame.at(x.low, y.low), frame.at(x.low, y.high)
        parts.append(_line("now", *ends, data_span=frame.right - frame.left))
    return _chart(title, y.label, parts, size)


def _chart(title: str, label: str, parts: Sequence[Html], size: tuple[int, int]) -> Html:
    """The drawing under its title, at most a fifth larger than it was laid out."""
    heading = tag("h4", title) if title else ""
    box = f"0 0 {size[0]} {size[1]}"
    drawing = tag("svg", *parts, viewBox=box, role="img", aria_label=title or label)
    return tag("div", heading, drawing, class_="chart", style=f"max-width:{1.2 * size[0]:.0f}px")


def _grid(frame: _Frame) -> list[Html]:
    """Lines and numbers at the ticks, and what the axes say."""
    x, y, parts = frame.x, frame.y, []
    for tick in y.ticks():
        left, right = frame.at(x.low, tick), frame.at(x.high, tick)
        parts.append(_line("grid", left, right))
        parts.append(tag("text", y.write(tick), x=frame.left - 6, y=left[1], class_="tick end"))
    for tick in x.ticks():
        low, high = frame.at(tick, y.low), frame.at(tick, y.high)
        parts.append(_line("grid", low, high))
        parts.append(tag("text", x.write(tick), x=low[0], y=frame.bottom + 15, class_="tick middle"))
    centre, middle = (frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2
    turned = f"translate(11 {middle}) rotate(-90)"
    parts.append(tag("text", x.label, x=centre, y=frame.height - 6, class_="axis middle"))
    parts.append(tag("text", y.label, transform=turned, class_="axis middle"))
    return parts


def _line(class_: str, start: tuple[str, str], end: tuple[str, str], **attributes: object) -> Html:
    return tag("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_=class_, **attributes)


def _draw(one: Series, frame: _Frame) -> list[Html]:
    notes = one.notes or [""] * len(one.x)
    pairs = zip(one.x, one.y, notes, strict=True)
    shown = [(*frame.at(x, y), note) for x, y, note in pairs if frame.shows(x, y)]
    if one.mark == "dots":
        colour = f"dot tone-{one.tone}"
        return [
            tag("circle", tag("title", note) if note else "", cx=cx, cy=cy, r=4, class_=colour)
            for cx, cy, note in shown
        ]
    points = " ".join(f"{cx},{cy}" for cx, cy, _ in shown)
    return [tag("polyline", points=points, class_=f"line tone-{one.tone} {one.mark}")] if shown else []


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value and the interval it may lie in."""

    value: Number
    low: Number
    high: Number
    tone: Tone = "blue"


def intervals(
    rows: Sequence[tuple[str, Sequence[Interval]]],
    axis: Axis,
    *,
    marks: Sequence[Number] = (),
    title: str = "",
) -> Html:
    """Values with their intervals, row under row on one axis; `marks` are upright lines to compare with."""
    rows = [(name, [one for one in row if math.isfinite(one.value)]) for name, row in rows]
    axis = axis.fitted([*marks, *(end for _, row in rows for one in row for end in (one.low, one.high))])
    width, left, right, top, step = 480, 112, 466, 8, 32
    bottom = top + step * len(rows)

    def at(value: Number) -> str:
        return f"{left + (right - left) * axis.place(value):.1f}"

    def upright(class_: str, value: Number) -> Html:
        return _line(class_, (at(value), f"{top}"), (at(value), f"{bottom}"))

    parts = []
    for tick in axis.ticks():
        parts.append(upright("grid", tick))
        parts.append(tag("text", axis.write(tick), x=at(tick), y=bottom + 16, class_="tick middle"))
    parts += [upright("diagonal", mark) for mark in marks]
    for number, (name, row) in enumerate(rows):
        middle = top + step * (number + 0.5)
        parts.append(tag("text", name, x=left - 12, y=middle, class_="axis end"))
        for place, one in enumerate(row):
            y = f"{middle + 10 * (place - (len(row) - 1) / 2):.1f}"
            parts.append(_line(f"line tone-{one.tone}", (at(one.low), y), (at(one.high), y)))
            parts.append(tag("circle", cx=at(one.value), cy=y, r=4.5, class_=f"dot full tone-{one.tone}"))
    parts.append(tag("text", axis.label, x=(left + right) / 2, y=bottom + 34, class_="axis middle"))
    return _chart(title, axis.label, parts, (width, bottom + 40))
