"""What every command line tool shares: `--config` with overrides, `--debug`, and errors in a few lines."""

import ast
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from ditmem_jax.config import Config, build, to_dict
from ditmem_jax.errors import UserError, nearest

DEBUG = flags.DEFINE_bool("debug", False, "Show the Python traceback of an error.")
OVERRIDES = flags.DEFINE_multi_string("set", [], "PART.NAME=VALUE, what --config.PART.NAME=VALUE means.")


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines `--config FILE.py` with overrides such as `--config.optim.learning_rate=1e-4`."""
    return flags.DEFINE_string(
        "config", default, "Python file with get_config(); override a value with --config.part.name=value."
    )


def define_cluster(what: str) -> Callable[[], tuple[str, int] | None]:
    """Defines `--engine`, `--address` and `--workers`, for a command that does `what` here or on a Ray cluster.

    Returns:
        what tells the cluster's address and the number of workers that the flags name, or None for this process.
    """
    engine = flags.DEFINE_enum(
        "engine", "local", ["local", "ray"], f"Who {what}: this process, or a Ray cluster."
    )
    address = flags.DEFINE_string("address", "", "Ray cluster; empty: all cores of this machine.")
    workers = flags.DEFINE_integer(
        "workers",
        0,
        "Ray workers that hold the networks; 0: one an accelerator, or one a machine.",
        lower_bound=0,
    )

    def cluster() -> tuple[str, int] | None:
        if engine.value == "ray":
            return address.value, workers.value
        if address.value or workers.value:
            raise UserError("--address and --workers are for --engine=ray", found="--engine=local")
        return None

    return cluster


def load_config(holder: flags.FlagHolder) -> Config:
    """The strict `Config` of the file behind a `define_config` flag, with the overrides of the command line."""
    if holder.value is None:
        raise UserError("--config is missing", expected="a file such as configs/tiny.py")
    return read_config(holder.value, OVERRIDES.value)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The strict `Config` of a file, after overrides such as "optim.learning_rate=1e-4".

    Raises:
        UserError: if there is no such file, or it or an override does not fit `Config`.
    """
    values = to_dict(build(Config, _run_config(Path(path))))
    for override in overrides:
        _override(values, *override.partition("=")[::2])
    return build(Config, values)


def run(main: Callable[..., None], arguments: str = "") -> None:
    """Parses the flags and runs `main`. A `UserError` ends the program with exit status 1 and no traceback.

    So do Ctrl-C, with the status 130 of shells, and a reader such as `head` that has seen enough.

    Args:
        arguments: names of what `main` takes from the command line beside flags, such as "SOURCE [DEST]"; those in
            brackets may be left out.
    """
    shared = ("debug", "config", "coordinator", "processes", "process", "compile_cache")
    for name in (*shared, "engine", "address", "workers"):
        if name in flags.FLAGS:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # listed by --help
    app.run(
        lambda rest: _guarded(main, rest[1:], arguments.split()),
        [re.sub(r"^--?config\.", "--set=", a) for a in sys.argv],
    )


def _guarded(main: Callable[..., None], given: list[str], names: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # else libraries tell of all that they do
    try:
        if len(given) > len(names):
            raise UserError(
                f"unexpected argument {given[len(names)]!r}", fix="flags start with --; see --help"
            )
        if missing := [name for name in names[len(given) :] if not name.startswith("[")]:
            raise UserError(f"{' '.join(missing)} is missing", expected=" ".join(names), fix="see --help")
        main(*given)
        sys.stdout.flush()
    except UserError as error:
        if DEBUG.value:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's last flush fails again
        sys.exit(1)


def _run_config(path: Path) -> dict[str, Any] | ConfigDict:
    """What get_config() in the file returns."""
    if not path.is_file():
        raise UserError(f"no config file {path}")
    try:
        module = runpy.run_path(str(path))
        if "get_config" not in module:
            raise UserError(f"{path} has no get_config()")
        values = module["get_config"]()
    except (SyntaxError, ImportError, NameError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not run", found=f"{type(error).__name__}: {error}") from error
    if not isinstance(values, (dict, ConfigDict)):
        raise UserError(
            f"get_config() of {path} returns no config", expected="a ConfigDict", found=repr(values)
        )
    return values


def _override(values: dict[str, Any], name: str, text: str) -> None:
    """Sets the value with the dotted `name` in the nested `values` to what `text` says."""
    where, path = "config", name.split(".")
    for depth, part in enumerate(path, start=1):
        if part not in values:
            raise UserError(f"unknown config key {where}.{part}", expected=f"one of: {nearest(part, values)}")
        where += f".{part}"
        if isinstance(values[part], dict) != (depth < len(path)):
            raise UserError(
                f"{where} cannot be set to {text!r}",
                expected="--config.part.name=value",
                found=f"--config.{name}",
            )
        if depth < len(path):
            values = values[part]
    values[part] = text if isinstance(values[part], str) else _literal(text)


def _literal(text: str) -> Any:
    """The value that `text` spells, as in Python or JSON; itself if it spells none."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError):
        return text
