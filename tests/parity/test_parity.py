"""Every golden file agrees with the released programs, through the same code as `python -m tests.parity`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.parity.__main__ import compare, line
from tests.parity.golden import Check

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_golden(path):
    kind, checks = compare(path)
    assert checks, f"nothing is compared for {kind}"
    failed = [f"{check.name}: {check.error:.1e} > {check.limit:.0e}" for check in checks if not check.ok]
    assert not failed


@pytest.mark.parametrize(
    "got", [np.full(3, np.nan), np.zeros(4), np.array([1, 1, 1.001])], ids=["nan", "shape", "value"]
)
def test_a_wrong_quantity_fails(got):
    assert not Check("x", got, np.ones(3)).ok


def test_a_line_fits_100_columns():
    text = line("a" * 60, "grad/" + "b" * 90, "1.2e-07", "1e-05", "FAIL")
    assert len(text) <= 100
    assert "…" in text


@pytest.mark.slow
def test_files_that_fail_are_named_and_the_others_still_compared(tmp_path):
    unknown, broken, wrong = (tmp_path / f"{name}.safetensors" for name in ("unknown", "broken", "wrong"))
    save_file({"something": np.zeros(3, np.float32)}, unknown)
    broken.write_bytes((GOLDEN / "schedule.safetensors").read_bytes()[:100])
    save_file({"train/sigmas": np.zeros(1000, np.float32)}, wrong, metadata={"shift": "5"})
    files = [unknown, broken, wrong, tmp_path / "absent.safetensors", GOLDEN / "schedule.safetensors"]
    result = subprocess.run(
        [sys.executable, "-m", "tests.parity", *files],
        check=False,
        capture_output=True,
        text=True,
        cwd=GOLDEN.parents[1],
    )
    assert result.returncode == 1
    for path in files[:-1]:
        assert f"FAIL {path}" in result.stdout or f"FAIL no such golden file: {path}" in result.stdout
    assert "train/weights" in result.stdout and "4 failed" in result.stdout
    assert "Traceback" not in result.stderr
