"""Constants come back from pixels: clean, blurred and noisy, and not from clips that do not show them."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ditmem_jax.errors import UserError
from ditmem_jax.worlds.laws import PHENOMENA, splits
from ditmem_jax.worlds.measure import measure
from ditmem_jax.worlds.render import CAMERA, Camera
from ditmem_jax.worlds.simulate import sample_clip
from ditmem_jax.worlds.track import track

WORLDS = splits(0, backbone=20).backbone


def clips(phenomenon: str, camera: Camera = CAMERA):
    rng = np.random.default_rng(11)
    return [sample_clip(rng, world, phenomenon, camera) for world in WORLDS]


def relative_errors(pairs) -> np.ndarray:
    return np.array([[abs(m.constants[c] / clip.truth[c] - 1) for c in clip.truth] for m, clip in pairs])


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_rendered_truth(phenomenon):
    pairs = [(measure(clip.video, phenomenon), clip) for clip in clips(phenomenon)]
    assert all(m.ok and m.residual_px < 0.03 for m, _ in pairs)
    assert (np.median(relative_errors(pairs), axis=0) < 0.005).all()
    # The uncertainties are honest: most errors are within three of them.
    sigma = np.array([list(m.sigma.values()) for m, _ in pairs])
    assert (relative_errors(pairs) < 3 * sigma + 1e-3).mean() > 0.8


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_blurred_and_noisy(phenomenon):
    rng, pairs = np.random.default_rng(0), []
    for clip in clips(phenomenon):
        frames = (
            gaussian_filter(clip.video.astype(np.float32), (0, 0.8, 0.8, 0))
            + rng.normal(size=clip.video.shape) * 5
        )
        pairs.append((measure(frames, phenomenon), clip))
    assert (np.median(relative_errors(pairs), axis=0) < 0.05).all()


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_track_is_exact_to_a_small_part_of_a_pixel(phenomenon):
    for clip in clips(phenomenon)[:5]:
        found = track(clip.video.astype(np.float32), phenomenon, CAMERA)
        assert found.seen.mean() > 0.9
        assert np.abs((found.position - clip.path)[found.seen]).max() * CAMERA.scale < 0.1


def test_other_cameras():
    camera = Camera(size=64, frames=33, fps=24.0)
    clip = clips("fall", camera)[0]
    assert measure(clip.video, "fall", camera).constants["gravity"] == pytest.approx(
        clip.truth["gravity"], rel=0.005
    )


def test_a_few_lost_frames_do_no_harm():
    clip = clips("spring")[0]
    video = clip.video.copy()
    video[[5, 11, 17]] = 230
    measured = measure(video, "spring")
    assert measured.ok and measured.constants["stiffness"] == pytest.approx(clip.truth["stiffness"], rel=0.01)


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_what_is_not_there_is_not_measured(phenomenon):
    noise = measure(np.random.default_rng(0).integers(0, 255, (25, 32, 32, 3)).astype(np.uint8), phenomenon)
    empty = measure(np.full((25, 32, 32, 3), 200, np.uint8), phenomenon)
    assert not noise.ok and not empty.ok and not empty.constants and "found in" in empty.why
    video = clips(phenomenon)[0].video
    assert not measure(np.repeat(video[:1], 25, axis=0), phenomenon).ok  # nothing moves
    assert not measure(np.random.default_rng(0).permutation(video), phenomenon).ok  # moves without a law


def test_a_ball_that_does_not_land_tells_nothing_of_bounciness():
    camera = Camera(frames=9, fps=32.0)
    short = measure(clips("fall", camera)[0].video, "fall", camera)
    assert not short.ok and short.why == "the motion does not tell bounciness"
    assert short.sigma["gravity"] < 0.05 and short.sigma["bounciness"] == np.inf


def test_input_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="unknown phenomenon 'fal'"):
        measure(np.zeros((25, 32, 32, 3), np.uint8), "fal")
    with pytest.raises(UserError, match="do not fit together"):
        measure(np.zeros((24, 32, 32, 3), np.uint8), "fall")
