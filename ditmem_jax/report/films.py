"""Clips side by side that play in step, on any browser: each clip is a strip of its frames in one PNG.

Video elements would drift apart, could not be stepped through together, and many decoders refuse clips of a few
dozen pixels. Strips are lossless, and one clock draws the same frame of each.
"""

import base64
import dataclasses
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from ditmem_jax.report.html import Html, tag
from ditmem_jax.report.svg import Tone


@dataclasses.dataclass(frozen=True)
class Film:
    """A clip, what stands below it, and what is read out in place of it."""

    frames: UInt8[np.ndarray, "T H W 3"]
    note: object = ""
    label: str = ""


@dataclasses.dataclass(frozen=True)
class FilmRow:
    """Clips to compare. `label` stands before them, `aside` (for instance a chart) after them."""

    label: object
    films: Sequence[Film]
    aside: object = ""


def film_grid(
    columns: Sequence[tuple[str, Tone]], rows: Sequence[FilmRow], fps: int | float, aside: object = ""
) -> Html:
    """Rows of clips under headings, with buttons to stop, step and slow them all.

    Args:
        columns: headings with the colour that each column has in charts.
        fps: frames per second at normal speed.
        aside: heading of the rows' last column.
    """
    frames = max(len(film.frames) for row in rows for film in row.films)
    controls = tag(
        "div",
        tag("button", "Pause", type="button", class_="play"),
        tag("input", type="range", min=0, max=frames - 1, value=0, aria_label="frame"),
        tag("button", "½ speed", type="button", class_="speed", title="1, ½ or ¼ of the true speed"),
        class_="controls",
    )
    headings = [tag("div", name, class_=f"heading tone-{tone}") for name, tone in columns]
    lines = [
        tag(
            "div",
            tag("div", class_="label"),
            *headings,
            tag("div", aside, class_="aside heading"),
            class_="row head",
        )
    ]
    for row in rows:
        cells = [_film(film) for film in row.films]
        lines.append(
            tag(
                "div",
                tag("div", row.label, class_="label"),
                *cells,
                tag("div", row.aside, class_="aside"),
                class_="row",
            )
        )
    missing = tag("noscript", tag("p", "The clips play with JavaScript; it is part of this file."))
    return tag(
        "div",
        controls,
        missing,
        *lines,
        class_="films",
        style=f"--columns:{len(columns)}",
        data_fps=fps,
        data_frames=frames,
    )


def _film(film: Film) -> Html:
    count, height, width, _ = film.frames.shape
    canvas = tag(
        "canvas", width=4 * width, height=4 * height, role="img", aria_label=film.label or None,
        data_strip=data_uri(png(film.frames.reshape(count * height, width, 3)), "image/png"), data_count=count,
    )  # fmt: skip
    return tag("div", canvas, tag("div", film.note, class_="note"), class_="film")


def data_uri(data: bytes, kind: str) -> str:
    """The bytes as an address of their own."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """A PNG file. Each row is stored as its difference to the one above, which soft images compress well by."""
    height, width, _ = pixels.shape
    rows = np.diff(pixels, axis=0, prepend=np.zeros_like(pixels[:1])).reshape(height, -1)  # modulo 256
    up = np.full((height, 1), 2, np.uint8)
    data = zlib.compress(np.concatenate([up, rows], axis=1).tobytes(), 9)

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
