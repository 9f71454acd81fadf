"""The parts of the page as markup: whatever comes from a bank is escaped here."""

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from ditmem_jax.bank.table import FIXED
from ditmem_jax.gallery.clips import Clips
from ditmem_jax.gallery.gallery import About, Found, Map, Version
from ditmem_jax.gallery.map import SCALE
from ditmem_jax.report.html import Html, tag

SHORT = 160  # letters of a caption that are shown at once
WIDTH, HEIGHT, MARGIN = 640, 380, 16
_FOLDERS = re.compile(r"""(?<![\w/])(\w+:)?/+([^/\s'"][^/\n'"]*/)*(?=[^\s/])""")  # before a name


def without_folders(text: str) -> str:
    """Text with the last names of its absolute paths and addresses: visitors need not know the machine's folders."""
    return _FOLDERS.sub("", text)


def heading(about: About, newest: int, old: bool) -> Html:
    """The name of the bank, its version, and the way back from an old one."""
    facts = [
        tag("span", tag("b", f"{about.rows:,}"), " video" + "s" * (about.rows != 1)),
        tag("span", "version ", tag("b", about.version)),
        tag("span", "embedder ", tag("b", about.embedder)),
    ]
    name = about.uri.rstrip("/").rpartition("/")[2]
    parts = [
        tag("p", "memory bank", class_="kicker"),
        tag("h1", name),
        tag("p", *facts, class_="facts"),
    ]
    if old:
        back = tag("button", "Back to the newest", type="button", data_action="open", data_key="")
        told = tag("span", f"You look at version {about.version}, read-only. The newest is {newest}.")
        parts.append(tag("div", told, back, class_="notice old", role="status"))
    return tag("header", *parts, class_="bank-heading")


def notice(text: object, kind: str = "note") -> Html:
    """A sentence to the user; further lines, as errors have, follow small."""
    first, *rest = without_folders(str(text)).split("\n")
    first = first[:1].upper() + first[1:]
    lines = [tag("p", tag("b", first))] + [tag("p", line.strip()) for line in rest]
    return tag("div", *lines, class_=f"notice {kind}", role="alert" if kind == "error" else "status")


def cards(found: Found, clips: Clips, *, editable: bool) -> Html:
    """The clips of a search, best first."""
    parts = [
        card(row, score, found.version, clips, editable=editable)
        for row, score in zip(found.rows, found.scores, strict=True)
    ]
    return tag("div", *parts, class_="cards")


def card(row: dict[str, Any], score: float | None, version: int, clips: Clips, *, editable: bool) -> Html:
    """One clip with what the bank knows of it."""
    parts = [_player(row, version, clips)]
    if score is not None:
        parts.append(
            tag(
                "p",
                tag("b", f"{score:.3f}"),
                tag("span", style=f"--score:{max(score, 0):.3f}", class_="bar"),
                class_="score",
                title="cosine of the prompt and the caption",
            )
        )
    parts += [_caption(row["caption"]), tag("p", row["id"], class_="id", dir="auto"), _values(row)]
    if editable:
        parts.append(_remove(row["id"]))
    return tag("article", *parts, class_="clip", data_id=row["id"])


def _player(row: dict[str, Any], version: int, clips: Clips) -> Html:
    if reason := clips.missing(row):
        return tag("div", tag("p", without_folders(reason).split("\n")[0]), class_="placeholder")
    source = f"./clip?{urlencode({'version': version, 'id': row['id']})}"
    return tag(
        "video", src=source, controls=True, muted=True, loop=True, autoplay=True, playsinline=True, preload="metadata",
        aria_label=row["caption"][:SHORT],
    )  # fmt: skip


def _caption(caption: str) -> Html:
    if len(caption) <= SHORT:
        return tag("p", caption, class_="caption", dir="auto")
    short = tag("summary", f"{caption[:SHORT].rstrip()} …", dir="auto")
    return tag("details", short, tag("p", caption[SHORT:], dir="auto"), class_="caption")


def _values(row: dict[str, Any]) -> Html:
    """The score columns and what is known of the original, in two columns."""
    hidden = {field.name for field in FIXED} - {"duration", "frames", "fps"}
    units = {"duration": " s", "fps": " /s"}
    pairs = [(name, value) for name, value in row.items() if name not in hidden and value not in (None, "")]
    items = [
        tag("div", tag("dt", name), tag("dd", f"{_written(value)}{units.get(name, '')}", dir="auto"))
        for name, value in pairs
    ]
    return tag("dl", *items) if items else Html("")


def _written(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _remove(name: str) -> Html:
    question = tag("p", "Take it out of the bank? Older versions keep it, and no file is deleted.")
    yes = tag("button", "Remove", type="button", data_action="remove", data_key=name, class_="danger")
    return tag("details", tag("summary", "Remove …"), question, yes, class_="remove")


def versions(listed: Sequence[Version], shown: int) -> Html:
    """Every version with a button that opens it; the shown one is marked."""
    rows = []
    for place, one in enumerate(listed):
        newest = place == 0
        if one.number == shown:
            action = tag("span", "shown", class_="here")
        else:
            key = "" if newest else one.number
            action = tag("button", "Open", type="button", data_action="open", data_key=key)
        time = tag("time", *(tag("span", f"{one.time:{form}} ") for form in ("%Y-%m-%d", "%H:%M:%S")))
        cells = [f"{one.number}{' (newest)' * newest}", time, one.change, f"{one.rows:,}", action]
        rows.append(
            tag("tr", *(tag("td", cell) for cell in cells), class_="shown" if one.number == shown else None)
        )
    names = ("version", "time", "what changed", "videos", "")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    return tag("div", tag("table", head, tag("tbody", *rows), class_="versions"), class_="wide")


def chart(found: Map, column: str | None) -> Html:
    """The map as a drawing whose points can be clicked."""

    def place(value: float, size: int) -> str:
        return f"{MARGIN + (size - 2 * MARGIN) * (value + 1) / 2:.1f}"

    marks = [
        tag(
            "circle", tag("title", f"{name}\n{caption[:SHORT]}"), cx=place(x, WIDTH), cy=place(-y, HEIGHT), r=5,
            fill=tone, data_action="show", data_key=name,
        )
        for (x, y), name, caption, tone in zip(found.points, found.ids, found.captions, found.colours.of, strict=True)
    ]  # fmt: skip
    label = f"{len(found.ids)} videos by their captions' embeddings" + (
        f", coloured by {column}" if column else ""
    )
    drawing = tag("svg", *marks, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="map")
    sample = (
        f"A sample of {len(found.ids):,} of {found.total:,} videos. " if found.total > len(found.ids) else ""
    )
    note = f"{sample}Near points have captions alike: the first two principal components of the embeddings."
    return tag("figure", _legend(found, column), drawing, tag("figcaption", note), class_="map-figure")


def _legend(found: Map, column: str | None) -> Html:
    if column is None or not found.ids:
        return Html("")
    if found.colours.ends is not None:
        low, high = found.colours.ends
        stops = ", ".join("rgb({} {} {})".format(*tone) for tone in SCALE)
        ramp = tag("i", class_="ramp", style=f"background:linear-gradient(90deg, {stops})")
        return tag("div", tag("b", column), _written(low), ramp, _written(high), class_="legend")
    keys = [
        tag("span", tag("i", class_="key", style=f"background:{tone}"), name)
        for tone, name in found.colours.names
    ]
    return tag("div", tag("b", column), *keys, class_="legend")


def told(found: Found, prompt: str, where: str) -> Html:
    """How many were found, in words."""
    shown, left = len(found.rows), found.left
    if not left:
        return notice("No video passes this filter." if where.strip() else "The bank is empty.")
    asked = "nearest to the prompt" if prompt.strip() else "first in the bank"
    those = " that pass the filter" if where.strip() else ""
    return tag(
        "p", f"{shown} of {left:,} video{'s' * (left != 1)}{those}, {asked}", class_="told", role="status"
    )


def one(part: Html) -> Html:
    """A card on its own."""
    return tag("div", part, class_="cards alone")
