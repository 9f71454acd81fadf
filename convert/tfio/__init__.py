"""Videos from wherever tensorflow-io reaches, to input records; in an environment of its own, `make tfio-env`."""

import os

os.environ.setdefault(
    "TF_CPP_MIN_LOG_LEVEL", "3"
)  # its errors come back as exceptions, which we tell in a line
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # likewise FFmpeg's
os.environ.setdefault(
    "AWS_RETRY_MODE", "standard"
)  # the default tries for minutes to reach what is not there
