"""What every command line tool shares: `--config` with overrides, `--debug`, and errors in a few lines."""

import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from ditmem_jax.config import Config, files
from ditmem_jax.errors import UserError


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Define `--config NAME` or `--config FILE.py` with overrides such as `--config.optim.learning_rate=1e-4`."""
    flags.DEFINE_multi_string("set", [], "PART.NAME=VALUE, what --config.PART.NAME=VALUE means.")
    return flags.DEFINE_string(
        "config",
        default,
        "Name of a config that ships with the library, such as tiny or wan, or a Python file with get_config(); "
        "override a value with --config.part.name=value.",
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


def define_processes() -> Callable[[], dict[str, Any]]:
    """Define `--coordinator`, `--processes` and `--process`, for a command that several processes run together.

    Returns:
        a function that gives the arguments of `parallel.processes.Program`.
    """
    coordinator = flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where Slurm, Open MPI or a TPU pod does not tell."
    )
    processes = flags.DEFINE_integer(
        "processes", None, "Number of processes; 1 for one that joins no others.", lower_bound=1
    )
    process = flags.DEFINE_integer("process", None, "Number of this process, from 0.", lower_bound=0)

    def given() -> dict[str, Any]:
        return {
            "coordinator": coordinator.value,
            "processes": processes.value,
            "process": process.value,
            "debug": flags.FLAGS.debug,
        }

    return given


def define_compile_cache() -> flags.FlagHolder:
    """Define `--compile_cache`, see `parallel.compilation.enable_cache`."""
    return flags.DEFINE_string(
        "compile_cache",
        None,
        "Folder of compiled programs, or 'off'. By default that of JAX_COMPILATION_CACHE_DIR, or "
        "ditmem_jax/xla in the user's folder of caches.",
    )


def load_config(holder: flags.FlagHolder) -> Config:
    """Return the strict `Config` of the file behind a `define_config` flag, with the command line's overrides."""
    if holder.value is None:
        raise UserError("--config is missing", expected="a name such as tiny, or a file")
    return files.load_config(holder.value, flags.FLAGS.set)


def run(main: Callable[..., None], arguments: str = "") -> None:
    """Parses the flags and runs `main`. A `UserError` ends the program with exit status 1 and no traceback.

    So do Ctrl-C, with the status 130 of shells, and a reader such as `head` that has seen enough.

    Args:
        arguments: names of what `main` takes from the command line beside flags, such as "SOURCE [DEST]"; those in
            brackets may be left out.
    """
    flags.DEFINE_bool("debug", False, "Show the Python traceback of an error.")
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
        if flags.FLAGS.debug:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's last flush fails again
        sys.exit(1)
