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
    (tmp_path / "run" / ".half.json.0123456789ab.tmp").touch()
    (tmp_path / ".run.0123456789ab.tmp").touch()  # of a file called run
    process.send_signal(signal.SIGKILL)
    process.wait()
    with owned(tmp_path / "run"):
        assert list((tmp_path / "run").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_parent_that_cannot_be_written_is_named(tmp_path):
    write_text(tmp_path / "file", "")
    with pytest.raises(UserError, match=r"cannot write .*file"), owned(tmp_path / "file" / "run"):
        pass


def test_who_waits_gets_it_when_the_owner_ends(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("60", "0.3"), tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with owned(tmp_path / "run", wait=30):
        assert process.wait() == 0
