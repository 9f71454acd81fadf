"""Pictures to pixels of a clip's size: read upright, and resized as Wan's own programs do."""

from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from ditmem_jax.errors import UserError


def read_image(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """Return the pixels of a picture, turned as its EXIF mark asks for.

    Raises:
        UserError: for a file that is missing, no picture, or damaged.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # which Pillow would cut at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no picture", expected="a file such as PNG, JPEG or WebP") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {path}", expected="a picture", found=error) from error


def cover(
    frames: UInt8[np.ndarray, "T h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "T {height} {width} 3"]:
    """Return frames that fill `height` x `width` pixels: scaled alike on both sides (Lanczos), the centre cut out."""
    rows, columns = frames.shape[1:3]
    if (rows, columns) == (height, width):
        return frames
    if len(frames) == 0:
        return np.zeros((0, height, width, 3), np.uint8)
    scale = max(width / columns, height / rows)
    size = max(round(columns * scale), width), max(round(rows * scale), height)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    box = left, top, left + width, top + height
    resized = (Image.fromarray(x).resize(size, Image.Resampling.LANCZOS).crop(box) for x in frames)
    return np.stack([np.asarray(x) for x in resized])


def bicubic(
    frames: Float32[np.ndarray, "T h w 3"], height: int, width: int
) -> Float32[np.ndarray, "T {height} {width} 3"]:
    """Return frames stretched to `height` x `width` pixels by cubic convolution of four taps, at any scale.

    Its parameter is -0.75 and its edges are repeated, as in PyTorch, whose way the weights were trained with.
    """
    for axis, size in ((1, height), (2, width)):
        extent = frames.shape[axis]
        centres = (np.arange(size) + 0.5) * (extent / size) - 0.5
        first = np.floor(centres).astype(int) - 1
        total = np.zeros((*frames.shape[:axis], size, *frames.shape[axis + 1 :]), np.float32)
        for tap in range(4):
            weight = _cubic(np.abs(centres - first - tap)).astype(np.float32)
            place = np.clip(first + tap, 0, extent - 1)
            total += np.take(frames, place, axis) * np.expand_dims(weight, [0, 3 - axis, 3])
        frames = total
    return frames


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The kernel of cubic convolution (Keys 1981) at distances from 0 to 2."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    return np.where(distance <= 1, near, a * (((distance - 5) * distance + 8) * distance - 4))
