"""`python -m convert` as one types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.numpy

from tests.convert.test_sources import random_text

ROOT = Path(__file__).parents[2]


INTERRUPTED = """
import runpy
from ditmem_jax.convert import folder
def blocks(*_):
    raise KeyboardInterrupt
folder.blocks = blocks
runpy.run_module("convert", run_name="__main__", alter_sys=True)
"""


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def source(tmp_path):
    safetensors.numpy.save_file(random_text(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.slow
def test_look_convert_and_verify(source, tmp_path):
    listed = run("--list", source)
    assert listed.returncode == 0, listed.stderr
    assert (
        "blocks.1.ffn.fc1.weight [16, 8] -> text.blocks.feed_forward.fc1.kernel[1] (linear)" in listed.stdout
    )
    assert len(listed.stdout.splitlines()) == len(random_text())

    planned = run("--dry-run", source, tmp_path / "dest")
    assert planned.returncode == 0 and "nothing was written" in planned.stdout
    assert not (tmp_path / "dest").exists()

    done = run(source, tmp_path / "dest", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert "text: " in done.stdout and "original names -> bfloat16" in done.stdout
    assert "tokenizer.json" in done.stdout

    right = run("--verify", source, tmp_path / "dest")
    assert right.returncode == 0 and f"{len(random_text())} tensors agree" in right.stdout
    safetensors.numpy.save_file(random_text(seed=1), source)
    wrong = run("--verify", source, tmp_path / "dest")
    assert wrong.returncode == 1 and "norm.weight: norm.scale holds other values" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SOURCE is missing"),
        (["{source}"], "DEST is missing"),
        (["{source}", "{folder}/dest", "more"], "unexpected argument 'more'"),
        (["{folder}/nowhere", "{folder}/dest"], "no such file or folder"),
        (["{source}", "{folder}/dest", "--kind=vae"], "holds no vae"),
        (["{source}", "{folder}"], "is no folder of converted weights"),
        (["--verify", "{source}", "{folder}/dest"], "is no folder of converted weights"),
        (["--export=dit-mem", "{source}", "{folder}/dest"], "is no memory encoder"),
        (["--export=original", "{folder}", "{folder}/dest"], "is no folder of converted weights"),
        (["{source}", "{folder}/dest", "--prefix=dit_mem."], "has no network under --prefix=dit_mem."),
        (["--list", "--export=original", "{source}"], "--list has no use for --export=original"),
        (
            ["--dry-run", "--export=original", "{source}", "{folder}/dest"],
            "--dry-run has no use for --export=original",
        ),
        (
            ["--export=diffusers", "--kind=dit", "--dtype=float32", "--verify", "{source}", "{folder}/dest"],
            "--verify has no use for --export=diffusers",
        ),
        (
            ["--export=diffusers", "--kind=dit", "--dtype=float32", "{source}", "{folder}/dest"],
            "--export=diffusers has no use for --kind, --dtype",
        ),
    ],
)
def test_errors_are_a_few_lines_without_a_traceback(source, tmp_path, arguments, message):
    result = run(*(text.format(source=source, folder=tmp_path) for text in arguments))
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {source.name}


def test_an_interruption_leaves_nothing_behind(source, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, source, tmp_path / "dest"]
    result = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 130
    assert "interrupted" in result.stderr and "Traceback" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {source.name}


def test_a_reader_that_has_seen_enough(source):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "convert", "--list", str(source)]
    result = subprocess.run(command, check=False, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")
