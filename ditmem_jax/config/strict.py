"""Dataclasses from mappings, strictly: unknown keys, missing ones and values of another type are errors."""

import dataclasses
import json
import types
import typing
import warnings
from typing import Any, Literal

from ditmem_jax.errors import UserError, nearest

RENAMED: dict[str, str] = {}
"""Former keys by their paths, such as {"config.optim.lr": "learning_rate"}: read with a warning for one version."""


def build(cls: type | types.UnionType, values: Any, where: str = "config") -> Any:
    """Builds the dataclass `cls` from a mapping (a ConfigDict or parsed JSON), strictly.

    Of a union of dataclasses with a field `kind`, each a `Literal` of its own, the value of `kind` names the one that
    is built; without it that is the first.

    Raises:
        UserError: for a key that `cls` does not have (the nearest names are listed), a missing one, or a
            value of another type.
    """
    if not hasattr(values, "keys"):
        raise UserError(f"{where} has the wrong type", expected="values by name", found=repr(values))
    cls = _kind(cls, values, where)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for given in values:
        key = current_key(where, given)
        if key not in fields:
            raise UserError(f"unknown config key {where}.{key}", expected=f"one of: {nearest(key, fields)}")
        if key in kwargs:
            raise UserError(f"{where}.{key} is given by its former name as well", fix=f"leave out {given}")
        kwargs[key] = _coerce(hints[key], values[given], f"{where}.{key}")
    missing = [
        name
        for name, field in fields.items()
        if name not in kwargs
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}", fix=f"set {where}.{missing[0]}")
    return cls(**kwargs)


def current_key(where: str, key: str) -> str:
    """Return the name of a key of the part `where`, with a FutureWarning if `key` is a former one."""
    name = RENAMED.get(f"{where}.{key}", key)
    if name != key:
        warnings.warn(f"{where}.{key} is now {where}.{name}", FutureWarning, stacklevel=2)
    return name


def dataclasses_of(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a hint allows: itself, the members of a union, or none."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return tuple(
        option for option in (typing.get_args(hint) if union else (hint,)) if dataclasses.is_dataclass(option)
    )


def _kind(hint: Any, values: Any, where: str) -> type:
    """The dataclass of a union that `values` are for."""
    options = dataclasses_of(hint)
    if len(options) == 1:
        return options[0]
    kinds = {typing.get_args(typing.get_type_hints(option)["kind"])[0]: option for option in options}
    kind = values["kind"] if "kind" in values else next(iter(kinds))
    if kind not in kinds:
        raise UserError(
            f"{where}.kind has an unknown value", expected=f"one of {list(kinds)}", found=repr(kind)
        )
    return kinds[kind]


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`: lists become tuples, integers floats; anything else must fit as it is."""
    if options := dataclasses_of(hint):
        return value if isinstance(value, options) else build(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise UserError(
                f"{where} has an unknown value", expected=f"one of {list(arguments)}", found=repr(value)
            )
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        for option in arguments:
            if isinstance(value, (list, tuple)) == (typing.get_origin(option) is tuple):
                return _coerce(option, value, where)
    if origin is dict and isinstance(value, dict):
        return {key: _coerce(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            return tuple(_coerce(arguments[0], item, where) for item in value)
        if len(value) == len(arguments):
            return tuple(_coerce(kind, item, where) for kind, item in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(
        f"{where} has the wrong type",
        expected=getattr(hint, "__name__", hint),
        found=f"{type(value).__name__} {value!r}",
    )


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON-able values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
