"""Help in 100 columns: the pages of `--help`, and every config key for `--help_config`."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

from ditmem_jax.config import schema

WIDTH = 100
COLUMN = 26  # where the text beside a flag begins


def command_page(
    usage: str, about: str, commands: Mapping[str, str], groups: Mapping[str, Iterable[flags.Flag]]
) -> str:
    """Return the help of a command.

    Args:
        usage: the command line in short.
        about: a docstring; its paragraphs are filled, examples of commands are indented.
        commands: a line about each subcommand.
        groups: flags by heading.
    """
    parts = [f"usage: {usage}", *map(_paragraph, inspect.cleandoc(about).split("\n\n"))]
    if commands:
        column = 4 + max(map(len, commands))
        lines = [_fill(what, f"  {name}".ljust(column), " " * column) for name, what in commands.items()]
        parts.append("\n".join(["Commands, each with a --help of its own:", *itertools.chain(*lines)]))
    for heading, members in groups.items():
        if lines := [line for flag in members for line in _flag(flag)]:
            parts.append("\n".join([f"{heading}:", *lines]))
    return "\n\n".join(parts)


def config_page(config: schema.Config | None = None) -> str:
    """Return every config key with its type, default, unit and meaning, part by part.

    Args:
        config: its values stand for the defaults; None is the defaults of the types.
    """
    parts = [
        "--config.PART.KEY=VALUE sets a key of a config, as it is written in Python: 1e-4, True, (1, 2, 2).\n"
        "Each key: its type = "
        + ("the default" if config is None else "the value in this config")
        + " [unit]"
    ]
    for part, cls in parts_of(schema.Config):
        values = None if config is None else getattr(config, part)
        if values is None or isinstance(values, cls):
            parts.append(_part(part, cls, values))
    return "\n\n".join(parts)


def parts_of(cls: type) -> list[tuple[str, type]]:
    """Return the name and the dataclass of each part of a config; a part of several kinds has several."""
    return [
        (name, kind)
        for name, hint in typing.get_type_hints(cls).items()
        for kind in typing.get_args(hint) or (hint,)
    ]


def config_keys() -> list[str]:
    """Return every config key as the command line spells it: config.PART.KEY."""
    keys = (
        f"config.{part}.{field.name}"
        for part, cls in parts_of(schema.Config)
        for field in dataclasses.fields(cls)
    )
    return list(dict.fromkeys(keys))  # kinds of one part share some


def meanings(cls: type) -> dict[str, tuple[str, str]]:
    """Return (unit, meaning) of the fields of a dataclass: the string below each, "[unit] Meaning.".

    Such a string is no attribute of anything: it is read from the source.
    """
    source = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = next(node.body for node in source.body if isinstance(node, ast.ClassDef))
    found = {}
    for field, below in itertools.pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                unit, meaning = re.fullmatch(r"(?:\[(.*?)\] )?(.*)", " ".join(text.split())).groups()
                found[name] = unit or "", meaning
    return found


def _part(name: str, cls: type, values: Any) -> str:
    about, told = inspect.cleandoc(cls.__doc__).split("\n\n")[0], meanings(cls)
    lines = [*_fill(f"{name}: {about}")]
    for field in dataclasses.fields(cls):
        unit, meaning = told[field.name]
        value = field.default if values is None else getattr(values, field.name)
        unit = f"  [{unit}]" if unit else ""
        lines += _fill(f"{field.name}: {_type(cls, field.name)}{_value(value)}{unit}", "  ", "      ")
        lines += _fill(meaning, "      ")
    return "\n".join(lines)


def _type(cls: type, name: str) -> str:
    hint = typing.get_type_hints(cls)[name]
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _value(value: Any) -> str:
    """Return "= VALUE", of a long tuple its beginning; nothing where a value must be given."""
    if value is dataclasses.MISSING:
        return ", must be given"
    if isinstance(value, tuple) and len(value) > 6:
        return f" = ({', '.join(map(repr, value[:3]))}, ... {len(value)} numbers)"
    return f" = {value!r}"


def _flag(flag: flags.Flag) -> list[str]:
    """Return the lines of a flag: how it is given, what it means, and its default."""
    text = re.sub(r"^<.*?>: ", "", flag.help or "").split(";\n")[0]  # absl's own ways to tell kinds of flags
    text = text.removesuffix("(a comma separated list)").rstrip()
    if is_required(flag):
        text += " Must be given."
    elif flag.default is not False and flag.default not in (None, "", []):
        text += f" Default: {_default(flag)}."
    given = _spelling(flag)
    indent = " " * COLUMN
    if len(given) + 4 > COLUMN:
        return [f"  {given}", *_fill(text, indent)]
    return _fill(text, f"  {given}".ljust(COLUMN), indent)


def _spelling(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"--{'no' if flag.default else ''}{flag.name}"
    values = getattr(flag.parser, "enum_values", None)
    kind = {"int": "INTEGER", "float": "NUMBER"}.get(flag.flag_type().removeprefix("multi "), "TEXT")
    return f"--{flag.name}={'|'.join(values) if values else kind}"


def _default(flag: flags.Flag) -> str:
    return ",".join(map(str, flag.default)) if isinstance(flag.default, list) else str(flag.default)


def is_required(flag: flags.Flag) -> bool:
    """Return True if the flag must be given: a validator takes anything but None."""
    return flag.default is None and not all(validator.checker(None) for validator in flag.validators)


def _paragraph(text: str) -> str:
    if re.match(r"\s*(ditmem|python -m) ", text):  # how it is indented, Python 3.13 does not tell
        return textwrap.indent(textwrap.dedent(text), "    ")
    return "\n".join(_fill(text))


def _fill(text: str, first: str = "", rest: str | None = None) -> list[str]:
    rest = first if rest is None else rest
    options = dict(break_long_words=False, break_on_hyphens=False)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, **options)
