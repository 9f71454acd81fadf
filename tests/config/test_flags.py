"""Commands: help with an example, configs and their overrides, errors in a few lines without a traceback."""

import dataclasses
import inspect
import io
import runpy
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import pytest
from absl import app, flags
from absl.testing import flagsaver

import ditmem_jax.bank.__main__ as bank
from ditmem_jax.aot import compile as aot
from ditmem_jax.bank import matches
from ditmem_jax.bank.search import IVF_ABOVE
from ditmem_jax.cli import COMMANDS
from ditmem_jax.config import flags as cli
from ditmem_jax.config import help, schema, strict
from ditmem_jax.config.files import load_config
from ditmem_jax.convert.kinds import KINDS
from ditmem_jax.errors import UserError
from ditmem_jax.worlds.make import Split

ROOT = Path(__file__).parents[2]
HEAVY = {
    "jax",
    "flax",
    "pyarrow",
    "lancedb",
    "faiss",
    "grain",
    "scipy",
    "av",
    "gradio",
    "ray",
    "rich",
    "torch",
}
MODULES = (*(f"ditmem_jax.{command}" for command in COMMANDS), "convert")
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


@pytest.fixture
def line(monkeypatch, capsys):
    """A function that gives arguments to a command in this process; returns what it printed, or its error."""

    def given(module, *arguments):
        parsed = lambda main, argv, flags_parser: main(flags_parser(argv))  # noqa: E731
        monkeypatch.setattr(app, "run", parsed)
        monkeypatch.setattr(cli._CommandLine, "run", lambda self, rest: print(*self.find(rest)))
        monkeypatch.setattr("sys.argv", [module, *arguments])
        with flagsaver.flagsaver(), warnings.catch_warnings():  # removes the flags that the command defines
            warnings.simplefilter("ignore", RuntimeWarning)  # that a test has imported it before
            try:
                runpy.run_module(module, run_name="__main__")
            except SystemExit as error:
                return str(error)
        return capsys.readouterr().out

    return given


@pytest.mark.parametrize("module", MODULES)
def test_help_has_an_example_and_imports_no_network(module):
    script = f"import runpy, sys; sys.argv = [{module!r}, '--help']; runpy.run_module({module!r}, None, '__main__', True)"
    check = f"; found = {HEAVY} & sys.modules.keys(); assert not found, found"
    done = subprocess.run([sys.executable, "-c", script + check], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    name = module.removeprefix("ditmem_jax.")
    assert f"\n    ditmem {name}" in done.stdout
    assert ("\nConfiguration:\n  --config=TEXT" in done.stdout) == (name not in ("bank", "convert", "worlds"))
    assert ("\nCluster:\n  --engine=local|ray" in done.stdout) == (name == "encode")
    assert "\nDiagnostics:\n  --debug" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


@pytest.mark.parametrize("name", bank.COMMANDS)
def test_every_subcommand_has_help_with_an_example(line, name):
    page = line("ditmem_jax.bank", "--bank=b", name, "--help")
    assert page.startswith(f"usage: ditmem bank {name} ")
    assert f"\n    ditmem bank {name} " in page
    for flag in bank.COMMANDS[name].flags.split():
        assert f"\n  --{flag}" in page
    assert ("--queries" in page) == (name == "search")
    assert "--bank=TEXT" in page and "Must be given." in page


def test_help_config_tells_every_key(line):
    page = line("ditmem_jax.train", "--help_config")
    for _, part in help.parts_of(schema.Config):
        told = help.meanings(part)
        assert list(told) == [field.name for field in dataclasses.fields(part)]
        for name, (unit, meaning) in told.items():
            assert f"\n  {name}: " in page and f"  [{unit}]\n" * bool(unit) in page and meaning[:40] in page
    assert "learning_rate: float = 1e-05  [per update]\n      Size of an update" in page
    assert "\n  dim: int, must be given  [channels]\n" in page
    page = line("ditmem_jax.train", "--help_config", "--config=tiny", "--config.optim.b1", "0.8")
    assert "\n  b1: float = 0.8\n" in page and "\n  dim: int = 160  [channels]\n" in page


@pytest.mark.parametrize(
    "spelling", ["--config.mesh.fsdp=-1", "-config.mesh.fsdp=-1", "--config.mesh.fsdp -1"]
)
def test_an_override_has_a_sign_or_a_space(line, monkeypatch, spelling):
    taken = []
    monkeypatch.setattr(cli, "load_config", lambda config, overrides: taken.append((config, overrides)))
    line("ditmem_jax.train", "--help_config", "--config", "tiny", *spelling.split(), "--config.data.bank=a b")
    assert taken == [("tiny", ["mesh.fsdp=-1", "data.bank=a b"])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --confg=tiny", "unknown flag --confg\n  expected: one of: --config,"),
        (
            "train --learning_rate=1",
            "unknown flag --learning_rate\n  expected: one of: --config.optim.learning_rate,",
        ),
        ("train --data.recordz=x", "one of: --config.data.records,"),
        ("train --config.optim.learning_rate --warm", "fix:      --config.optim.learning_rate=VALUE"),
        ("bank serch --k=3", "unknown command 'serch'\n  expected: one of: search,"),
        ("bank serch --help", "unknown command 'serch'\n  expected: one of: search,"),
        ("bank", "COMMAND is missing"),
        ("bank --bank=b", "COMMAND is missing"),
        ("bank build", "--bank is missing"),
        ("bank build --bank=b --record=x", "one of: --records,"),
        (
            "bank stats --bank=b --where=true",
            "stats takes no --where\n  expected: --bank, --version, --json, --debug",
        ),
        ("bank show --bank=b", "ID is missing"),
        ("bank show a b --bank=b", "unexpected argument 'b'"),
        ("bank serve --bank=b --port=99999", "65535"),
        ("sample --memory=a --config=tiny --memory=b", "--memory is given 2 times"),
        ("sample --memory a --memory b", "--memory is given 2 times"),
        ("encode --out=a --csv=b --table=c", "--table is given 2 times"),
        ("worlds --out=a --split=trian", "<backbone|train|unseen>"),
    ],
)
def test_errors_name_what_is_wrong(line, arguments, message):
    command, *rest = arguments.split()
    error = line(f"ditmem_jax.{command}", *rest)
    assert error.startswith("error: ") and message in error
    assert "--help" in error or "VALUE" in error or "takes no" in error or "times" in error


def test_what_follows_two_dashes_is_no_flag(line):
    assert "('--help',)" in line("ditmem_jax.bank", "show", "--bank=b", "--", "--help").replace(
        "[", "("
    ).replace("]", ",)")


def test_flags_that_may_be_repeated_are(line):
    assert "Command" in line("ditmem_jax.encode", "--out=a", "--videos=b", "--videos=c")


def test_a_former_name_of_a_flag_is_read_with_a_warning(line, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        cli._CommandLine, "find", lambda self, rest: seen or seen.append(flags.FLAGS.table) or seen
    )
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    line("ditmem_jax.encode", "--out=a", "--csv=b")
    assert seen == ["b"] and sys.stderr.getvalue() == "warning: --csv is now --table\n"


def test_a_former_name_of_a_key_is_read_with_a_warning(config, monkeypatch):
    monkeypatch.setattr(strict, "RENAMED", {"config.optim.lr": "learning_rate"})
    with pytest.warns(FutureWarning, match=r"config\.optim\.lr is now config\.optim\.learning_rate"):
        assert load_config(config, ["optim.lr=1e-4"]).optim.learning_rate == 1e-4
    values = {"learning_rate": 1.0, "lr": 2.0}
    with pytest.warns(FutureWarning), pytest.raises(UserError, match="by its former name as well"):
        strict.build(schema.OptimConfig, values, "config.optim")


def test_choices_and_defaults_of_flags_are_those_of_the_library(line):
    """A command's flags do not import the library, since help would then be slow."""

    def page(command, *arguments):
        return line(f"ditmem_jax.{command}", *arguments, "--help")

    assert f"--program={'|'.join(aot.PROGRAMS)}" in page("aot").split()
    assert f"--split={'|'.join(typing.get_args(Split))}\n" in page("worlds")
    assert f"--kind={'|'.join(KINDS)}\n" in line("convert", "--help")
    assert f"(FAISS IVF). Default: {IVF_ABOVE}." in page("bank", "search")
    threshold = inspect.signature(matches.find).parameters["threshold"].default
    assert f"Default: {threshold}." in page("bank", "match")


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
        (["--prompt=x", "--config.sample.steps=0"], "sample.steps"),
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
