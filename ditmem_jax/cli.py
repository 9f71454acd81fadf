"""What every command line tool shares: `--debug`, errors in a few lines, and the `--config` flag."""

import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import config_flags

from ditmem_jax.config import Config, build
from ditmem_jax.errors import UserError

DEBUG = flags.DEFINE_bool("debug", False, "Show the Python traceback of an error.")


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines `--config FILE.py` with overrides such as `--config.optim.learning_rate=1e-4`."""
    return config_flags.DEFINE_config_file(
        "config", default, "Python file with get_config(); override a value with --config.part.name=value."
    )


def load_config(holder: flags.FlagHolder) -> Config:
    """The strict `Config` behind a `define_config` flag."""
    if holder.value is None:
        raise UserError("--config is missing", expected="a file such as configs/tiny.py")
    return build(Config, holder.value)


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main()`. A `UserError` ends the program with exit status 1 and no traceback."""
    for name in ("debug", "config"):
        if name in flags.FLAGS:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # listed by --help
    app.run(lambda _: _guarded(main), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    def parse():
        rest = app.parse_flags_with_usage(argv)[1:]
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}", fix="flags start with --; see --help")
        return argv[:1]

    try:
        return _guarded(parse)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if "--debug" in argv:
            raise
        sys.exit(f"error: the config and its overrides do not fit together: {error}")


def _guarded(action: Callable):
    try:
        return action()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(f"error: {error}")
