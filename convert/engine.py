"""One strict engine that fills a Flax module from tensors in their original names.

A table is a list of rules, `source name -> path in the module`, plus what may be ignored and why. The engine
is strict both ways: an unknown source tensor, two sources for one target, a target without a source, a wrong
shape and a value that is not finite are all reported together, in one error.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from ditmem_jax.errors import UserError

TRANSFORMS = {
    "copy": lambda x: x,
    "linear": lambda x: x.T,
    "conv2d": lambda x: x.transpose(2, 3, 1, 0),
    "conv3d": lambda x: x.transpose(2, 3, 4, 1, 0),
    "patch": lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]),
    "flatten": lambda x: x.reshape(-1),
    "squeeze0": lambda x: x[0],
    "complex": lambda x: x[..., 0] + 1j * x[..., 1],
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """`source` is an original name, `{i}` standing for a layer; `target` a path in the module.

    With `{i}` the layers are stacked along a new leading axis in the order of their numbers.
    """

    source: str
    target: str
    transform: str = "copy"


@dataclasses.dataclass(frozen=True)
class Table:
    """The rules of one network.

    `ignored` maps a regular expression of source names that are left out to the reason. `aliases` maps a
    regular expression to a replacement: names for the same tensor; both may be present if they are equal.
    `prefixes` may stand before every name of a file.
    """

    rules: Sequence[Rule]
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefixes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The sources, in the order of their layers, and the transform of one target."""

    sources: tuple[str, ...]
    transform: str
    stacked: bool


def targets(module: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every array that a checkpoint must hold: all state except generators."""
    state = nnx.state(module, nnx.Not(nnx.RngState))
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def assign(
    table: Table, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, Assignment], dict[str, list[str]]]:
    """Decides which source fills which target, from names and shapes alone.

    Args:
        shapes: shape of each source tensor, by original name.
        wanted: what the module holds, see `targets`.
    Returns:
        The assignment of each target, and the groups of source names that must hold equal values (aliases).
    Raises:
        UserError: with every finding.
    """
    patterns = [
        (re.compile(re.escape(rule.source).replace(re.escape("{i}"), r"(\d+)") + r"\Z"), rule)
        for rule in table.rules
    ]
    problems: list[str] = []
    found: dict[str, dict[int, str]] = {}
    rule_of: dict[str, Rule] = {}
    equal: dict[str, list[str]] = {}
    for name in sorted(shapes):
        canonical = name
        for prefix in sorted(table.prefixes, key=len, reverse=True):
            if canonical.startswith(prefix):
                canonical = canonical.removeprefix(prefix)
                break
        for alias, replacement in table.aliases.items():
            canonical = re.sub(alias, replacement, canonical)
        if any(re.search(pattern, canonical) for pattern in table.ignored):
            continue
        equal.setdefault(canonical, []).append(name)
        if len(equal[canonical]) > 1:
            continue
        matches = [(rule, match) for pattern, rule in patterns if (match := pattern.match(canonical))]
        if not matches:
            problems.append(f"unknown tensor {name} {list(shapes[name])}")
            continue
        rule, match = matches[0]
        layer = int(match.group(1)) if match.groups() else 0
        layers = found.setdefault(rule.target, {})
        if layer in layers:
            problems.append(f"{name} and {layers[layer]} both fill {rule.target}")
        layers[layer] = name
        rule_of[rule.target] = rule

    assignments = {}
    for path, want in wanted.items():
        if path not in found:
            sources = [rule.source for rule in table.rules if rule.target == path]
            problems.append(
                f"nothing fills {path} {list(want.shape)}" + (f": {sources[0]} is missing" if sources else "")
            )
            continue
        rule, layers = rule_of[path], found[path]
        stacked = "{i}" in rule.source
        order = range(want.shape[0]) if stacked else range(1)
        shape = tuple(want.shape[1:] if stacked else want.shape)
        for layer in sorted(set(layers) - set(order)):
            problems.append(f"{layers[layer]} is one layer too many: {path} holds {len(order)}")
        for layer in order:
            if layer not in layers:
                problems.append(f"{rule.source.format(i=layer)} is missing for {path}")
                continue
            got = _shape_after(rule.transform, shapes[layers[layer]])
            if got != shape:
                problems.append(
                    f"{layers[layer]} gives shape {list(got or shapes[layers[layer]])}, {path} needs {list(shape)}"
                )
        assignments[path] = Assignment(
            tuple(layers.get(layer, "") for layer in order), rule.transform, stacked
        )
    for path in sorted(set(found) - set(wanted)):
        problems.append(f"{next(iter(found[path].values()))} has no place: the module has no {path}")
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError(
            f"the weights do not fit the module ({len(problems)} findings):\n  " + "\n  ".join(shown),
            fix="compare the configuration with the checkpoint's",
        )
    return assignments, {name: names for name, names in equal.items() if len(names) > 1}


def _shape_after(transform: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a transform gives, None where it does not apply to that many axes."""
    try:
        return TRANSFORMS[transform](np.broadcast_to(np.float32(0), shape)).shape
    except (ValueError, IndexError):
        return None


def stream(
    table: Table, tensors: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields target path and array, in the module's layout and dtype, in the order of `wanted`.

    Args:
        tensors: anything with a shape that numpy can turn into an array; turned into one only when it is needed.
    Raises:
        UserError: as `assign`; and at the end for aliases that differ and values that are not finite.
    """
    assignments, equal = assign(table, {name: tuple(x.shape) for name, x in tensors.items()}, wanted)
    problems = []
    for names in equal.values():
        for other in names[1:]:
            if not np.array_equal(tensors[names[0]], tensors[other]):
                problems.append(f"{names[0]} and {other} are names of one tensor but differ")
    for path, assignment in assignments.items():
        parts = [TRANSFORMS[assignment.transform](np.asarray(tensors[name])) for name in assignment.sources]
        problems += [
            f"{name} holds values that are not finite"
            for name, part in zip(assignment.sources, parts, strict=True)
            if not np.all(np.isfinite(part.astype(np.float32) if part.dtype.itemsize < 4 else part))
        ]
        yield path, (np.stack(parts) if assignment.stacked else parts[0]).astype(wanted[path].dtype)
    if problems:
        raise UserError("the weights are not usable:\n  " + "\n  ".join(problems[:20]))


def convert(
    table: Table, tensors: Mapping[str, np.ndarray], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """The whole of `stream`: target path -> array."""
    return dict(stream(table, tensors, wanted))


def fill(module: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets every array of `module` (see `targets`) from `arrays`, which must hold them all."""
    state = nnx.state(module, nnx.Not(nnx.RngState))
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(jax.numpy.asarray(arrays[".".join(map(str, path))]))
    nnx.update(module, state)


def load(module: nnx.Module, table: Table, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills `module` from tensors in original names, strictly."""
    fill(module, convert(table, tensors, targets(module)))
