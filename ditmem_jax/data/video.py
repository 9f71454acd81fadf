"""Video files to arrays and back, with PyAV.

Frames are shown as players show them: turned and mirrored, deinterlaced, in pixels of their shape, HDR in the range of
ordinary screens. By default they are picked and resized as the released DiT-Mem encodes its videos: evenly from the
first to the last, the last one repeated when a video is short, stretched to the target size by two-tap bilinear
interpolation. Where the frame rate varies, evenly means in time.
"""

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange
from jaxtyping import Float, Float32, Int, UInt8

from ditmem_jax.data.decode import Timeline, VideoBytes, VideoFile, VideoStream, pick
from ditmem_jax.data.hdr import CURVES, to_sdr
from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import replacing

__all__ = [
    "Clip",
    "Facts",
    "Part",
    "Stamp",
    "Video",
    "VideoBytes",
    "VideoFile",
    "VideoStream",
    "fit",
    "read_clip",
    "read_video",
    "write_video",
]

Frames = UInt8[np.ndarray, "T H W 3"]


@dataclasses.dataclass(frozen=True)
class Video:
    """A decoded video: RGB `frames` [T, H, W, 3] and its frames per second."""

    frames: Frames
    fps: float


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a video that a clip shows.

    Attributes:
        start, end: in seconds from the first frame; None is the end of the video.
        fps: the clip's frames per second, from a window within the part; None spreads its frames over the whole part.
        window: which window. "head", "middle", or (i, n) for the i-th, from 0, of n that do not overlap and are spread
            evenly, fewer where n do not fit.
    """

    start: int | float = 0.0
    end: int | float | None = None
    fps: int | float | None = None
    window: Literal["head", "middle"] | tuple[int, int] = "middle"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What decoding tells of a video, and of the clip that was taken of it.

    Attributes:
        frames: of the video, or of the part of it that was named.
        fps: its mean rate, if its frames have times.
        start: in seconds, the time of the clip's first frame.
        step: seconds that a frame of the clip stands for, in the mean.
        messages: errors that FFmpeg told of while decoding.
    """

    frames: int
    fps: float | None
    start: float | None = None
    step: float | None = None
    messages: int = 0

    @property
    def duration(self) -> float | None:
        """In seconds; the last frame counts as long as a mean one."""
        return self.frames / self.fps if self.fps else None


@dataclasses.dataclass(frozen=True)
class Stamp:
    """What tells whether a video file has changed: its bytes, when it changed (in a zip file its CRC), its digest."""

    size: int
    modified: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Clip:
    """Some `frames` [T, H, W, 3] of a video, the facts of all of it, and the stamp of its file."""

    frames: Frames
    facts: Facts
    stamp: Stamp | None = None


def read_video(path: VideoFile, minimum: int = 2) -> Video:
    """Every frame of a video file, as it is shown but in the pixels that it has.

    Raises:
        UserError: if the file cannot be read, is damaged, or has fewer than `minimum` frames.
    """

    def every(line: Timeline) -> Int[np.ndarray, " N"]:
        _require_length(path, len(line.pts), minimum)
        return np.arange(len(line.pts))

    picked = pick(path, every, lambda frame, line: _shown(frame)[0])
    frames = [picked.frames[place] for place in range(len(picked.frames))]
    return Video(np.stack(frames), picked.timeline.mean_rate or 1.0)


def read_clip(
    path: VideoFile | Video,
    frames: int,
    height: int,
    width: int,
    mode: Literal["stretch", "crop"] = "stretch",
    minimum: int = 2,
    *,
    part: Part = Part(),
    hdr: Literal["map", "skip"] = "map",
    strict: bool = False,
) -> Clip:
    """`frames` frames of a part of a video, in a file or decoded, resized with `fit`.

    Holds only the resized frames, so that long videos of large frames fit in memory.

    Args:
        hdr: maps videos of high dynamic range to what ordinary screens show, or refuses them.
        strict: refuses videos of which FFmpeg tells any error.
    Raises:
        UserError: if the file cannot be read, is cut off or damaged, or the part has fewer than `minimum` frames or is
            not there.
    """
    if isinstance(path, Video):
        chosen = _choose("the decoded video", np.arange(len(path.frames)) / path.fps, frames, minimum, part)
        picked = fit(path.frames[chosen.places], height, width, mode)
        return Clip(picked, chosen.facts(path.fps))

    def use(frame: av.VideoFrame, line: Timeline) -> UInt8[np.ndarray, "H W 3"]:
        if hdr == "skip" and frame.color_trc in CURVES:
            raise UserError(
                f"{path} is of high dynamic range", found=CURVES[frame.color_trc].upper(), fix="--hdr=map"
            )
        pixels, turned = _shown(frame, to_8_bits=False)
        aspect = 1 / line.aspect if turned else line.aspect
        resized = _fit(pixels[None], height, width, mode, float(aspect))[0]
        curve = CURVES.get(frame.color_trc)
        return to_sdr(resized / 65535, curve) if curve else np.rint(resized).astype(np.uint8)

    picked = pick(path, lambda line: _choose(path, line.times, frames, minimum, part).places, use)
    chosen = _choose(path, picked.timeline.times, frames, minimum, part)
    if strict and picked.messages:
        raise UserError(f"{path} is damaged", found=f"{picked.messages} errors while decoding")
    pixels = np.stack([picked.frames[place] for place in chosen.places.tolist()])
    return Clip(
        pixels, dataclasses.replace(chosen.facts(picked.timeline.mean_rate), messages=picked.messages)
    )


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Places of frames among all of a video, of how many in the part, and seconds from the first to each."""

    places: Int[np.ndarray, " n"]
    frames: int
    times: Float[np.ndarray, " n"]
    step: float | None

    def facts(self, fps: float | None) -> Facts:
        step = self.step or (1 / fps if fps else None)
        return Facts(self.frames, fps, float(self.times[0]), step)


def _choose(
    name: VideoFile | str, times: Float[np.ndarray, " N"], count: int, minimum: int, part: Part
) -> _Chosen:
    """The frames of a clip among all of a video that are shown from `times` on, in seconds."""
    _require_length(name, len(times), minimum)
    mean = float(times[-1]) / max(1, len(times) - 1) or 1.0
    total = float(times[-1]) + mean
    start, end = float(part.start), total if part.end is None else min(float(part.end), total)
    if not 0 <= start < end:
        raise UserError(
            f"{name} has no such part",
            expected=f"0 <= start < end, within {total:.2f} s",
            found=f"start {part.start:g}, end {part.end if part.end is None else format(part.end, 'g')}",
        )
    first, last = np.searchsorted(times, [start + SLACK, end - SLACK], "right")
    first = max(0, int(first) - 1)  # the frame that is on the screen at the start
    inside = times[first : int(last)]
    _require_length(name, len(inside), minimum)
    if part.fps is not None:
        length, step = count / part.fps, 1 / part.fps
        begin = start + _window(name, part.window, end - start, length)
        places = np.searchsorted(inside, begin + np.arange(count) * step + min(SLACK, step / 4), "right") - 1
    elif len(inside) > 1 and np.abs(inside - np.linspace(inside[0], inside[-1], len(inside))).max() > mean:
        wanted = np.linspace(inside[0], inside[-1], count)
        places, step = np.searchsorted(inside, wanted + SLACK, "right") - 1, float(wanted[-1] - wanted[0])
        step = step / (count - 1) if count > 1 else None
    else:
        places = sample_frames(len(inside), count)
        step = float(inside[-1] - inside[0]) / (count - 1) if len(inside) >= count > 1 else None
    places = np.clip(places, 0, len(inside) - 1) + first
    return _Chosen(places, len(inside), times[places], step)


SLACK = 0.002  # seconds by which containers round times


def _window(
    name: VideoFile | str, window: Literal["head", "middle"] | tuple[int, int], total: float, length: float
) -> float:
    """Seconds from the start of a part to that of a window of `length` seconds in it."""
    spare = max(0.0, total - length)
    if isinstance(window, str):
        return 0.0 if window == "head" else spare / 2
    number, count = window
    count = min(count, max(1, int((total + SLACK) / length)))
    if number >= count:
        raise UserError(
            f"{name} is too short for clip {number + 1}",
            expected=f"{length * (number + 1):.2f} s",
            found=f"{total:.2f} s, enough for {count}",
        )
    return spare * number / (count - 1) if count > 1 else spare / 2


def read_start(path: VideoFile, count: int, fps: int | float) -> Frames:
    """The first `count` frames of a video file as it looks at `fps` frames per second, whatever its own rate.

    Raises:
        UserError: if the file cannot be read, or is too short for them.
    """

    def choose(line: Timeline) -> Int[np.ndarray, " count"]:
        _require_length(path, len(line.pts), 1)
        times, wanted = line.times, np.arange(count) / fps
        rate = line.mean_rate or fps
        if wanted[-1] > times[-1] + 0.5 / rate:
            raise UserError(
                f"{path} is too short",
                expected=f"{round(wanted[-1] * rate) + 1} frames, which are {count} at {fps:g} per second",
                found=f"{len(times)} frames",
                fix="fewer frames, or a longer video",
            )
        return np.searchsorted((times[1:] + times[:-1]) / 2, wanted)  # the nearest ones

    picked = pick(path, choose, lambda frame, line: _shown(frame)[0])
    return np.stack([picked.frames[place] for place in choose(picked.timeline).tolist()])


def sample_frames(total: int, count: int) -> Int[np.ndarray, " count"]:
    """`count` indices into `total` frames, first to last evenly; the last repeated if there are fewer."""
    if total >= count:
        return np.linspace(0, total - 1, count, dtype=int)
    return np.minimum(np.arange(count), total - 1)


def fit(
    frames: Frames,
    height: int,
    width: int,
    mode: Literal["stretch", "crop"] = "stretch",
    aspect: float = 1.0,
) -> UInt8[np.ndarray, "T {height} {width} 3"]:
    """Frames resized to `height` x `width` pixels.

    "stretch" gives up the aspect ratio and takes two taps per axis at any scale, as the released code does.
    "crop" keeps the aspect ratio, cuts what stands over on both sides alike, and averages when it shrinks.

    Args:
        aspect: width of a pixel over its height.
    """
    return np.rint(_fit(frames, height, width, mode, aspect)).astype(np.uint8)


def _fit(frames: np.ndarray, height: int, width: int, mode: str, aspect: float) -> np.ndarray:
    if mode == "crop":
        rows, columns = frames.shape[1:3]
        scale = max(height / rows, width / (columns * aspect))
        centre_rows, centre_columns = height / scale, width / scale / aspect
        frames = _resize(frames, 1, height, (rows - centre_rows) / 2, centre_rows, smooth=True)
        return _resize(frames, 2, width, (columns - centre_columns) / 2, centre_columns, smooth=True)
    frames = _resize(frames, 1, height, 0, frames.shape[1], smooth=False)
    return _resize(frames, 2, width, 0, frames.shape[2], smooth=False)


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


def _shown(frame: av.VideoFrame, to_8_bits: bool = True) -> tuple[np.ndarray, bool]:
    """RGB pixels [H, W, 3] as a player turns and mirrors them, and whether rows became columns.

    Frames of high dynamic range are in 16 bits, unless `to_8_bits`, which maps them.
    """
    curve = CURVES.get(frame.color_trc)
    if curve is None and frame.color_trc == UNMARKED and _has_dolby_vision(frame):
        raise UserError("the colours are of Dolby Vision alone (profile 5)", expected="HLG, PQ or SDR")
    try:
        pixels = frame.to_ndarray(format="rgb48le" if curve else "rgb24")
    except av.FFmpegError as error:
        raise UserError(f"no way to convert {frame.format.name} to RGB", found=error.strerror) from error
    if curve and to_8_bits:
        pixels = to_sdr(pixels / np.float32(65535), curve)
    return _turned(pixels, _display_matrix(frame))


UNMARKED = 2  # FFmpeg's number of an unspecified transfer function


def _has_dolby_vision(frame: av.VideoFrame) -> bool:
    return any(kind in frame.side_data for kind in (Type.DOVI_RPU_BUFFER, Type.DOVI_METADATA))


def _display_matrix(frame: av.VideoFrame) -> Float[np.ndarray, "2 2"]:
    """[[a, b], [c, d]]: a pixel (x, y) is shown at (a x + c y, b x + d y), but for a shift."""
    found: Any = frame.side_data  # a mapping by kind, of which the stubs know one kind only
    if Type.DISPLAYMATRIX not in found:
        return np.eye(2)
    return np.frombuffer(bytes(found[Type.DISPLAYMATRIX]), np.int32).reshape(3, 3)[:2, :2] / 65536


def _turned(pixels: np.ndarray, matrix: Float[np.ndarray, "2 2"]) -> tuple[np.ndarray, bool]:
    (a, b), (c, d) = matrix
    sizes = sorted(np.abs([a, b, c, d]))
    if sizes[2] == 0:  # all but one are 0: no picture would be left
        return pixels, False
    if sizes[1] > 0.02 * sizes[2]:
        angle = np.degrees(np.arctan2(b, a))
        raise UserError(
            "the video is turned by no right angle", expected="0, 90, 180 or 270", found=f"{angle:.0f}"
        )
    turned = bool(abs(b) > abs(a))
    if turned:
        pixels = pixels.swapaxes(0, 1)
    right, down = (c, b) if turned else (a, d)
    return pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1], turned


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
