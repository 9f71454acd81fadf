"""Video files in memory: whether they are whole, and their frames as tensorflow-io's FFmpeg operations give them.

Those operations give exactly PyAV's frames for what `CODECS` and `FORMATS` name. For anything else they give other
colours, write beyond their memory or end the process, so that it is refused before they see it.
"""

import dataclasses
import io

import av
import cv2  # noqa: F401  its FFmpeg has to be in memory when tensorflow-io looks for one
import numpy as np
import tensorflow as tf
import tensorflow_io as tfio

from ditmem_jax.errors import UserError

from .sources import reason

CODECS = ("h264", "hevc", "vp9")
FORMATS = ("yuv420p", "yuv444p")
BT601 = (2, 5, 6)  # the colour matrix: not marked (taken for BT.601), BT.470 BG and SMPTE 170M
FULL_RANGE = 2
WIDTHS = 16  # rows of other widths are converted in whole vectors of 16 pixels, beyond their end
LARGEST = 2**31  # bytes of the frames of one video
PASS = "MODE=pass leaves the decoding to PyAV"


@dataclasses.dataclass(frozen=True)
class Facts:
    """PyAV's account of a video: why tensorflow-io cannot decode it (None: it can), length, speed, turns."""

    obstacle: str | None
    frames: int
    fps: float
    quarter_turns: int


def examine(data: bytes) -> Facts:
    """The facts of a video file.

    Raises:
        UserError: if it is no video, or cut off.
    """
    try:
        with av.open(io.BytesIO(data), "r", metadata_errors="replace") as container:
            if not container.streams.video:
                raise UserError("it holds no video", found="only sound or other streams")
            stream = container.streams.video[0]
            index = stream.index_entries
            end = index[-1].pos + index[-1].size if len(index) else 0
            if end > len(data):
                raise UserError("it is cut off", expected=f"at least {end} bytes", found=len(data))
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            first = next(container.decode(stream), None)
            if first is None or not fps:
                raise UserError("it holds no frames")
            return Facts(_obstacle(stream), stream.frames, fps, round(first.rotation / 90))
    except (av.FFmpegError, OSError) as error:
        raise UserError("it is no video file", found=error.strerror) from error


def decode(data: bytes) -> tuple[np.ndarray, float]:
    """Every frame [T, H, W, 3] of a video file in RGB, uint8, upright, and the frames per second.

    Raises:
        UserError: if it is damaged, or nothing that tensorflow-io decodes as PyAV does.
    """
    facts = examine(data)
    if facts.obstacle:
        raise UserError("tensorflow-io cannot decode it", found=facts.obstacle, fix=PASS)
    try:
        frames = tfio.experimental.ffmpeg.decode_video(data).numpy()
    except tf.errors.OpError as error:
        raise UserError("tensorflow-io cannot decode it", found=reason(error), fix=PASS) from error
    if len(frames) != facts.frames:
        raise UserError("it is damaged", expected=f"{facts.frames} frames", found=len(frames), fix=PASS)
    return np.rot90(frames, facts.quarter_turns, axes=(1, 2)), facts.fps


def _obstacle(stream: av.VideoStream) -> str | None:
    codec = stream.codec_context
    size = stream.frames * codec.height * codec.width * 3
    for holds, found in (
        (codec.name not in CODECS, f"codec {codec.name}, not {', '.join(CODECS)}"),
        (codec.pix_fmt not in FORMATS, f"pixels {codec.pix_fmt}, not {', '.join(FORMATS)}"),
        (codec.colorspace not in BT601, "colours marked as other than BT.601"),
        (codec.color_range == FULL_RANGE, "colours of full range"),
        (codec.width % WIDTHS, f"a width of {codec.width}, no multiple of {WIDTHS}"),
        (not stream.frames, "a container that does not tell the number of frames"),
        (size > LARGEST, f"{size / 1e9:.1f} GB of frames"),
    ):
        if holds:
            return found
    return None
