"""Given frames from the files that a user names."""

from pathlib import Path

from ditmem_jax.conditions.images import read_image
from ditmem_jax.config import Config
from ditmem_jax.data.video import read_start
from ditmem_jax.errors import UserError
from ditmem_jax.storage.digests import of_file
from ditmem_jax.types import GivenFrames


def read_frames(
    config: Config,
    first_frame: str | Path | None = None,
    last_frame: str | Path | None = None,
    video: str | Path | None = None,
    count: int | None = None,
) -> GivenFrames | None:
    """Return the frames in these files, with names and digests of the files as their origin; None if none is named.

    Args:
        first_frame, last_frame: pictures.
        video: a video that the clip continues, in place of a first frame: its first frames at `config.video.fps`.
        count: how many of those; by default the least that show a motion, which fill two latent frames.
    Raises:
        UserError: for a file that cannot be read, and for a last frame alone, or two that both come first.
    """
    named = {"first_frame": first_frame, "last_frame": last_frame, "continues": video}
    named = {name: Path(path) for name, path in named.items() if path is not None}
    if not named:
        return None
    if first_frame is not None and video is not None:
        raise UserError("a clip cannot begin with a picture and with a video", fix="name one of them")
    if video is not None:
        count = 1 + config.vae.temporal_stride if count is None else count
        first = read_start(video, count, config.video.fps)
    elif first_frame is not None:
        first = read_image(first_frame)[None]
    else:
        raise UserError("a last frame is given, and no first one", fix="name a first frame too")
    last = None if last_frame is None else read_image(last_frame)
    origin = {name: {"file": path.name, "sha256": of_file(path)} for name, path in named.items()}
    return GivenFrames(first, last, origin)
