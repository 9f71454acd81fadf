"""The wheel: what it holds, and that its parts are found under the library's name."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("ditmem_jax", "configs", "convert", "experiments/tiny_wan/weights")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS = {"configs": "configs", "convert": "convert", "tiny_weights": "experiments/tiny_wan/weights"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools packs whatever an earlier build has left in build/."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(built)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = built.iterdir()
    return path


def test_it_has_one_name_and_is_small(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ditmem_jax"}
    assert wheel.stat().st_size < 25e6


def test_it_holds_every_file(wheel):
    """Code, weights, configurations and pages: everything in the repository's folders, and nothing else."""

    def tree(folder: Path, name: str) -> set[str]:
        files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {f"{name}/{path.relative_to(folder).as_posix()}" for path in files}

    expected = tree(ROOT / "ditmem_jax", "ditmem_jax")
    for name, folder in FOLDERS.items():
        expected |= tree(ROOT / folder, f"ditmem_jax/{name}")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("ditmem_jax/")}
    assert found == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkout_finds_them_by_the_same_names(name):
    code = f"import ditmem_jax.{name} as found; print(found.__file__)"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == ROOT / FOLDERS[name] / "__init__.py"


def test_no_module_is_loaded_under_two_names():
    code = (
        "import runpy, sys; sys.argv = ['convert', '--help']\n"
        "try: runpy.run_module('convert', run_name='__main__', alter_sys=True)\n"
        "except SystemExit: pass\n"
        "print([name for name in sys.modules if name.startswith('convert.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
