"""Reading, picking, resizing and writing of video files."""

from fractions import Fraction

import av
import numpy as np
import pytest

from ditmem_jax.data.video import Facts, fit, read_clip, read_video, sample_frames, to_unit, write_video
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
    assert read_clip(tmp_path / "a.mp4", 5, 16, 32, minimum=1).facts == Facts(1, 16.0)


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
