"""Pictures of any size, orientation and mode."""

import numpy as np
import pytest
from PIL import Image

from ditmem_jax.conditions.images import cover, read_image
from ditmem_jax.errors import UserError

ORIENTATION = 0x0112  # EXIF


def picture(height=4, width=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_mark_asks_for(tmp_path, orientation):
    """The mark says what was done to the picture: the transposed ones change its shape."""
    upright = picture()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), upright)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = np.full((4, 6), 255, np.uint8)
    image = (
        Image.fromarray(grey.astype(np.uint16) << 8)
        if mode == "I;16"
        else Image.fromarray(grey).convert(mode)
    )
    image.save(tmp_path / "a.tiff")
    np.testing.assert_allclose(read_image(tmp_path / "a.tiff"), np.full((4, 6, 3), 255), atol=1)


def test_what_is_no_picture(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(picture(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name, message in (
        ("text.png", "is no picture"),
        ("cut.png", "cannot read"),
        ("none.png", "cannot read"),
    ):
        with pytest.raises(UserError, match=f"{name}|{message}"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(("shape", "size"), [((30, 60), (20, 20)), ((60, 30), (20, 20)), ((7, 9), (16, 32))])
def test_a_picture_covers_the_clip_and_its_centre_is_kept(shape, size):
    """As in Wan's own program: Lanczos at one scale, then the middle."""
    pixels, (height, width) = picture(*shape), size
    scale = max(width / shape[1], height / shape[0])
    image = Image.fromarray(pixels).resize(
        (round(shape[1] * scale), round(shape[0] * scale)), Image.Resampling.LANCZOS
    )
    top, left = (image.height - height) // 2, (image.width - width) // 2
    expected = np.asarray(image)[top : top + height, left : left + width]
    np.testing.assert_array_equal(cover(pixels[None], height, width)[0], expected)


def test_a_picture_of_the_clips_size_stays_as_it_is():
    np.testing.assert_array_equal(cover(picture()[None], 4, 6)[0], picture())
