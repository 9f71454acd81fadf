"""Videos from wherever tensorflow-io reaches, to input records; in an environment of its own, `make tfio-env`."""

import os

# TensorFlow's errors come back as exceptions, which are told in a line.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The default tries for minutes to reach a bucket that is not there.
os.environ.setdefault("AWS_RETRY_MODE", "standard")
