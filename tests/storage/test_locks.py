"""One owner for each folder."""

import os
import signal
import subprocess
import sys

import pytest

from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import write_text
from ditmem_jax.storage.locks import owned

HOLD = """
import sys, time
from ditmem_jax.storage.locks import owned
with owned(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_owner_who_is_named(tmp_path):
    with owned(tmp_path / "run"):
        with (
            pytest.raises(UserError, match=f"run is in use\n.*process {os.getpid()} on "),
            owned(tmp_path / "run"),
        ):
            pass
        with owned(tmp_path / "other"):
            pass
    with owned(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_owner_held_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on "), owned(tmp_path / "run"):
        pass
    (tmp_path / "run" / ".half.json.0123.tmp").touch()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with owned(tmp_path / "run"):
        assert list((tmp_path / "run").iterdir()) == []


def test_a_parent_that_cannot_be_written_is_named(tmp_path):
    write_text(tmp_path / "file", "")
    with pytest.raises(UserError, match=r"cannot write .*file"), owned(tmp_path / "file" / "run"):
        pass
