"""One strict engine that fills a Flax module from tensors in their original names.

A table is a list of rules, `source name -> path in the module`, plus what may be ignored and why. The engine
is strict both ways: an unknown source tensor, two sources for one target, a target without a source, a wrong
shape and a value that is not finite are all reported together, in one error.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from ditmem_jax.errors import UserError

LINES = 20  # of findings that are shown
BLOCK = re.compile(r"(?:(?<=blocks[._])|(?<=block\.))(\d+)")

TRANSFORMS = {
    "copy": lambda x: x,
    "linear": lambda x: x.T,
    "conv2d": lambda x: x.transpose(2, 3, 1, 0),
    "conv3d": lambda x: x.transpose(2, 3, 4, 1, 0),
    "patch": lambda x: np.moveaxis(x, (1, 0), (-2, -1)).reshape(-1, x.shape[0]),
    "rows": lambda x: x.reshape(x.shape[-2:]),
    "flatten": lambda x: x.reshape(-1),
    "squeeze0": lambda x: x[0],
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


@dataclasses.dataclass(frozen=True)
class Match:
    """Which source fills which target, decided from names and shapes alone.

    `equal` are groups of source names that must hold equal values (aliases); `ignored` sources are left out.
    """

    assignments: dict[str, Assignment]
    equal: list[list[str]]
    ignored: list[str]
    problems: list[str]


def targets(module: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every array that a checkpoint must hold: all state except generators."""
    state = nnx.state(module, nnx.Not(nnx.RngState))
    arrays = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()}


def canonical(table: Table, name: str) -> str:
    """A source name without its prefix and in the spelling of the rules."""
    for prefix in sorted(table.prefixes, key=len, reverse=True):
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    for alias, replacement in table.aliases.items():
        name = re.sub(alias, replacement, name)
    return name


def match(
    table: Table, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> Match:
    """Decides which source fills which target; what does not fit stands in `problems`.

    Args:
        shapes: shape of each source tensor, by original name.
        wanted: what the module holds, see `targets`.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(shapes):
        groups.setdefault(canonical(table, name), []).append(name)
    ignored, kept = [], {}
    for name, names in groups.items():
        if any(re.search(pattern, name) for pattern in table.ignored):
            ignored += names
        else:
            kept[name] = names
    problems = [
        f"{names[0]} {list(shapes[names[0]])} and {other} {list(shapes[other])} are names of one tensor"
        for names in kept.values()
        for other in names[1:]
        if shapes[other] != shapes[names[0]]
    ]
    found = _layers(table, {name: names[0] for name, names in kept.items()}, shapes, problems)
    assignments = _assignments(table, found, shapes, wanted, problems)
    for path in sorted(set(found) - set(wanted)):
        problems.append(f"{next(iter(found[path].values()))} has no place: the module has no {path}")
    return Match(assignments, [names for names in kept.values() if len(names) > 1], ignored, problems)


def _layers(
    table: Table, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], problems: list[str]
) -> dict[str, dict[int, str]]:
    """Target -> number of the layer (0 for targets without layers) -> source name."""
    patterns = [
        (re.compile(re.escape(rule.source).replace(re.escape("{i}"), r"(\d{1,6})") + r"\Z"), rule)
        for rule in table.rules
    ]
    found: dict[str, dict[int, str]] = {}
    for spelled, name in names.items():
        matches = ((rule, match) for pattern, rule in patterns if (match := pattern.match(spelled)))
        rule, groups = next(matches, (None, None))
        if rule is None:
            problems.append(f"unknown tensor {name} {list(shapes[name])}")
            continue
        layers = found.setdefault(rule.target, {})
        layer = int(groups.group(1)) if groups.groups() else 0
        if layer in layers:
            problems.append(f"{name} and {layers[layer]} both fill {rule.target}")
        layers[layer] = name
    return found


def _assignments(
    table: Table,
    found: Mapping[str, Mapping[int, str]],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    problems: list[str],
) -> dict[str, Assignment]:
    rule_of = {rule.target: rule for rule in reversed(table.rules)}
    assignments = {}
    for path, want in wanted.items():
        rule, layers = rule_of.get(path), found.get(path)
        if layers is None:
            problems.append(
                f"nothing fills {path} {list(want.shape)}" + (f": {rule.source} is missing" if rule else "")
            )
            continue
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
        sources = tuple(layers.get(layer, "") for layer in order)
        assignments[path] = Assignment(sources, rule.transform, stacked)
    return assignments


def assign(
    table: Table, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, Assignment], list[list[str]]]:
    """The assignments and groups of equal names of `match`; raises a UserError with every finding."""
    found = match(table, shapes, wanted)
    if found.problems:
        raise findings(
            "the weights do not fit the module",
            found.problems,
            fix="compare the configuration with the checkpoint's",
        )
    return found.assignments, found.equal


def findings(what: str, problems: Sequence[str], fix: str | None = None) -> UserError:
    """One error with every finding, a line each; those that differ in the number of a block only are one."""
    lines = compact(problems)
    count = f"{len(problems)} finding" + "s" * (len(problems) != 1)
    more = [f"and {len(lines) - LINES} more"] if len(lines) > LINES else []
    return UserError(f"{what} ({count}):\n  " + "\n  ".join([*lines[:LINES], *more]), fix=fix)


def told_fix(problems: Sequence[str]) -> str | None:
    """The first remedy that findings name (see `one_line`)."""
    return next((found[1] for problem in problems if (found := re.search(r"; fix: (.+)", problem))), None)


def compact(names: Iterable[str]) -> list[str]:
    """Names or messages in their order, those that differ in the number of a block only as one with its range."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        before, number, after = (*BLOCK.split(name, maxsplit=1), "", "")[:3]
        groups.setdefault((before, after), []).extend([int(number)] if number else [])
    return [f"{before}{_ranges(numbers)}{after}" for (before, after), numbers in groups.items()]


def listed(names: Iterable[str], most: int = 5) -> str:
    """A few names, and how many there are beyond."""
    names = list(names)
    lines = compact(sorted(names))
    shown = ", ".join(lines[:most])
    return shown if len(lines) <= most else f"{shown} and {len(lines) - most} more ({len(names)} tensors)"


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers of blocks as text: 3, or {0-29}, or {0,2-4}."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in found]
    return "".join(parts) if len(set(numbers)) <= 1 else "{" + ",".join(parts) + "}"


def one_line(error: UserError) -> str:
    """An error as a finding among others."""
    return error.in_one_line()


def _shape_after(transform: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a transform gives, None where it does not apply to that many axes."""
    try:
        return TRANSFORMS[transform](np.broadcast_to(np.float32(0), shape)).shape
    except (ValueError, IndexError):
        return None


def differences(equal: Sequence[Sequence[str]], tensors: Mapping[str, Any]) -> list[str]:
    """Names of one tensor that hold different values."""
    return [
        f"{names[0]} and {other} are names of one tensor but differ"
        for names in equal
        for other in names[1:]
        if not np.array_equal(tensors[names[0]], tensors[other])
    ]


def stream(
    assignments: Mapping[str, Assignment], tensors: Mapping[str, Any]
) -> Iterator[tuple[str, int, str, np.ndarray]]:
    """Yields target path, layer, source name and values in the module's layout and the source's dtype.

    Targets come in the order of `assignments`, their layers in order, so that what is yielded is the content of the
    stacked arrays from front to back.

    Args:
        tensors: anything that numpy can turn into an array; turned into one only when it is needed.
    """
    for path, assignment in assignments.items():
        for layer, name in enumerate(assignment.sources):
            yield path, layer, name, TRANSFORMS[assignment.transform](np.asarray(tensors[name]))


def convert(
    table: Table, tensors: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """Target path -> array in the module's layout and dtype, all in memory.

    Raises:
        UserError: as `assign`; and for aliases that differ and values that are not finite.
    """
    assignments, equal = assign(table, {name: tuple(x.shape) for name, x in tensors.items()}, wanted)
    problems = differences(equal, tensors)
    arrays = {path: np.empty(x.shape, x.dtype) for path, x in wanted.items()}
    for path, layer, name, values in stream(assignments, tensors):
        if not np.isfinite(values).all():
            problems.append(f"{name} holds values that are not finite")
        array = arrays[path]
        (array[layer] if assignments[path].stacked else array)[...] = values
    if problems:
        raise findings("the weights are not usable", problems)
    return arrays


def fill(module: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets every array of `module` (see `targets`) from `arrays`, which must hold them all."""
    state = nnx.state(module, nnx.Not(nnx.RngState))
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(jax.numpy.asarray(arrays[".".join(map(str, path))]))
    nnx.update(module, state)


def load(module: nnx.Module, table: Table, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills `module` from tensors in original names, strictly."""
    fill(module, convert(table, tensors, targets(module)))
