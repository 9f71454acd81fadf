"""The commands as a user runs them, one after the other, in one process each."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.bank.test_matches import LIBRARY, write
from tests.bank.test_search import random


def bank(*arguments, fails=False):
    command = [sys.executable, "-m", "ditmem_jax.bank", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 1) == fails and "Traceback" not in done.stderr, done.stderr
    return done.stderr if fails else done.stdout


@pytest.mark.slow
def test_a_bank_of_records(tmp_path):
    write(tmp_path / "records", LIBRARY)
    write(tmp_path / "more", {"more": "a ball falls on quindara 🪐"})
    place = f"--bank={tmp_path / 'bank'}"
    assert "13 videos" in bank("build", place, f"--records={tmp_path / 'records'}")
    assert "there is a bank" in bank("build", place, f"--records={tmp_path / 'records'}", fails=True)
    assert "1 videos added" in bank("add", place, f"--records={tmp_path / 'more'}")
    (tmp_path / "queries.txt").write_text("a block\n\nfalls on quindara 🪐\n")
    lines = bank("search", place, f"--queries={tmp_path / 'queries.txt'}", "--k=1", "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert [(each["query"], each["found"][0]["id"]) for each in found] == [
        ("a block", "far"),
        ("falls on quindara 🪐", "more"),
    ]
    assert "-1.0" not in lines[0] and found[1]["found"][0]["score"] > 0
    shown = bank("search", "a block", place, "--k=2")
    assert "a block slides" in shown and max(map(len, shown.splitlines())) <= 200
    assert bank("match", tmp_path / "records", place, "--k=2").count("itself") == 1
    assert "1 videos removed" in bank("remove", "more", place)
    assert "no fault" in bank("verify", place, "--deep")


@pytest.mark.slow
def test_the_other_commands(tmp_path):
    np.save(tmp_path / "vectors.npy", random(20))
    np.save(tmp_path / "query.npy", random(20)[3:4])
    (tmp_path / "table.csv").write_text(
        "id,caption,motion\n" + "".join(f"clip{i},text {i},{i}\n" for i in range(20))
    )
    place = f"--bank={tmp_path / 'bank'}"
    bank("build", place, f"--table={tmp_path / 'table.csv'}", f"--vectors={tmp_path / 'vectors.npy'}")
    shown = bank("search", place, f"--queries={tmp_path / 'query.npy'}", "--k=1", "--where=motion < 5")
    assert "clip3" in shown and "1.0000" in shown
    assert "motion" in bank(
        "search", place, f"--queries={tmp_path / 'query.npy'}", "--where=moton < 5", fails=True
    )
    assert "cannot embed text" in bank("search", "text 3", place, fails=True)
    assert json.loads(bank("show", "clip7", place))["motion"] == 7
    assert "no video 'clip'" in bank("show", "clip", place, fails=True)
    assert "2 videos removed" in bank("remove", place, "--where=motion < 2")
    assert [v["rows"] for v in json.loads(bank("versions", place, "--json"))] == [20, 18]
    assert json.loads(bank("stats", place, "--json"))["videos"] == 18
    assert json.loads(bank("stats", place, "--json", "--version=1"))["videos"] == 20


@pytest.mark.slow
def test_bad_commands(tmp_path):
    place = f"--bank={tmp_path / 'nowhere'}"
    assert "expected: one of: search" in bank("serch", place, fails=True)
    assert "no bank at" in bank("search", "a ball", place, fails=True)
    assert "which videos" in bank("build", place, fails=True)
    assert "stats takes no --where" in bank("stats", place, "--where=true", fails=True)
    assert "65535" in bank("serve", place, "--port=99999", fails=True)
