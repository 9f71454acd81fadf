"""Video files to arrays and back, with PyAV.

Frames are picked and resized as the released DiT-Mem encodes its videos: evenly from the first to the last,
the last one repeated when a video is short, stretched to the target size by two-tap bilinear interpolation.
"""

import dataclasses
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange
from jaxtyping import Float32, Int, UInt8

from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import replacing

Frames = UInt8[np.ndarray, "T H W 3"]


class VideoStream(io.RawIOBase):
    """A video in an archive, of which no more is read than is asked for.

    Args:
        file: where its bytes are; places are sought there only when something is read, since that may be slow.
        size: in bytes.
        name: what errors call it by.
    Raises:
        UserError: from reading, if the archive is damaged.
    """

    def __init__(self, file: io.BufferedIOBase | io.RawIOBase, size: int, name: str):
        self._file, self._place, self.size, self.name = file, 0, size, name

    def __str__(self) -> str:
        return self.name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        try:
            if self._file.tell() != self._place:
                self._file.seek(self._place)
            data = self._file.read(min(len(buffer), max(0, self.size - self._place))) or b""
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"cannot read {self}", found=error) from error
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


class VideoBytes(VideoStream):
    """A video file in memory, with the name that errors call it by."""

    def __init__(self, data: bytes, name: str):
        super().__init__(io.BytesIO(data), len(data), name)


VideoFile = str | Path | VideoStream


@dataclasses.dataclass(frozen=True)
class Video:
    """A decoded video: RGB `frames` [T, H, W, 3] and its frames per second."""

    frames: Frames
    fps: float


@dataclasses.dataclass(frozen=True)
class Facts:
    """Counts from decoding a whole video: its number of frames, and their mean rate if they have times."""

    frames: int
    fps: float | None

    @property
    def duration(self) -> float | None:
        """In seconds; the last frame counts as long as a mean one."""
        return self.frames / self.fps if self.fps else None


@dataclasses.dataclass(frozen=True)
class Clip:
    """Some `frames` [T, H, W, 3] of a video, and the facts of all of it."""

    frames: Frames
    facts: Facts


def read_video(path: VideoFile, minimum: int = 2) -> Video:
    """Every frame of a video file.

    Raises:
        UserError: if the file cannot be read, or has fewer than `minimum` frames.
    """
    frames = [_upright(frame) for frame in _decode(path)]
    _require_length(path, len(frames), minimum)
    with _open(path) as container:
        stream = container.streams.video[0]
        return Video(np.stack(frames), float(stream.average_rate or stream.guessed_rate))


def read_clip(
    path: VideoFile | Video,
    frames: int,
    height: int,
    width: int,
    mode: Literal["stretch", "crop"] = "stretch",
    minimum: int = 2,
) -> Clip:
    """`frames` frames of a video, in a file or decoded, evenly from first to last, resized with `fit`.

    Holds only the resized frames, so that long videos of large frames fit in memory.

    Raises:
        UserError: if the file cannot be read, or has fewer than `minimum` frames.
    """
    if isinstance(path, Video):
        _require_length("the decoded video", len(path.frames), minimum)
        picked = fit(path.frames[sample_frames(len(path.frames), frames)], height, width, mode)
        return Clip(picked, Facts(len(path.frames), path.fps))
    expected, rate = _declared(path)
    while True:
        wanted = sample_frames(expected, frames).tolist() if expected else []
        kept, length, span = _decode_some(
            path, set(wanted), lambda frame: fit(frame[None], height, width, mode)[0]
        )
        if length == expected:
            break
        expected = length  # the container was wrong about its length, the decoder is right
    _require_length(path, length, minimum)
    picked = np.stack([kept[index] for index in wanted])
    return Clip(picked, Facts(length, _mean_rate(length, span, rate)))


def read_start(path: VideoFile, count: int, fps: int | float) -> Frames:
    """The first `count` frames of a video file as it looks at `fps` frames per second, whatever its own rate.

    Raises:
        UserError: if the file cannot be read, or is too short for them.
    """
    _, rate = _declared(path)
    wanted = np.rint(np.arange(count) * (rate / fps if rate else 1)).astype(int).tolist()
    frames = [_upright(frame) for _, frame in zip(range(wanted[-1] + 1), _decode(path), strict=False)]
    if len(frames) <= wanted[-1]:
        raise UserError(
            f"{path} is too short",
            expected=f"{wanted[-1] + 1} frames, which are {count} at {fps:g} per second",
            found=f"{len(frames)} frames",
            fix="fewer frames, or a longer video",
        )
    return np.stack([frames[index] for index in wanted])


def sample_frames(total: int, count: int) -> Int[np.ndarray, " count"]:
    """`count` indices into `total` frames, first to last evenly; the last repeated if there are fewer."""
    if total >= count:
        return np.linspace(0, total - 1, count, dtype=int)
    return np.minimum(np.arange(count), total - 1)


def fit(
    frames: Frames, height: int, width: int, mode: Literal["stretch", "crop"] = "stretch"
) -> UInt8[np.ndarray, "T {height} {width} 3"]:
    """Frames resized to `height` x `width` pixels.

    "stretch" gives up the aspect ratio and takes two taps per axis at any scale, as the released code does.
    "crop" keeps the aspect ratio, cuts what stands over on both sides alike, and averages when it shrinks.
    """
    if mode == "crop":
        rows, columns = frames.shape[1:3]
        scale = max(height / rows, width / columns)
        centre_rows, centre_columns = height / scale, width / scale
        frames = _resize(frames, 1, height, (rows - centre_rows) / 2, centre_rows, smooth=True)
        frames = _resize(frames, 2, width, (columns - centre_columns) / 2, centre_columns, smooth=True)
    else:
        frames = _resize(frames, 1, height, 0, frames.shape[1], smooth=False)
        frames = _resize(frames, 2, width, 0, frames.shape[2], smooth=False)
    return np.rint(frames).astype(np.uint8)


def to_unit(frames: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Pixels as the VAE takes them: 0 to 255 becomes -1 to 1."""
    return frames.astype(np.float32) / 127.5 - 1


def from_unit(pixels: Float32[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """The inverse of `to_unit`; what the VAE makes beyond -1 or 1 is cut."""
    return np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)


def write_video(path: str | Path, frames: Frames, fps: int | float, crf: int = 10) -> None:
    """Writes an H.264 mp4 that browsers play. `crf` is x264's quality: 0 is lossless, 23 its default.

    The same frames give the same bytes on any number of cores.

    Raises:
        UserError: for odd or empty sizes, which 4:2:0 video does not have, for a rate that is none, or if the file cannot be written.
    """
    count, height, width, _ = frames.shape
    if not fps > 0:
        raise UserError(f"cannot write {path}", expected="frames per second above 0", found=fps)
    if not count or not height or not width or height % 2 or width % 2:
        raise UserError(
            f"cannot write {path}",
            expected="at least one frame of even height and width",
            found=f"{count} frames of {height} x {width}",
        )
    with (
        replacing(Path(path), av.FFmpegError) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        rate = Fraction(fps).limit_denominator(100_000)
        # Without macroblock trees: on some machines they make other bytes of small clips from time to time.
        options = {"crf": str(crf), "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1
        # BT.601, which readers that ignore the mark assume, and marked for those that heed it.
        stream.codec_context.colorspace, stream.codec_context.color_range = _BT601, ColorRange.MPEG
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            image = image.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


_BT601 = 6  # SMPTE 170M in H.264's table of colour matrices


def _open(path: VideoFile) -> InputContainer:
    if isinstance(path, VideoStream):
        path.seek(0)
    try:
        source = path if isinstance(path, VideoStream) else str(path)
        container = av.open(source, "r", metadata_errors="replace")  # titles in old encodings
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"cannot read {path}", expected="a video file", found=error.strerror) from error
    if not container.streams.video:
        container.close()
        raise UserError(f"{path} holds no video", found="only sound or other streams")
    index = container.streams.video[0].index_entries
    end, size = (index[-1].pos + index[-1].size if len(index) else 0), container.size
    if end > size:
        container.close()
        raise UserError(f"{path} is cut off", expected=f"at least {end} bytes", found=size)
    return container


def _decode(path: VideoFile) -> Iterator[av.VideoFrame]:
    with _open(path) as container:
        count = 0
        try:
            for frame in container.decode(video=0):
                yield frame
                count += 1
        except av.FFmpegError as error:
            raise UserError(f"{path} is damaged", found=f"{error.strerror} after {count} frames") from error


def _decode_some(
    path: VideoFile, wanted: set[int], use: Callable
) -> tuple[dict[int, np.ndarray], int, float | None]:
    """`use(frame)` of the wanted frames by index, the number of all frames, and the seconds from first to last."""
    kept, length, first, last = {}, 0, None, None
    for index, frame in enumerate(_decode(path)):
        length, last = index + 1, frame.time
        first = last if index == 0 else first
        if index in wanted:
            kept[index] = use(_upright(frame))
    return kept, length, None if first is None or last is None else last - first


def _mean_rate(length: int, span: float | None, declared: float | None) -> float | None:
    """Frames per second: as the container declares it, unless the times of the frames tell otherwise.

    Containers declare it exactly where it is constant, and anything where it is not; times may be rounded.
    """
    if not span or span < 0:
        return declared
    measured = (length - 1) / span
    agree = declared and abs(declared / measured - 1) * length < 0.5  # half a frame over the whole video
    return declared if agree else measured


def _upright(frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels, turned as a phone's rotation mark asks for."""
    try:
        pixels = frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise UserError(f"no way to convert {frame.format.name} to RGB", found=error.strerror) from error
    return np.rot90(pixels, round(frame.rotation / 90))


def _declared(path: VideoFile) -> tuple[int, float | None]:
    """Frames and frames per second as the container tells them; its number of packets where it tells no frames."""
    with _open(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        length = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        return length, float(rate) if rate else None


def _require_length(path: VideoFile | str, length: int, minimum: int) -> None:
    if length < minimum:
        raise UserError(f"{path} is too short", expected=f"at least {minimum} frames", found=length)


def _resize(
    pixels: np.ndarray, axis: int, size: int, start: int | float, extent: int | float, *, smooth: bool
) -> np.ndarray:
    """Resamples `extent` pixels from `start` on along `axis` to `size`, linearly between pixel centres.

    `smooth` widens the interpolating triangle when shrinking, so that no pixel is left out.
    """
    step = extent / size
    if step == 1 and start == 0:
        return pixels
    radius = max(step, 1.0) if smooth else 1.0
    centres = start + (np.arange(size) + 0.5) * step - 0.5
    first = np.floor(centres - radius).astype(int) + 1
    other_axes = tuple(i for i in range(pixels.ndim) if i != axis)
    total, norm = 0.0, 0.0
    for tap in range(int(np.ceil(2 * radius))):
        weight = np.maximum(1 - np.abs(first + tap - centres) / radius, 0).astype(np.float32)
        source = np.clip(first + tap, 0, pixels.shape[axis] - 1)
        weight *= source == first + tap  # nothing lies beyond the edge
        total = total + np.take(pixels, source, axis) * np.expand_dims(weight, other_axes)
        norm = norm + weight
    return total / np.expand_dims(norm, other_axes)
