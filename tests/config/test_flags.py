"""Commands: help with an example, configs and their overrides, errors in a few lines without a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from ditmem_jax.config.files import load_config
from ditmem_jax.errors import UserError

ROOT = Path(__file__).parents[2]
COMMANDS = (
    *("ditmem_jax.encode", "ditmem_jax.train", "ditmem_jax.sample", "ditmem_jax.aot", "ditmem_jax.worlds"),
    "convert",
)
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "dit": {"dim": 48, "ffn_dim": 96, "num_heads": 4, "num_layers": 2},
        "memory": {"dim": 48, "num_heads": 4},
        "sample": {"steps": 3},
        "optim": {"learning_rate": 0.1},
    })
"""


def run(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], check=False, capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize("module", COMMANDS)
def test_help_has_an_example(module):
    result = run(module, "--help")
    assert f"python -m {module} --" in result.stdout
    assert "debug" in result.stdout
    assert ("--engine" in result.stdout) == (module in ("ditmem_jax.bank", "ditmem_jax.encode"))
    assert "Traceback" not in result.stderr


def test_overrides_of_every_type(config):
    overrides = ["optim.learning_rate=1e-4", "memory.tokens=(1, 3, 6)", "run.validation_sigmas=[0.5]"]
    overrides += ["data.records=123", "data.cache=true", "sample.steps=3", "sample.steps=7"]
    got = load_config(config, overrides)
    assert got.optim.learning_rate == 1e-4
    assert got.memory.tokens == (1, 3, 6)
    assert got.run.validation_sigmas == (0.5,)
    assert (got.data.records, got.data.cache) == ("123", True)
    assert got.sample.steps == 7
    assert got.dit.num_layers == 2


def test_overrides_by_value(config):
    got = load_config(config, {"memory.tokens": [1, 3, 6], "data.records": "123", "optim.learning_rate": 1})
    assert got.memory.tokens == (1, 3, 6)
    assert got.data.records == "123"
    assert got.optim.learning_rate == 1.0
    for override in (
        {"sample.steps": "3"},
        {"data.records": 123},
        {"sample": {"steps": 3}},
        {"sample.step": 3},
    ):
        with pytest.raises(UserError, match=next(iter(override)).partition(".")[0]):
            load_config(config, override)


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("optm.x=1", ["unknown config key config.optm", "one of: optim"]),
        ("sample.stepz=1", ["unknown config key config.sample.stepz", "one of: steps"]),
        ("sample.steps=many", ["config.sample.steps has the wrong type", "'many'"]),
        ("sample.steps=0", ["sample.steps", "at least 1"]),
        ("sample=1", ["config.sample cannot be set to '1'"]),
        ("sample.steps.x=1", ["config.sample.steps cannot be set to '1'"]),
        ("sample.steps", ["config.sample.steps has the wrong type"]),
    ],
)
def test_bad_overrides(config, override, messages):
    with pytest.raises(UserError) as error:
        load_config(config, [override])
    assert all(message in str(error.value) for message in messages)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "SyntaxError"),
        ("x = 1", r"has no get_config\(\)"),
        ("import nothing_here", "nothing_here"),
        ("def get_config(): return {}['dit']", "KeyError"),
        ("def get_config(): pass", "returns no config"),
        ("def get_config(): return {'dot': {}}", "one of: dit"),
    ],
)
def test_bad_config_files(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_no_config_file(tmp_path):
    with pytest.raises(UserError, match=r"no config file .*absent\.py"):
        load_config(tmp_path / "absent.py")


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs").glob("wan*.py")])
def test_a_name_is_the_file_that_ships(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # such as a folder of weights
    assert load_config(name) == load_config(ROOT / "configs" / f"{name}.py")


@pytest.mark.parametrize(("given", "nearest"), [("wan_15b", "wan_14b"), ("configs/tiny2.py", "tiny")])
def test_a_wrong_name_names_the_nearest(given, nearest):
    with pytest.raises(UserError, match=f"no config file {given}\n.*one of: {nearest}"):
        load_config(given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=x", "--config.optm.x=1"], "one of: optim"),
        (["--prompt=x", "more"], "unexpected argument 'more'"),
        (["--prompt= "], "the prompt is missing or empty"),
    ],
    ids=["override", "argument", "value"],
)
def test_errors_are_a_few_lines_without_a_traceback(config, arguments, message):
    result = run("ditmem_jax.sample", f"--config={config}", *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 4


def test_debug_shows_the_traceback():
    result = run("ditmem_jax.sample", "--prompt=x", "--debug")
    assert result.returncode != 0
    assert "Traceback" in result.stderr
    assert "--config is missing" in result.stderr
