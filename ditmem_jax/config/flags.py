"""Flags and help that all commands share: `--config` with overrides, `--debug`, errors in a few lines.

A `__main__.py` imports only this module and absl at its top, and what it works with inside of its functions: `--help`
then imports no jax. The help of a command is the docstring of its module, with an example, and its flags in groups;
that of a subcommand is the docstring of a function, see `Command`.
"""

import difflib
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from absl import app, flags, logging

from ditmem_jax.config import help as pages
from ditmem_jax.config.files import load_config
from ditmem_jax.config.schema import Config
from ditmem_jax.errors import UserError, nearest

RENAMED = {"csv": "table"}
"""Former names of flags, each read with a warning for one version; CHANGELOG.md lists them."""

GROUPS = {
    "Configuration": ("config", "help_config", "compile_cache"),
    "Several processes": ("coordinator", "processes", "process"),
    "Cluster": ("engine", "address", "workers"),
    "Diagnostics": ("debug",),
}
"""Flags of this module by the heading of their help. `set` is not shown: it is how absl gets `--config.KEY=VALUE`."""


@dataclass(frozen=True)
class Command:
    """A function with the arguments and flags that it takes from the command line.

    Args:
        main: its docstring is the help of a subcommand, and the first line of that stands in the list of subcommands.
        arguments: names of what it takes beside flags, such as "SOURCE [DEST]"; those in brackets may be left out.
        flags: names of the flags that a subcommand takes, beside those that no subcommand names, which all take.
    """

    main: Callable[..., None]
    arguments: str = ""
    flags: str = ""

    @property
    def flag_names(self) -> list[str]:
        """Names of the flags, with those that come with --config."""
        names = self.flags.split()
        return [*names, "set", "help_config"] if "config" in names else names


def define_config(default: str | None = None) -> Callable[[], Config]:
    """Define `--config NAME` or `--config FILE.py` with overrides such as `--config.optim.learning_rate=1e-4`.

    Returns:
        a function that loads the config with the overrides, or raises a UserError.
    """
    flags.DEFINE_multi_string("set", [], "PART.NAME=VALUE, what --config.PART.NAME=VALUE means.")
    flags.DEFINE_bool(
        "help_config", False, "Print every config key with its type, default, unit and meaning."
    )
    config = flags.DEFINE_string(
        "config",
        default,
        "Name of a config that ships with the library, such as tiny or wan, or a Python file with get_config(). "
        "--config.PART.KEY=VALUE overrides a value; of several for one key the last counts.",
    )

    def given() -> Config:
        if config.value is None:
            raise UserError("--config is missing", expected="a name such as tiny, or a file")
        return load_config(config.value, flags.FLAGS.set)

    return given


def define_cluster(what: str) -> Callable[[], tuple[str, int] | None]:
    """Define `--engine`, `--address` and `--workers`, for a command that does `what` here or on a Ray cluster.

    Returns:
        a function that gives the address of the cluster and the number of workers, or None for this process.
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


def run(main: Callable[..., None] | Mapping[str, Command], arguments: str = "") -> None:
    """Parse the flags and run `main`. A `UserError` ends the program with exit status 1 and no traceback.

    So do Ctrl-C, with the status 130 of shells, and a reader such as `head` that has seen enough.

    Args:
        main: a function of the command's module, or of subcommands by name. The docstring of the module is the help.
        arguments: what the function takes beside flags, see `Command`.
    """
    flags.DEFINE_bool("debug", False, "Show the Python traceback of an error.")
    line = _CommandLine(main, arguments)
    try:
        argv = _for_absl(sys.argv)
        asked = argv[: argv.index("--")] if "--" in argv else argv
        if any(re.fullmatch(r"-h|--?help(short|full)?", argument) for argument in asked):
            print(line.help(asked[1:]), flush=True)
        elif "help_config" in flags.FLAGS and any(re.fullmatch(r"--?help_config", each) for each in asked):
            print(line.help_config(argv), flush=True)
        else:
            app.run(lambda rest: line.run(rest[1:]), argv, flags_parser=line.parse)
    except UserError as error:
        if flags.FLAGS["debug"].value:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's last flush fails again
        sys.exit(1)


def _for_absl(argv: Sequence[str]) -> list[str]:
    """Return `argv` with former names of flags replaced, and overrides of the config as a flag that absl can parse.

    `--config.KEY=VALUE` and `--config.KEY VALUE` become `--set=KEY=VALUE`.
    """
    given, rest = [], iter(argv)
    for argument in rest:
        if argument == "--":
            return [*given, argument, *rest]
        name, equals, value = argument.lstrip("-").partition("=")
        if re.match(r"--?config\.", argument):
            if not equals:
                value = next(rest, "--")
                if value.startswith("--"):
                    raise UserError(f"{argument} has no value", fix=f"{argument}=VALUE")
            argument = f"--set={name.removeprefix('config.')}={value}"
        elif argument.startswith("-") and name not in flags.FLAGS and RENAMED.get(name, "") in flags.FLAGS:
            print(f"warning: --{name} is now --{RENAMED[name]}", file=sys.stderr)
            argument = f"--{RENAMED[name]}{equals}{value}"
        given.append(argument)
    return given


class _CommandLine:
    """Parser and help of one command and its subcommands; see `run`."""

    def __init__(self, main: Callable[..., None] | Mapping[str, Command], arguments: str):
        self.commands = main if isinstance(main, Mapping) else {}
        action = next(iter(main.values())).main if isinstance(main, Mapping) else main
        self.whole = Command(action, "COMMAND [ARGUMENT]" if self.commands else arguments)
        self.about, spec = (inspect.unwrap(action).__globals__[name] for name in ("__doc__", "__spec__"))
        name = spec.name.removesuffix(".__main__") if spec else sys.argv[0]
        ours = name.startswith("ditmem_jax.")
        self.program = name.replace("ditmem_jax.", "ditmem ") if ours else f"python -m {name}"

    def run(self, given: Sequence[str]) -> None:
        """Run the command, or the subcommand that the first of the arguments beside flags names."""
        command, given = self.find(given)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # else libraries tell of all that they do
        command.main(*given)
        sys.stdout.flush()

    def find(self, given: Sequence[str]) -> tuple[Command, Sequence[str]]:
        """Return the command that the arguments beside flags name, and its own arguments.

        Raises:
            UserError: for an unknown subcommand, a flag that it does not take, and too few or too many arguments.
        """
        command = self.whole
        if self.commands:
            name, given = (given[0], given[1:]) if given else (None, given)
            command = self._command(name)
            takes = self._flags(command)
            if ignored := [flag.name for flag in self._flags() if flag.present and flag not in takes]:
                expected = ", ".join(f"--{flag.name}" for flag in takes)
                raise UserError(f"{name} takes no --{ignored[0]}", expected=expected)
        names = command.arguments.split()
        if len(given) > len(names):
            raise UserError(
                f"unexpected argument {given[len(names)]!r}", fix=f"flags start with --; {self._see_help()}"
            )
        if missing := [name for name in names[len(given) :] if not name.startswith("[")]:
            raise UserError(f"{' '.join(missing)} is missing", expected=" ".join(names), fix=self._see_help())
        return command, given

    def parse(self, argv: list[str]) -> list[str]:
        """Return what remains of `argv` beside flags, as absl does.

        Raises:
            UserError: for an unknown flag, with the nearest; a missing one; a value that does not fit; one flag twice.
        """
        first = argv[1] if len(argv) > 1 else None
        if self.commands and not (first or "").startswith("-"):
            self._command(first)  # before flags that must be given are missed
        try:
            rest = flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            raise self._unknown(error.flagname) from error
        except flags.Error as error:
            for flag in self._flags() if flags.FLAGS.is_parsed() else ():
                if flag.value is None and pages.is_required(flag):
                    raise UserError(
                        f"--{flag.name} is missing", expected=flag.help, fix=self._see_help()
                    ) from error
            raise UserError(str(error), fix=self._see_help()) from error
        for flag in self._flags():
            if flag.present > 1 and not isinstance(flag, flags.MultiFlag):
                raise UserError(f"--{flag.name} is given {flag.present} times", expected="once")
        return rest

    def help(self, given: Sequence[str]) -> str:
        """Return the page of the command, or of the subcommand that `given` names."""
        command, program, about, subcommands = self.whole, self.program, self.about, self.commands
        wrong = [word for word in given[:1] if not word.startswith("-")]
        if self.commands and (named := [word for word in given if word in self.commands] or wrong):
            name = named[0]
            command, subcommands = self._command(name), {}
            program, about = f"{program} {name}", command.main.__doc__
        usage = " ".join(filter(None, (program, command.arguments, "[FLAGS]")))
        listed = {name: each.main.__doc__.partition("\n")[0] for name, each in subcommands.items()}
        shared = {name: heading for heading, names in GROUPS.items() for name in names} | {"set": None}
        groups = {"Flags": []} | {heading: [] for heading in GROUPS}
        for flag in self._flags(command):
            if (heading := shared.get(flag.name, "Flags")) is not None:
                groups[heading].append(flag)
        return pages.command_page(usage, about, listed, groups)

    def help_config(self, argv: list[str]) -> str:
        """Return the page of config keys, with the values of the config that is named if one is."""
        for flag in self._flags():
            flag.validators.clear()  # what else must be given may be left out here
        self.parse(argv)
        named = flags.FLAGS["config"]
        return pages.config_page(load_config(named.value, flags.FLAGS.set) if named.present else None)

    def _flags(self, command: Command | None = None) -> list[flags.Flag]:
        """Return the flags of the command, or those that one of its subcommands takes."""
        ours = [flag.name for flag in flags.FLAGS.get_flags_for_module(sys.argv[0])]
        ours += [name for names in (("set",), *GROUPS.values()) for name in names if name in flags.FLAGS]
        if command:
            others = {name for each in self.commands.values() for name in each.flag_names}
            ours = [name for name in ours if name in command.flag_names or name not in others]
        return [flags.FLAGS[name] for name in ours]

    def _command(self, name: str | None) -> Command:
        if name not in self.commands:
            what = "COMMAND is missing" if name is None else f"unknown command {name!r}"
            known = nearest(name or "", self.commands, len(self.commands))
            raise UserError(what, expected=f"one of: {known}", fix=self._see_help())
        return self.commands[name]

    def _see_help(self) -> str:
        return f"see {self.program} --help"

    def _unknown(self, name: str) -> UserError:
        """Return the error of an unknown flag, with the nearest flags, and a config key where one is near."""
        parts = 1 + name.count(".")

        def tail(flag: str) -> str:
            return ".".join(flag.split(".")[-parts:])

        known = [flag.name for flag in self._flags()]
        if "config" in flags.FLAGS and not difflib.get_close_matches(name, known, cutoff=0.8):
            keys = pages.config_keys()
            near = difflib.get_close_matches(name, map(tail, keys), cutoff=0.8)
            known += [key for key in keys if tail(key) in near]
        found = nearest(name, known, by=tail).replace(", ", ", --")
        return UserError(f"unknown flag --{name}", expected=f"one of: --{found}", fix=self._see_help())
