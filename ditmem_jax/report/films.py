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
    return _SIGNATURE + _header(pixels) + _chunk(b"IDAT", _deflated(pixels)) + _chunk(b"IEND", b"")


def animation(clips: Sequence[UInt8[np.ndarray, "T H W 3"]], fps: int | float, width: int = 256) -> bytes:
    """Clips of one size side by side as an animated PNG, a picture that plays in notebooks and on any page.

    Args:
        width: [px] pixels in a clip's width beyond which every second pixel is left out, or every third and so on.
    """
    step = -(-clips[0].shape[2] // width)
    height = clips[0][:, ::step].shape[1]
    gap = np.full((len(clips[0]), height, 2, 3), 255, np.uint8)
    parts = [part for clip in clips for part in (gap, clip[:, ::step, ::step])]
    frames = np.concatenate(parts[1:], axis=2)
    control = struct.pack(">II", len(frames), 0)  # 0: again and again
    chunks = [_SIGNATURE, _header(frames[0]), _chunk(b"acTL", control)]
    for number, frame in enumerate(frames):
        order = max(0, 2 * number - 1)  # frame 0 takes one number, the others two
        rows, columns = frame.shape[:2]
        timing = struct.pack(">IIIIIHHBB", order, columns, rows, 0, 0, 100, round(100 * fps), 0, 0)
        data = _deflated(frame)
        data = _chunk(b"fdAT", struct.pack(">I", order + 1) + data) if number else _chunk(b"IDAT", data)
        chunks += [_chunk(b"fcTL", timing), data]
    return b"".join([*chunks, _chunk(b"IEND", b"")])


_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _header(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    height, width, _ = pixels.shape
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def _deflated(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    rows = np.diff(pixels, axis=0, prepend=np.zeros_like(pixels[:1])).reshape(len(pixels), -1)  # modulo 256
    up = np.full((len(pixels), 1), 2, np.uint8)
    return zlib.compress(np.concatenate([up, rows], axis=1).tobytes(), 9)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
