"""The command `ditmem`: `ditmem COMMAND ...` is `python -m ditmem_jax.COMMAND ...`.

Nothing but the command that is asked for is imported, so `ditmem --help` takes no longer than Python itself.
"""

import runpy
import sys

from ditmem_jax.errors import UserError, nearest

COMMANDS = {
    "demo": "make worlds, train on some, make clips of others with and without memory, and report",
    "worlds": "write clips of made-up worlds whose laws are known",
    "encode": "turn videos and captions into records",
    "bank": "build, search, change and show a bank of reference videos",
    "train": "train a memory encoder against a frozen transformer",
    "sample": "make clips with and without memory",
    "convert": "bring weights in from original names or those of diffusers, and out again",
    "aot": "tell whether a configuration fits TPUs that are not there, and how fast it can be",
}


def main() -> None:
    """Run the command that the first argument names, with the others; exit with status 1 if there is no such one."""
    match sys.argv[1:]:
        case [] | ["-h" | "--help" | "help", *_]:
            print(usage())
        case ["--version"]:
            from importlib.metadata import version

            print(version("ditmem_jax"))
        case [command, *rest] if command in COMMANDS:
            sys.argv = [f"ditmem {command}", *rest]
            runpy.run_module(f"ditmem_jax.{command}", run_name="__main__", alter_sys=True)
        case [command, *_]:
            found = UserError(
                f"no command {command!r}",
                expected=f"one of: {nearest(command, COMMANDS)}",
                fix="ditmem --help",
            )
            sys.exit(f"error: {found}")


def usage() -> str:
    """Return the commands with a line on each."""
    lines = [f"  {command:<9}{what}" for command, what in COMMANDS.items()]
    return "\n".join(
        (
            "Memory for frozen video diffusion transformers.\n",
            "ditmem COMMAND [ARGUMENTS]; ditmem COMMAND --help tells its arguments.\n",
            *lines,
            "\nditmem --version tells the version.",
        )
    )
