"""The library's public names: what importing it costs, and that each is found and described."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ditmem_jax as dm

NAMES = [name for name in dm.__all__ if name != "__version__"]


def run(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, **options
    )


def test_importing_imports_nothing_else_and_writes_nothing(tmp_path):
    done = run(
        "import sys; import ditmem_jax as dm; print(dir(dm), dm.__doc__)\n"
        "heavy = {'absl', 'jax', 'flax', 'numpy', 'ml_collections', 'pyarrow', 'grain', 'lancedb', 'faiss'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "ours = {name for name in sys.modules if name.startswith('ditmem_jax.')}\n"
        "assert not ours, ours\n",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert all(repr(name) in done.stdout for name in dm.__all__)
    assert not list(tmp_path.iterdir())


def test_using_every_name_defines_no_flag_and_starts_no_device(tmp_path):
    done = run(
        "import ditmem_jax as dm\nfrom absl import flags\nbefore = set(flags.FLAGS)\n"
        "import jax, grain, orbax.checkpoint, ml_collections  # which define flags of their own\n"
        "others = set(flags.FLAGS)\n"
        "assert all(getattr(dm, name) for name in dm.__all__)\n"
        "assert set(flags.FLAGS) == others, set(flags.FLAGS) - others\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_its_own_and_has_a_docstring(name):
    value = getattr(dm, name)
    assert value.__name__ == name
    assert value.__module__.startswith("ditmem_jax.")
    assert inspect.getdoc(value)
    assert value is getattr(dm, name)


def test_the_version_is_that_of_the_package():
    about = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert dm.__version__ == about["project"]["version"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Encoder'") as error:
        dm.Encoder  # noqa: B018
    assert error.value.name == "Encoder"
    assert error.value.obj is dm
