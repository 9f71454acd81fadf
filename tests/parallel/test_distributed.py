"""Two processes over jax.distributed: the losses of one, checkpoints for any mesh, and what becomes of the other when one is killed."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ditmem_jax.data.video import read_video
from ditmem_jax.models.state import split
from ditmem_jax.storage.encoders import load_encoder
from tests import FAST_COMPILATION
from tests.tiny import make_tiny, replace, write_config

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 24, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the config `tiny.py`, and `whole`: a run of one process with four devices, saved half-way."""
    folder = tmp_path_factory.mktemp("distributed")
    config = replace(make_tiny(folder / "tiny"), "data", validation="", batch_size=4)
    config = replace(config, "run", steps=STEPS, log_every=1, save_every=SAVED, keep=STEPS)
    config = replace(config, "optim", learning_rate=1e-4)
    write_config(folder / "tiny.py", config)
    assert finish(start(folder, "whole", [4], "data=2", "fsdp=2"))[0].startswith("frozen 80,416")
    return folder


def start(folder, out, devices, *mesh, **options):
    """`ditmem_jax.train` on processes with these numbers of devices."""
    flags = [f"--config.run.out={folder / out}"]
    flags += [f"--config.run.{name}={value}" for name, value in options.items()]
    return launch(folder, "train", out, devices, *mesh, flags=flags)


def launch(folder, module, out, devices, *mesh, flags):
    """A process of a command for each number of `devices`, together one program."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", f"ditmem_jax.{module}", f"--config={folder / 'tiny.py'}", *flags]
    command += [f"--config.mesh.{axis}" for axis in mesh]
    command += [f"--processes={len(devices)}", f"--coordinator=localhost:{port}"]
    processes = []
    for number, count in enumerate(devices):
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count} {FAST_COMPILATION}"
        files = [open(folder / f"{out}.{number}.{name}", "w+") for name in ("out", "err")]  # noqa: SIM115
        process = subprocess.Popen(
            [*command, f"--process={number}"], cwd=ROOT, env=environment, stdout=files[0], stderr=files[1]
        )
        process.texts = [Path(file.name) for file in files]
        processes.append(process)
    return processes


def finish(processes):
    """The output of each process, without that of the collectives."""
    for process in processes:
        assert process.wait(timeout=900) == 0, process.texts[1].read_text()
    lines = [process.texts[0].read_text().splitlines(keepends=True) for process in processes]
    return ["".join(line for line in part if not line.startswith("[Gloo]")) for part in lines]


def continued(folder, out):
    """A copy of the run `whole` as it was half-way."""
    shutil.copytree(folder / "whole", folder / out)
    shutil.rmtree(folder / out / "checkpoints" / str(STEPS))
    return folder / out


def losses(run):
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    return [float(row["loss"]) for row in rows]


def assert_same_run(run, other):
    np.testing.assert_allclose(losses(run), losses(other), rtol=1e-5)
    ours, theirs = (split(load_encoder(each / "encoder.safetensors"))[1] for each in (run, other))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)


@pytest.mark.slow
def test_two_processes_continue_what_one_began_and_end_when_one_is_killed(folder):
    run = continued(folder, "two")
    for victim, after in ((1, SAVED + 1), (0, SAVED + 3)):
        processes = start(folder, "two", [2, 2], "data=2", "context=2", save_every=1)
        while not (run / "checkpoints" / str(after)).exists():
            assert all(process.poll() is None for process in processes), processes[0].texts[1].read_text()
            time.sleep(0.002)
        processes[victim].send_signal(signal.SIGKILL)
        other = processes[1 - victim]
        assert other.wait(timeout=60) == 1
        *_, error, fix = other.texts[1].read_text().strip().splitlines()
        assert "the same command continues" in fix
        assert "another process" in error + fix
        processes[victim].wait()
    first, second = finish(start(folder, "two", [2, 2], "data=1", "context=4"))
    assert "first step after" in first and "the encoder is in" in first
    assert second == ""  # only one process tells
    assert_same_run(run, folder / "whole")


@pytest.mark.slow
def test_one_device_continues_what_four_began(folder):
    run = continued(folder, "one")
    finish(start(folder, "one", [1]))
    assert_same_run(run, folder / "whole")


@pytest.mark.slow
def test_two_processes_make_the_clips_of_one(folder):
    """Three clips by two at once, so that the last is alone; each is written by one process only."""
    flags = [
        "--prompt=a ball falls",
        f"--encoder={folder / 'whole' / 'encoder.safetensors'}",
        "--count=3",
        "--config.sample.steps=2",
    ]
    clips = []
    for out, devices in (("one_process", [4]), ("two_processes", [2, 2])):
        given = [*flags, f"--out={folder / out}"]
        told, *others = finish(launch(folder, "sample", out, devices, "data=2", "context=2", flags=given))
        assert "first step after" in told and not any(others)
        clips.append([read_video(path).frames.astype(int) for path in sorted((folder / out).glob("*.mp4"))])
    assert len(clips[0]) == len(clips[1]) == 3
    for one, two in zip(*clips, strict=True):
        assert (
            np.abs(one - two).mean() < 0.1
        )  # other programs round otherwise, and the codec makes more of it
    assert np.abs(clips[0][0] - clips[0][1]).mean() > 1
