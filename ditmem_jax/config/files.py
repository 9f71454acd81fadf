"""A config, by the name of one that ships with the library or by file, with overrides: the strict `Config`."""

import ast
import json
import runpy
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ditmem_jax.config.schema import Config
from ditmem_jax.config.strict import build, current_key, to_dict
from ditmem_jax.errors import UserError, nearest


def load_config(config: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """Return the strict `Config` of a file, after overrides.

    Args:
        config: a file with `get_config()`, the config.json of a training run, or the name of a file in
            `ditmem_jax.configs`, such as "wan".
        overrides: values by name, such as `{"optim.learning_rate": 1e-4}`, or as the command line spells them, such
            as `["optim.learning_rate=1e-4"]`.
    Raises:
        UserError: if there is no such file, or it or an override does not fit `Config`.
    """
    path = find_config(config)
    values = to_dict(build(Config, _read_config(path) if path.suffix == ".json" else _run_config(path)))
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            part, key = _find(values, name, value)
            part[key] = value
    else:
        for name, _, text in (override.partition("=") for override in overrides):
            part, key = _find(values, name, text)
            part[key] = text if isinstance(part[key], str) else _literal(text)
    return build(Config, values)


def find_config(config: str | Path) -> Path:
    """Return the file of a config that is given as one or by name; a name means what ships with the library."""
    shipped = {path.stem: path for path in Path(str(files("ditmem_jax.configs"))).glob("[!_]*.py")}
    path = shipped.get(str(config), Path(config))
    if not path.is_file():
        names = nearest(path.stem, shipped)
        raise UserError(f"no config file {path}", expected=f"a file with get_config(), or one of: {names}")
    return path


def _run_config(path: Path) -> dict[str, Any] | ConfigDict:
    """Return what get_config() in the file returns."""
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


def _read_config(path: Path) -> Any:
    """Return what the config.json of a run holds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no config", expected="the config.json of a run", found=error) from error


def _find(values: dict[str, Any], name: str, value: Any) -> tuple[dict[str, Any], str]:
    """Return the part of the nested `values` that the dotted `name` is in, and its key there, to be set to `value`."""
    where, path = "config", name.split(".")
    for depth, part in enumerate(path, start=1):
        part = current_key(where, part)
        if part not in values:
            raise UserError(f"unknown config key {where}.{part}", expected=f"one of: {nearest(part, values)}")
        where += f".{part}"
        if isinstance(values[part], dict) != (depth < len(path)):
            raise UserError(
                f"{where} cannot be set to {value!r}",
                expected="--config.part.name=value",
                found=f"--config.{name}",
            )
        if depth < len(path):
            values = values[part]
    return values, part


def _literal(text: str) -> Any:
    """The value that `text` spells, as in Python or JSON; itself if it spells none."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last for very deep expressions
        return text
