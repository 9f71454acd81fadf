"""The command `ditmem`: `ditmem COMMAND ...` is `python -m ditmem_jax.COMMAND ...`.

It imports only the command that is asked for.
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
EXAMPLES = """
    ditmem encode --table captions.csv --videos videos --out records
    ditmem bank build --bank bank --records records
    ditmem bank match records --bank bank --k 3
    ditmem train --config tiny --config.data.records=records --config.data.bank=bank
    ditmem sample --config tiny --config.data.bank=bank \\
        --encoder runs/tiny/encoder.safetensors --prompt "on planet Zorvex a ball drops"
"""


def main() -> None:
    """Run the command that the first argument names, with the others; exit with status 1 if there is no such one."""
    match sys.argv[1:]:
        case [] | ["-h" | "--help" | "help"]:
            print(usage())
        case ["--version"]:
            from importlib.metadata import version

            print(version("ditmem_jax"))
        case ["-h" | "--help" | "help", command, *rest]:
            _run(command, [*rest, "--help"])
        case [command, *rest]:
            _run(command, rest)


def _run(command: str, arguments: list[str]) -> None:
    if command not in COMMANDS:
        found = UserError(
            f"unknown command {command!r}",
            expected=f"one of: {nearest(command, COMMANDS, len(COMMANDS))}",
            fix="see ditmem --help",
        )
        sys.exit(f"error: {found}")
    sys.argv = [f"ditmem {command}", *arguments]
    runpy.run_module(f"ditmem_jax.{command}", run_name="__main__", alter_sys=True)


def usage() -> str:
    """Return the commands with a line on each, and the calls from videos to clips."""
    lines = [f"  {command:<9}{what}" for command, what in COMMANDS.items()]
    return "\n".join(
        (
            "usage: ditmem COMMAND [ARGUMENTS]\n",
            "Memory for frozen video diffusion transformers.\n",
            "Commands, each with a --help of its own:",
            *lines,
            "\nFrom videos to clips:",
            EXAMPLES.rstrip(),
            "\nditmem --version tells the version.",
        )
    )
