"""The command `ditmem`: it finds the commands, and imports nothing else."""

import importlib.util
import subprocess
import sys

import pytest

from ditmem_jax.cli import COMMANDS

SCRIPT = "import sys; from ditmem_jax.cli import main; sys.argv[0] = 'ditmem'; main()"


def ditmem(*arguments, script=SCRIPT, **options):
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("help",)])
def test_help_names_every_command_and_imports_nothing(arguments):
    check = "; assert not {'jax', 'numpy', 'absl'} & sys.modules.keys(), sys.modules.keys()"
    done = ditmem(*arguments, script=SCRIPT + check)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command):
    assert importlib.util.find_spec(f"ditmem_jax.{command}.__main__")


def test_a_command_gets_its_arguments(tmp_path):
    done = ditmem("worlds", f"--out={tmp_path / 'out'}", "--plants=3", cwd=tmp_path)
    assert (
        done.returncode == 1 and "unknown flag --plants\n  expected: one of: --split, --clips" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_wrong_command_names_the_nearest():
    done = ditmem("trian", "--config=wan")
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown command 'trian'\n  expected: one of: train, ")


@pytest.mark.slow
def test_training_without_weights_tells_how_to_get_them_from_any_folder(tmp_path):
    done = ditmem("train", "--config=wan", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "no weights in 'weights/wan2.1-t2v-1.3b'" in done.stderr
    download = "hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir Wan2.1-T2V-1.3B"
    assert f"{download} && ditmem convert Wan2.1-T2V-1.3B weights/wan2.1-t2v-1.3b" in done.stderr
    assert not list(tmp_path.iterdir())
