"""Everything before the first step, in one process; for many see test_distributed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import FAST_COMPILATION
from tests.sample.test_sampler import write_encoder
from tests.tiny import make_tiny, replace, write_config

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept():
    program = """
import resource
from ditmem_jax.parallel.compilation import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)  # allocated, written and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
keep_freed_memory()
faults()
print(returned, faults())
"""
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    )
    returned, kept = map(int, result.stdout.split())
    assert kept < returned / 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags", "programs"),
    [
        ("train", [], ("jit_train_step", "jit_with_memory", "jit_over_levels")),
        ("sample", ["--prompt=A ball falls"], ("jit_step", "jit__mix", "jit_decode_program")),
    ],
)
def test_what_is_warm_is_not_compiled_again(command, flags, programs, tmp_path):
    config = replace(make_tiny(tmp_path / "tiny"), "run", steps=1, out=str(tmp_path / "run"))
    file, cache = write_config(tmp_path / "config.py", config), tmp_path / "cache"
    flags = [f"--config={file}", f"--compile_cache={cache}", *flags]
    if command == "sample":
        write_encoder(tmp_path / "encoder.safetensors", config.memory)
        flags += [f"--encoder={tmp_path / 'encoder.safetensors'}", f"--out={tmp_path}"]
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILATION}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def run(*more):
        """The output, and the large programs in the cache afterwards."""
        done = subprocess.run(
            [sys.executable, "-m", f"ditmem_jax.{command}", *flags, *more],
            cwd=ROOT, env=environment, text=True, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        kept = {path.name for path in cache.iterdir() if path.name.startswith(programs)}
        return done.stdout, {name for name in kept if name.endswith("-cache")}

    printed, warm = run("--warm")
    assert "all is compiled" in printed and not list(tmp_path.glob("*.mp4"))
    assert {name.split("-")[0] for name in warm} == set(programs)
    printed, kept = run()
    assert kept == warm and "first step after" in printed
