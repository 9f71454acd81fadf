"""Chosen frames of a video file, by PyAV: its best stream, the times of its frames, and what FFmpeg says of damage.

A first pass reads packets, which tell the times of all frames without decoding any. A second one decodes what leads up
to the frames that are wanted; where the next one lies far ahead, it goes on from the keyframe before that.

FFmpeg conceals what it cannot decode and only says so. Decoding is done in one thread, whose messages are the
video's own: readers of many videos run side by side, each in a thread.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.stream import Disposition
from av.video.stream import VideoStream as Stream
from jaxtyping import Float, Int

from ditmem_jax.errors import UserError

# FFmpeg's demuxers of videos and the suffixes of their files. No other is opened: those of playlists (hls, dash,
# concat, image2, ...) read further files, which whoever wrote the playlist names.
CONTAINERS = {
    "mov": ".mp4 .m4v .mov .qt .3gp .3g2 .mj2 .f4v .insv",
    "matroska": ".mkv .mk3d .webm",
    "avi": ".avi .divx",
    "mpegts": ".ts .mts .m2ts .m2t .tod",
    "mpeg": ".mpg .mpeg .mpe .vob .mod",
    "mpegvideo": ".m1v .m2v .mpv",
    "asf": ".wmv .asf",
    "flv": ".flv",
    "ogg": ".ogv .ogm",
    "gif": ".gif",
    "apng": ".apng",
    "rm": ".rm .rmvb",
    "mxf": ".mxf",
    "gxf": ".gxf",
    "nut": ".nut",
    "ivf": ".ivf",
    "dv": ".dv .dif",
    "wtv": ".wtv",
    "nsv": ".nsv",
    "amv": ".amv",
    "swf": ".swf",
    "yuv4mpegpipe": ".y4m",
    "h264": ".h264 .264 .avc",
    "hevc": ".hevc .h265 .265",
    "vvc": ".vvc .h266 .266",
    "obu": ".obu",
    "m4v": "",
    "mjpeg": ".mjpeg .mjpg",
}
SUFFIXES = tuple(" ".join(CONTAINERS.values()).split())
OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
TS_PACKETS = (188, 192, 204)  # bytes: plain, with a time stamp, with a code against errors
FAR = 2.0  # seconds between two wanted frames that make it worth to go on from a later keyframe


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
class Timeline:
    """When the frames of a video are shown, in the order of time.

    Attributes:
        pts: of each frame in units of `unit` seconds, or its number where the container tells no times.
        keys: pts of keyframes; none where there are no times.
        rate: frames per second as the container declares them.
        aspect: width of a pixel over its height.
    """

    pts: list[int]
    keys: list[int]
    unit: float | None
    rate: float | None
    aspect: Fraction

    @property
    def times(self) -> Float[np.ndarray, " N"]:
        """Seconds from the first frame."""
        if self.unit is None:
            return np.arange(len(self.pts)) / (self.rate or 1.0)
        return (np.array(self.pts, float) - (self.pts[0] if self.pts else 0)) * self.unit

    @property
    def mean_rate(self) -> float | None:
        """Frames per second: as the container declares it, unless the times of the frames tell otherwise.

        Containers declare it exactly where it is constant, and anything where it is not; times may be rounded.
        """
        span = self.times[-1] if self.unit is not None and self.pts else 0
        if not span > 0:
            return self.rate
        measured = (len(self.pts) - 1) / float(span)
        # half a frame over the whole video
        agree = self.rate and abs(self.rate / measured - 1) * len(self.pts) < 0.5
        return self.rate if agree else measured


@dataclasses.dataclass(frozen=True)
class Picked:
    """The chosen frames by their place in `timeline`, and how many errors FFmpeg told of while decoding."""

    frames: dict[int, np.ndarray]
    timeline: Timeline
    messages: int


def pick(
    path: VideoFile,
    choose: Callable[[Timeline], Int[np.ndarray, " n"]],
    use: Callable[[av.VideoFrame, Timeline], np.ndarray],
) -> Picked:
    """`use` of the frames that `choose` names of all frames of a video, deinterlaced where they are interlaced.

    Raises:
        UserError: for a file that cannot be read, holds no video, is cut off or visibly damaged where it was decoded.
    """
    with _listening() as log:
        line = _timeline(path)
        while True:
            wanted = sorted(set(choose(line).tolist()))
            log.clear()
            frames, found = _decode(path, line, wanted, lambda frame, line=line: use(frame, line), log)
            if found is None or found == line.pts:
                return Picked(frames, line, len(log))
            ordered = all(a < b for a, b in itertools.pairwise(found))
            # The container was wrong about its frames, the decoder is right.
            line = dataclasses.replace(
                line,
                pts=found if ordered else list(range(len(found))),
                keys=[],
                unit=line.unit if ordered else None,
            )


@contextlib.contextmanager
def _opened(path: VideoFile) -> Iterator[tuple[InputContainer, Stream]]:
    if isinstance(path, VideoStream):
        path.seek(0)
    try:
        source = (
            path if isinstance(path, VideoStream) else f"file:{path}"
        )  # "concat:..." is a protocol's otherwise
        container = av.open(
            source, "r", options=OPTIONS, metadata_errors="replace"
        )  # titles in old encodings
    except (av.FFmpegError, OSError) as error:
        found = "no container of videos" if isinstance(error, av.ArgumentError) else error.strerror
        raise UserError(f"cannot read {path}", expected="a video file", found=found) from error
    with container:
        yield container, _best_stream(path, container)


def _best_stream(path: VideoFile, container: InputContainer) -> Stream:
    """The stream that FFmpeg's command line takes: the largest picture, marked ones first; never a cover or preview."""

    def weight(stream: Stream) -> int:
        marked = bool(stream.disposition & Disposition.default)
        return stream.codec_context.width * stream.codec_context.height + 5_000_000 * marked

    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & PICTURES]
    if not streams:
        found = "a picture only" if container.streams.video else "only sound or other streams"
        raise UserError(f"{path} holds no video", found=found)
    best = max(streams, key=weight)
    index = best.index_entries
    end, size = (index[-1].pos + index[-1].size if len(index) else 0), container.size
    if end > size:
        raise UserError(f"{path} is cut off", expected=f"at least {end} bytes", found=size)
    if container.format.name == "mpegts" and all(size % packet for packet in TS_PACKETS):
        raise UserError(f"{path} is cut off", expected="whole packets", found=f"{size} bytes")
    best.codec_context.thread_count = 1
    return best


def _timeline(path: VideoFile) -> Timeline:
    with _opened(path) as (container, stream):
        pts, keys, begin, end = [], [], np.inf, 0.0
        try:
            for packet in container.demux():
                if not packet.size:
                    continue
                time = packet.dts if packet.pts is None else packet.pts
                if time is not None and packet.time_base:
                    begin = min(begin, float(time * packet.time_base))
                    end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index == stream.index and not packet.is_discard:
                    pts.append(packet.pts)
                    keys += [packet.pts] if packet.is_keyframe else []
        except av.FFmpegError as error:
            raise UserError(
                f"{path} is damaged", found=f"{error.strerror} after {len(pts)} frames"
            ) from error
        declared, there = (container.duration or 0) / av.time_base, max(0.0, end - begin)
        if container.format.name.startswith("matroska"):  # declares when it ends
            there = max(there, end)
        if declared - there > 0.2 + 0.01 * declared:
            raise UserError(f"{path} is cut off", expected=f"{declared:.2f} s", found=f"{there:.2f} s")
        rate = stream.average_rate or stream.guessed_rate
        aspect = stream.sample_aspect_ratio or Fraction(1)
        about = (float(rate) if rate else None, aspect if aspect > 0 else Fraction(1))
        if None in pts:
            return Timeline(list(range(len(pts))), [], None, *about)
        return Timeline(sorted(pts), sorted(keys), float(stream.time_base), *about)


def _decode(
    path: VideoFile,
    line: Timeline,
    wanted: Sequence[int],
    use: Callable[[av.VideoFrame], np.ndarray],
    log: list[tuple[int, str, str]],
) -> tuple[dict[int, np.ndarray], list[int] | None]:
    """`use` of the wanted frames by place, and the pts of all frames if all were decoded."""
    runs = _runs(line, wanted)
    to_the_end = bool(wanted) and wanted[-1] == len(line.pts) - 1
    kept: dict[int, np.ndarray] = {}
    with _opened(path) as (container, stream):
        opened = len(log)
        found, corrupt = [], 0
        try:
            for number, (start, places) in enumerate(runs):
                before = len(log)
                if start is not None:
                    container.seek(start, stream=stream)
                todo, previous, found = deque(places), None, []
                whole = to_the_end and number == len(runs) - 1
                for frame in _deinterlaced(container.decode(stream), stream):
                    key = len(found) if line.unit is None or frame.pts is None else frame.pts
                    corrupt += frame.is_corrupt
                    if start is not None and previous is None:
                        del log[
                            before:
                        ]  # of what lay between the place that was gone to and the first whole frame
                        if todo and key > line.pts[todo[0]]:  # went too far
                            return _decode(path, dataclasses.replace(line, keys=[]), wanted, use, log)
                    found.append(key)
                    while todo and line.pts[todo[0]] < key:
                        kept[todo.popleft()] = use(previous or frame)
                    if todo and line.pts[todo[0]] == key:
                        kept[todo.popleft()] = use(frame)
                    previous = frame
                    if not todo and not whole:
                        break
                while todo and previous is not None:
                    kept[todo.popleft()] = use(previous)
                if todo and not whole:
                    raise UserError(f"{path} is damaged", expected=f"{len(places)} more frames", found="none")
        except av.FFmpegError as error:
            raise UserError(
                f"{path} is damaged", found=f"{error.strerror} after {len(found)} frames"
            ) from error
        lost = [text for _, name, text in log[opened:] if name == container.format.name]
        if corrupt or lost:
            told = lost or [text for *_, text in log[opened:]]
            raise UserError(
                f"{path} is damaged",
                found=f"{corrupt} frames that could not be decoded whole"
                + "".join(f": {t.strip()}" for t in told[:1]),
            )
    return kept, found if to_the_end and len(runs) == 1 else None


def _runs(line: Timeline, wanted: Sequence[int]) -> list[tuple[int | None, list[int]]]:
    """The wanted frames in runs that are decoded in one go, and the pts to go to before each; None: the beginning."""
    runs: list[tuple[int | None, list[int]]] = [(None, [])]
    for place in wanted:
        before = line.pts[runs[-1][1][-1]] if runs[-1][1] else line.pts[0]
        key = (
            line.keys[int(np.searchsorted(line.keys, line.pts[place], "right")) - 1] if line.keys else before
        )
        if line.unit is not None and (key - before) * line.unit > FAR:
            runs.append((key, []))
        runs[-1][1].append(place)
    return [run for run in runs if run[1]] or runs


def _deinterlaced(frames: Iterator[av.VideoFrame], stream: Stream) -> Iterator[av.VideoFrame]:
    """The frames, from the first interlaced one on through FFmpeg's filter bwdif: a frame for each frame."""
    graph, ahead = None, deque()
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if graph is None:
            graph = _bwdif(stream)
        ahead.append(frame)
        graph.push(frame)
        yield from _pulled(graph, ahead)
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph, ahead)


def _bwdif(stream: Stream) -> Graph:
    graph = Graph()
    graph.link_nodes(
        graph.add_buffer(template=stream),
        graph.add("bwdif", "mode=send_frame:deint=interlaced"),
        graph.add("buffersink"),
    ).configure()
    return graph


def _pulled(graph: Graph, ahead: deque) -> Iterator[av.VideoFrame]:
    """What the graph has ready, with the times of what went in."""
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        origin = ahead.popleft()
        frame.pts, frame.time_base = origin.pts, origin.time_base
        yield frame


_lock, _listeners, _before = threading.Lock(), 0, (None, True)


@contextlib.contextmanager
def _listening() -> Iterator[list[tuple[int, str, str]]]:
    """Yields the list of errors (level, name, message) that FFmpeg tells of in this thread.

    Its level is the process's own: it is raised while anybody listens.
    """
    global _listeners, _before
    with _lock:
        if not _listeners:
            _before = av.logging.get_level(), av.logging.get_skip_repeated()
            av.logging.set_level(av.logging.ERROR)
            av.logging.set_skip_repeated(False)
        _listeners += 1
    try:
        with av.logging.Capture() as log:
            yield log
    finally:
        with _lock:
            _listeners -= 1
            if not _listeners:
                av.logging.set_level(_before[0])
                av.logging.set_skip_repeated(_before[1])
