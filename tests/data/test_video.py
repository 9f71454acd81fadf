"""Reading, picking, resizing and writing of video files."""

import dataclasses
import re
import struct
from fractions import Fraction

import av
import av.filter
import numpy as np
import pytest

from ditmem_jax.data import decode, video
from ditmem_jax.data.hdr import to_sdr
from ditmem_jax.data.video import (
    Facts,
    Part,
    VideoBytes,
    fit,
    read_clip,
    read_video,
    sample_frames,
    to_unit,
    write_video,
)
from ditmem_jax.errors import UserError


def grey(levels, height=16, width=32):
    """A video whose frame i is all of the grey `levels[i]`."""
    levels = np.asarray(levels, np.uint8)
    return np.tile(levels[:, None, None, None], (1, height, width, 3))


def patches():
    """Five frames with a different colour in each quarter."""
    frames = np.zeros((5, 64, 96, 3), np.uint8)
    frames[:, :32, :48], frames[:, :32, 48:] = (200, 30, 60), (20, 220, 40)
    frames[:, 32:, :48], frames[:, 32:, 48:] = (30, 60, 210), (240, 240, 10)
    return frames


def write_container(path, frames, codec, rotation=0):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def test_written_video_reads_back(tmp_path):
    write_video(tmp_path / "a.mp4", patches(), fps=12.5)
    video = read_video(tmp_path / "a.mp4")
    assert video.fps == 12.5 and video.frames.shape == (5, 64, 96, 3) and video.frames.dtype == np.uint8
    quarters = video.frames[:, 16::32, 24::48].astype(int)
    np.testing.assert_allclose(quarters, patches()[:, 16::32, 24::48], atol=4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_same_frames_give_the_same_bytes(tmp_path):
    """Many times: with macroblock trees four of a hundred such small clips came out otherwise."""
    rng, made = np.random.default_rng(0), set()
    smooth = np.cumsum(rng.normal(0, 4, (25, 64, 64, 3)), axis=0) + 128
    for _ in range(40):
        write_video(tmp_path / "a.mp4", smooth.clip(0, 255).astype(np.uint8), fps=16)
        made.add((tmp_path / "a.mp4").read_bytes())
    assert len(made) == 1


def test_titles_in_old_encodings_are_no_obstacle(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as container:
        container.metadata["title"] = "cafe"
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 16, 32, "yuv420p"
        for frame in grey([50, 100]):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.count(b"cafe") == 1
    (tmp_path / "a.mp4").write_bytes(data.replace(b"cafe", b"caf\xe9"))
    assert len(read_video(tmp_path / "a.mp4").frames) == 2


@pytest.mark.parametrize("shape", [(3, 15, 16, 3), (3, 16, 15, 3), (0, 16, 16, 3)])
def test_sizes_that_h264_lacks_are_refused(tmp_path, shape):
    with pytest.raises(UserError, match="even height and width"):
        write_video(tmp_path / "a.mp4", np.zeros(shape, np.uint8), fps=16)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_video(tmp_path / "a.mp4", patches(), fps=16)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(UserError, match="frames per second above 0"):
        write_video(tmp_path / "a.mp4", patches(), fps=-1)
    assert (tmp_path / "a.mp4").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_sample_frames():
    np.testing.assert_array_equal(sample_frames(9, 5), [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(sample_frames(10, 4), [0, 3, 6, 9])
    np.testing.assert_array_equal(sample_frames(8, 5), [0, 1, 3, 5, 7])  # rounded down, as released
    np.testing.assert_array_equal(sample_frames(3, 5), [0, 1, 2, 2, 2])


@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")]
)
def test_read_clip_picks_frames_evenly(tmp_path, name, codec):
    write_container(tmp_path / name, grey(range(20, 220, 10)), codec)  # mkv and webm do not tell their length
    clip = read_clip(tmp_path / name, 5, 16, 32).frames
    assert clip.dtype == np.uint8
    np.testing.assert_allclose(clip.mean((1, 2, 3)), [20, 60, 110, 160, 210], atol=3)


def test_read_clip_repeats_the_last_frame_of_a_short_video(tmp_path):
    write_video(tmp_path / "a.mp4", grey([50, 100, 150]), fps=16)
    clip = read_clip(tmp_path / "a.mp4", 5, 16, 32).frames
    np.testing.assert_allclose(clip.mean((1, 2, 3)), [50, 100, 150, 150, 150], atol=2)


def test_read_clip_is_read_video_sampled_and_fitted(tmp_path):
    write_video(tmp_path / "a.mp4", patches(), fps=16)
    frames = read_video(tmp_path / "a.mp4").frames[[0, 2, 4]]
    np.testing.assert_array_equal(
        read_clip(tmp_path / "a.mp4", 3, 20, 20, "crop").frames, fit(frames, 20, 20, "crop")
    )


@pytest.mark.parametrize("fps", [8, 12.5, 30, 30000 / 1001])
def test_read_clip_tells_facts_of_the_whole_video(tmp_path, fps):
    write_video(tmp_path / "a.mp4", grey(range(20, 220, 10)), fps=fps)
    facts = read_clip(tmp_path / "a.mp4", 5, 16, 32).facts
    assert facts.frames == 20
    assert facts.fps == pytest.approx(fps, rel=1e-6) and facts.duration == pytest.approx(20 / fps, rel=1e-6)
    video = read_video(tmp_path / "a.mp4")
    assert read_clip(video, 5, 16, 32).facts == facts


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")])
def test_the_times_of_frames_overrule_what_the_container_declares(tmp_path, name, codec):
    def facts(times):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=30)
            stream.height, stream.width, stream.pix_fmt = 16, 32, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            for time, pixels in zip(times, grey(range(20, 80, 2)), strict=True):
                frame = av.VideoFrame.from_ndarray(pixels)
                frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return read_clip(tmp_path / name, 5, 16, 32).facts

    slow = facts([*np.arange(10) / 10, *np.arange(20) + 1])
    assert slow.frames == 30 and slow.duration == pytest.approx(20 * 30 / 29, rel=1e-3)
    assert facts(np.arange(30) / 30).fps == pytest.approx(30, rel=2e-3)


def test_a_single_frame_has_the_declared_rate(tmp_path):
    write_video(tmp_path / "a.mp4", grey([10]), fps=16)
    assert read_clip(tmp_path / "a.mp4", 5, 16, 32, minimum=1).facts == Facts(1, 16.0, 0.0, 1 / 16)


def test_a_phone_video_is_turned_upright(tmp_path):
    write_container(tmp_path / "a.mp4", patches(), "libx264", rotation=90)
    frames = read_video(tmp_path / "a.mp4").frames
    assert frames.shape == (5, 96, 64, 3)
    np.testing.assert_allclose(frames[0, 5, 5].astype(int), (20, 220, 40), atol=4)  # was at the upper right


def test_stretch_interpolates_between_two_pixels():
    def row(levels):
        return np.tile(np.array(levels, np.uint8)[None, None, :, None], (1, 1, 1, 3))

    levels = fit(row([0, 100, 200, 50]), 1, 8)[0, 0, :, 0]
    np.testing.assert_array_equal(levels, [0, 25, 75, 125, 175, 162, 88, 50])
    shrunk = fit(row(range(0, 180, 20)), 1, 3)[0, 0, :, 0]
    np.testing.assert_array_equal(shrunk, [20, 80, 140])  # the middle pixel of three, not their mean


def test_crop_keeps_the_aspect_ratio_and_the_centre():
    frames = np.zeros((1, 4, 12, 3), np.uint8)
    frames[:, :, 4:8] = 200
    np.testing.assert_array_equal(fit(frames, 4, 4, "crop"), 200)
    checker = np.indices((8, 8)).sum(0)[None, :, :, None] % 2 * np.array([254, 254, 254])
    smooth = fit(checker.astype(np.uint8), 2, 2, "crop")
    np.testing.assert_allclose(smooth.astype(int), 127, atol=1)  # averaged, not one of the two


def test_fit_of_the_right_size_is_exact():
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for mode in ("stretch", "crop"):
        np.testing.assert_array_equal(fit(frames, 8, 8, mode), frames)


def test_pixels_for_the_vae():
    np.testing.assert_array_equal(
        to_unit(np.array([0, 51, 255], np.uint8)), np.array([-1, -0.6, 1], np.float32)
    )


def broken_files(folder):
    """Unreadable files by name, with a word of the error that each must give."""
    (folder / "text.mp4").write_text("not a video " * 100)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "folder.mp4").mkdir()
    write_video(folder / "single.mp4", grey([10]), fps=16)
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    write_video(folder / "whole.mp4", noise, fps=16)
    whole = (folder / "whole.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "missing.mp4": "No such file",
        "text.mp4": "Invalid data",
        "empty.mp4": "Invalid data",
        "folder.mp4": "directory",
        "single.mp4": "at least 2 frames",
        "cut.mp4": "cut off",
        "sound.mp4": "no video",
    }


def test_broken_files_are_named_with_the_reason(tmp_path):
    for name, reason in broken_files(tmp_path).items():
        with pytest.raises(UserError, match=reason) as caught:
            read_clip(tmp_path / name, 5, 16, 16)
        assert name in str(caught.value)
        with pytest.raises(UserError, match=reason):
            read_video(tmp_path / name)


def test_the_minimum_length_is_the_users(tmp_path):
    write_video(tmp_path / "a.mp4", grey([10, 20, 30]), fps=16)
    assert len(read_video(tmp_path / "a.mp4", minimum=3).frames) == 3
    with pytest.raises(UserError, match="at least 4 frames"):
        read_clip(tmp_path / "a.mp4", 5, 16, 16, minimum=4)


def marked(path, matrix):
    """Rewrites the display matrix in the track header of an mp4: a b u c d v x y w."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 8 + 4 + 16 + 16 + 4
    data[at - 4 : at + 32] = struct.pack(
        ">9i", *(int(v * (1 << (30 if i % 3 == 2 else 16))) for i, v in enumerate(matrix))
    )
    path.write_bytes(data)


@pytest.mark.parametrize(
    "matrix, right",
    [
        ((1, 0, 0, 1), lambda x: x),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),  # a phone's front camera
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
        ((0, 1, -1, 0), lambda x: x.swapaxes(0, 1)[:, ::-1]),
        ((0, -1, 1, 0), lambda x: x.swapaxes(0, 1)[::-1]),
        ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda x: x.swapaxes(0, 1)[::-1, ::-1]),
    ],
)
def test_display_matrices_turn_and_mirror(tmp_path, matrix, right):
    write_video(tmp_path / "a.mp4", patches()[:2], fps=16)
    plain = read_video(tmp_path / "a.mp4").frames[0]
    a, b, c, d = matrix
    marked(tmp_path / "a.mp4", (a, b, 0, c, d, 0, 0, 0, 1))
    np.testing.assert_array_equal(read_video(tmp_path / "a.mp4").frames[0], right(plain))


def test_a_matrix_of_no_right_angle_is_refused(tmp_path):
    write_video(tmp_path / "a.mp4", patches()[:2], fps=16)
    marked(tmp_path / "a.mp4", (0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, 1))
    with pytest.raises(UserError, match="no right angle"):
        read_video(tmp_path / "a.mp4")


def encode(
    path, frames, codec="libx264", rate=16, times=None, pix="yuv420p", options=None, aspect=None, **marks
):
    """A video whose frames are arrays in RGB, or frames of PyAV; times in seconds for a rate that varies."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        first = frames[0]
        stream.height, stream.width = (
            (first.height, first.width) if isinstance(first, av.VideoFrame) else first.shape[:2]
        )
        stream.pix_fmt = pix
        for name, value in marks.items():
            setattr(stream.codec_context, name, value)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            if not isinstance(frame, av.VideoFrame):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_crop_heeds_the_shape_of_pixels(tmp_path):
    """A circle of pixels of 64:45, upright and turned."""
    y, x = np.mgrid[:58, :72]
    disc = ((x - 35.5) * 64 / 45) ** 2 + (y - 28.5) ** 2 < 20**2
    frames = np.where(disc[..., None], 255, 0).astype(np.uint8).repeat(3, 2)[None].repeat(3, 0)
    encode(tmp_path / "a.mp4", frames, aspect=Fraction(64, 45))
    for matrix in ((1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 1, 0, -1, 0, 0, 58, 0, 1)):
        marked(tmp_path / "a.mp4", matrix)
        seen = read_clip(tmp_path / "a.mp4", 3, 48, 48, "crop").frames[1, ..., 0] > 127
        assert abs(int(seen.any(0).sum()) - int(seen.any(1).sum())) <= 2


def test_interlaced_frames_are_deinterlaced(tmp_path):
    """Bars that move: the even lines of a frame show one time and the odd lines the next."""
    x = np.arange(64)
    bars = [np.where((x + 4 * t) // 16 % 2, 220, 30).astype(np.uint8) for t in range(12)]
    frames = []
    for i in range(0, 12, 2):
        frame = np.empty((32, 64, 3), np.uint8)
        frame[0::2], frame[1::2] = bars[i][None, :, None], bars[i + 1][None, :, None]
        frames.append(frame)
    graph = av.filter.Graph()
    source = graph.add_buffer(width=64, height=32, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 16))
    graph.link_nodes(source, graph.add("setfield", "tff"), graph.add("buffersink")).configure()
    fields = []
    for i, frame in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(frame)
        frame.pts, frame.time_base = i, Fraction(1, 16)
        graph.push(frame)
        fields.append(graph.pull())
    encode(tmp_path / "a.mp4", frames, "libx264", options={"crf": "1"})
    combed = read_video(tmp_path / "a.mp4").frames
    encode(tmp_path / "a.mp4", fields, "libx264", options={"crf": "1", "x264-params": "interlaced=1:tff=1"})
    clean = read_video(tmp_path / "a.mp4").frames

    def combing(found):
        return np.abs(np.diff(found[1:-1].astype(float), axis=1)).mean()

    assert clean.shape == combed.shape == (6, 32, 64, 3)
    assert combing(clean) < 0.5 * combing(combed)


def test_the_largest_stream_is_the_video_and_pictures_are_none(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = []
        for size in (16, 32):
            stream = container.add_stream("libx264", rate=16)
            stream.height, stream.width, stream.pix_fmt = size, size, "yuv420p"
            streams.append((stream, size))
        for i in range(4):
            for (stream, size), level in zip(streams, (200, 50), strict=True):
                frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), level, np.uint8))
                frame.pts, frame.time_base = i, Fraction(1, 16)
                container.mux(stream.encode(frame))
        for stream, _ in streams:
            container.mux(stream.encode())
    assert abs(read_clip(tmp_path / "two.mkv", 3, 8, 8).frames.mean() - 50) < 3


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nreal.mp4\n#EXT-X-ENDLIST\n"),
        ("b.mp4", "ffconcat version 1.0\nfile real.mp4\n"),
        ("c.mp4", "#EXTM3U\n#EXTINF:2,\nhttp://localhost/a.ts\n#EXT-X-ENDLIST\n"),
    ],
)
def test_lists_of_further_files_are_no_videos(tmp_path, name, text):
    write_video(tmp_path / "real.mp4", grey([10, 20]), fps=16)
    (tmp_path / name).write_text(text)
    for file in (tmp_path / name, VideoBytes(text.encode(), name)):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            read_clip(file, 2, 16, 16)
    with pytest.raises(UserError, match="No such file"):
        read_clip(f"concat:{tmp_path / 'real.mp4'}", 2, 16, 16)


HDR_TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def hlg(light):
    """The signal of display light in units of 1000 nits (BT.2100, inverse of the system gamma of 1.2)."""
    scene = light * np.maximum(light @ [0.2627, 0.678, 0.0593], 1e-9)[..., None] ** (1 / 1.2 - 1)
    return np.where(
        scene <= 1 / 12,
        np.sqrt(3 * scene),
        0.17883277 * np.log(12 * scene - 0.28466892 + 1e-9 * (scene <= 1 / 12)) + 0.55991073,
    )


def pq(light):
    y = (light / 10) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


@pytest.mark.filterwarnings("ignore:invalid value")  # of the branch of the logarithm that is not taken
@pytest.mark.parametrize("curve, inverse", [("hlg", hlg), ("pq", pq)])
def test_hdr_patches_look_as_in_sdr(curve, inverse):
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [110, 110, 110], [0, 0, 0]])
    light = (colours / 255) ** 2.4 @ HDR_TO_2020.T * 0.203
    seen = to_sdr(inverse(light), curve)
    np.testing.assert_allclose(seen.astype(int), colours, atol=15)
    np.testing.assert_allclose(seen[3].astype(int), 110, atol=1)  # below the knee light is as it was
    bright = to_sdr(inverse(np.array([[0.203] * 3, [0.6] * 3, [1.0] * 3])), curve)[:, 0]
    assert 210 < bright[0] < bright[1] < bright[2] == 255  # highlights are told apart


def test_hdr_is_mapped_or_skipped(tmp_path):
    frames = []
    for _ in range(3):
        frame = av.VideoFrame(32, 16, "yuv420p10le")
        for plane, level in zip(frame.planes, (64 + 876 * 0.5, 512, 512), strict=True):
            values = np.zeros((plane.height, plane.line_size // 2), "<u2")
            values[:, : plane.width] = round(level)
            plane.update(values.tobytes())
        frames.append(frame)
    marks = dict(color_primaries=9, color_trc=18, colorspace=9, color_range=1)
    quiet = {"x265-params": "log-level=none"}
    encode(tmp_path / "a.mov", frames, "libx265", pix="yuv420p10le", options=quiet, **marks)
    want = int(to_sdr(np.full((1, 3), 0.5), "hlg")[0, 0])
    for found in (read_clip(tmp_path / "a.mov", 2, 16, 32).frames, read_video(tmp_path / "a.mov").frames):
        np.testing.assert_allclose(found.astype(int), want, atol=2)
    with pytest.raises(UserError, match="high dynamic range"):
        read_clip(tmp_path / "a.mov", 2, 16, 32, hdr="skip")


def test_frames_are_even_in_time_where_the_rate_varies(tmp_path):
    times = np.r_[np.arange(60) / 30, 2 + np.arange(17) / 2]
    encode(tmp_path / "a.mp4", grey(20 + 20 * times), rate=30, times=times, options={"crf": "4"})
    clip = read_clip(tmp_path / "a.mp4", 25, 16, 16)
    seen = (clip.frames[:, 8, 8].mean(-1) - 20) / 20
    want = times[np.searchsorted(times, np.linspace(0, 10, 25) + 0.002, "right") - 1]  # what is on the screen
    np.testing.assert_allclose(seen, want, atol=0.1)
    assert clip.facts.step == pytest.approx(10 / 24, rel=1e-3)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """80 s at 4 fps, a keyframe every 3 s; grey is 20 and 2 for each second."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    levels = 20 + np.arange(320) / 2
    encode(path, grey(levels), rate=4, options={"crf": "4", "g": "12", "bf": "2"})
    return path


def seconds(clip):
    return (clip.frames.mean((1, 2, 3)) - 20) / 2


@pytest.mark.parametrize(
    "part, want",
    [
        (Part(10, 20), np.linspace(10, 19.75, 5)),
        (Part(70.1), np.linspace(70, 79.75, 5)),
        (Part(fps=1, window="head"), range(5)),
        (Part(10, fps=2, window="head"), np.arange(10, 12.5, 0.5)),
        (Part(fps=1, window="middle"), 37.5 + np.arange(5)),
        (Part(10, 30, fps=1), 17.5 + np.arange(5)),
        (Part(fps=1, window=(0, 3)), range(5)),
        (Part(fps=1, window=(2, 3)), 75 + np.arange(5)),
        (Part(60, 64, fps=1, window="head"), [60, 61, 62, 63, 63.75]),  # the last one repeated
    ],
)
def test_parts_and_windows(film, part, want):
    clip = read_clip(film, 5, 16, 16, part=part)
    np.testing.assert_allclose(seconds(clip), list(want), atol=1)
    assert clip.facts.start == pytest.approx(next(iter(want)), abs=0.26)
    assert part.fps is None or clip.facts.step == 1 / part.fps


@pytest.mark.parametrize(
    "part, message",
    [
        (Part(90), "no such part"),
        (Part(5, 5), "no such part"),
        (Part(-1), "no such part"),
        (Part(0, 12, fps=1, window=(2, 3)), "too short for clip 3\n.*15.00 s\n.*enough for 2"),
        (Part(5, 5.2), "at least 2 frames"),
    ],
)
def test_parts_that_are_not_there(film, part, message):
    with pytest.raises(UserError, match=message):
        read_clip(film, 5, 16, 16, part=part)


def test_only_what_leads_up_to_the_frames_is_decoded(film, monkeypatch):
    decoded = []
    deinterlaced = decode._deinterlaced

    def counted(frames, stream):
        for frame in deinterlaced(frames, stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode, "_deinterlaced", counted)
    read_clip(film, 5, 16, 16, part=Part(60, 64))
    assert len(decoded) < 40
    decoded.clear()
    even = read_clip(film, 5, 16, 16)
    assert len(decoded) < 120
    np.testing.assert_allclose(seconds(even), np.linspace(0, 79.75, 5), atol=1)


@pytest.mark.parametrize(
    "name, codec",
    [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mp4", "libx264"), ("a.ts", "libx264")],
)
def test_what_the_header_promises_must_be_there(tmp_path, name, codec):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8)
    encode(tmp_path / name, noise, codec, rate=8, options={"g": "8"})
    assert len(read_video(tmp_path / name).frames) == 32
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 8 // 10 + 1])
    told = r"cut off\n.*expected: +(4.00 s|at least|whole packets)|damaged|cannot read"
    with pytest.raises(UserError, match=told):
        read_clip(tmp_path / name, 5, 16, 16)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
def test_a_video_whose_times_begin_late_is_whole(tmp_path, name):
    encode(tmp_path / name, grey(np.arange(16)), times=60 + np.arange(16) / 16)
    clip = read_clip(tmp_path / name, 4, 16, 16)
    assert clip.facts.frames == 16 and clip.facts.start == 0


def test_pictures_that_were_concealed_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    y, x, t = np.mgrid[:64, :96, :24]
    waves = [np.sin((x + 3 * t) / 11 + y / 17), np.cos((y - 2 * t) / 9), np.sin((x - y + 5 * t) / 23)]
    frames = np.moveaxis(127 + 100 * np.stack(waves, -1), 2, 0).astype(np.uint8)
    encode(tmp_path / "a.mkv", frames, options={"g": "16"})
    data = (tmp_path / "a.mkv").read_bytes()
    refused = 0
    for _ in range(8):
        at = int(rng.integers(len(data) // 8, len(data) * 7 // 8))
        broken = data[:at] + rng.bytes(8) + data[at + 8 :]
        try:
            read_video(VideoBytes(broken, "broken.mkv"))
        except UserError as error:
            assert re.search("damaged|cut off", str(error))
            refused += 1
    assert refused >= 3
    assert av.logging.get_level() is None  # as it was


def test_strict_refuses_what_ffmpeg_complains_of(film, monkeypatch):
    picked = decode.pick
    monkeypatch.setattr(video, "pick", lambda *a: dataclasses.replace(picked(*a), messages=3))
    assert read_clip(film, 5, 16, 16).facts.messages == 3
    with pytest.raises(UserError, match="3 errors while decoding"):
        read_clip(film, 5, 16, 16, strict=True)
