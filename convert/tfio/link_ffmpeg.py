"""`python -m convert.tfio.link_ffmpeg`: gives tensorflow-io the FFmpeg 4 that opencv's wheel bundles.

tensorflow-io looks for libavformat.so.58 and libswscale.so.5 in a folder that nobody ships, but which its library
names in its search path. The links go there. The rest of FFmpeg is found once opencv has loaded it.
"""

import sysconfig
from pathlib import Path

SONAMES = ("libavformat.so.58", "libswscale.so.5")
SEARCHED = "_solib_local/_U@ffmpeg_U4_U2_S_S_Cffmpeg___Uexternal_Sffmpeg_U4_U2_Sstub"


def link(packages: Path) -> None:
    """Makes the links in a folder of installed packages, anew if they are there."""
    folder = packages / SEARCHED
    folder.mkdir(parents=True, exist_ok=True)
    for soname in SONAMES:
        name, _, version = soname.partition(".")
        (bundled,) = (packages / "opencv_python_headless.libs").glob(f"{name}-*.{version}.*")
        (folder / soname).unlink(missing_ok=True)
        (folder / soname).symlink_to(bundled)


if __name__ == "__main__":
    link(Path(sysconfig.get_path("purelib")))
