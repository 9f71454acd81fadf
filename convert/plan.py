"""What a conversion will do: which network each part of a source is, and which tensor fills which array."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.errors import UserError
from ditmem_jax.storage.tensors import DTYPES
from ditmem_jax.storage.weights import FORMAT

from . import kinds
from .clip import unfused
from .engine import Match, Table, canonical, findings, match, one_line, targets
from .sources import Part, Source

FILES = {name: f"{name}.safetensors" for name in ("dit", "dit_high", "vae", "text", "clip")} | {
    "memory": "encoder.safetensors"
}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a source. `wanted` are the arrays to write, in the dtypes in which they will be stored."""

    role: str
    kind: str
    naming: str
    part: Part
    config: Any
    table: Table
    match: Match
    wanted: dict[str, jax.ShapeDtypeStruct]

    @property
    def size(self) -> int:
        """Bytes to write."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in self.wanted.values())

    def __str__(self) -> str:
        elements = sum(math.prod(x.shape) for x in self.wanted.values())
        dtypes = ", ".join(sorted({str(x.dtype) for x in self.wanted.values()}))
        return f"{self.role}: {elements:,} parameters of {self.part} in {self.naming} names -> {dtypes}"


def plan(source: Source, *, kind: str | None = None, dtype: str | None = None) -> list[Network]:
    """The networks of a source.

    Args:
        kind: take every part for this kind of network instead of looking at its names.
        dtype: "float32" or "bfloat16" for every array; None for as stored. A memory encoder is always float32.
    Raises:
        UserError: with every finding, or if the source holds no network at all.
    """
    roles: dict[str, Part] = {}
    found, problems = [], []
    for part in source.parts:
        if (detected := kinds.detect(part.tensors, kind)) is None:
            continue
        if detected[0] == "clip":
            part = dataclasses.replace(part, tensors=unfused(part.tensors))
        role = _role(detected[0], part)
        if role in roles:
            problems.append(f"{roles[role]} and {part} are both the network {role}")
        roles[role] = part
        try:
            network = _network(role, *detected, part, dtype)
        except UserError as error:
            problems.append(one_line(error))
            continue
        problems += [f"{part}: {problem}" for problem in network.match.problems]
        found.append(network)
    if problems:
        raise findings(
            f"the weights do not fit the module: {source.root}",
            problems,
            fix="compare the configuration with the checkpoint's",
        )
    if not found:
        raise _unknown(source, kind)
    return found


def skipped(source: Source, networks: list[Network]) -> list[Part]:
    """Parts of a source that hold none of our networks, such as an image encoder."""
    used = {network.part.files for network in networks}
    return [part for part in source.parts if part.files not in used]


def mapping(network: Network) -> Iterator[str]:
    """A line for each source tensor: where its values go and how they are turned."""
    for path, assignment in network.match.assignments.items():
        for layer, name in enumerate(assignment.sources):
            place = f"{path}[{layer}]" if assignment.stacked else path
            yield f"{name} {list(network.part.tensors[name].shape)} -> {network.role}.{place} ({assignment.transform})"
    for names in network.match.equal:
        yield from (f"{name} = {names[0]}" for name in names[1:])
    yield from (f"{name} -> nothing reads it" for name in network.match.ignored)


def _role(kind: str, part: Part) -> str:
    """The name of the network in the converted folder.

    The folder tells the expert for high noise. In the layout of diffusers it is called like an only transformer,
    and has the other expert beside it.
    """
    folder = part.folder.absolute()
    high = folder.name == "high_noise_model" or (
        folder.name == "transformer" and folder.with_name("transformer_2").is_dir()
    )
    return "dit_high" if kind == "dit" and high else kind


def _network(role: str, kind: str, naming: str, part: Part, dtype: str | None) -> Network:
    network, tensors = kinds.KINDS[kind], part.tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    aliases = kinds.naming_aliases(kind, naming, tensors)
    spelling = dataclasses.replace(network.spelling, aliases={**aliases, **network.spelling.aliases})
    config = kinds.configure(
        kind, {canonical(spelling, name): shape for name, shape in shapes.items()}, part.config, str(part)
    )
    table = network.table(config)
    table = dataclasses.replace(table, aliases={**aliases, **table.aliases})
    wanted = _arrays(kind, config)
    found = match(table, shapes, wanted)
    ignored = set(found.ignored)
    for name, tensor in tensors.items():
        known = DTYPES if name in ignored else FLOATS
        if tensor.dtype not in known:
            found.problems.append(f"{name} has dtype {tensor.dtype}, one of {', '.join(known)} is needed")
    stored = {
        path: _stored_dtype({tensors[name].dtype for name in assignment.sources if name})
        for path, assignment in found.assignments.items()
    }
    wanted = {
        path: jax.ShapeDtypeStruct(wanted[path].shape, _dtype(kind, dtype, as_stored))
        for path, as_stored in stored.items()
    }
    return Network(role, kind, naming, part, config, table, found, wanted)


@functools.cache
def _arrays(kind: str, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What a network of this configuration holds; two experts are alike."""
    return targets(nnx.eval_shape(lambda: kinds.KINDS[kind].module(config, rngs=nnx.Rngs(0))))


def _stored_dtype(names: set[str]) -> np.dtype:
    """The dtype that holds the values of all layers of an array."""
    return (
        DTYPES[names.pop()] if len(names) == 1 and names <= {"F32", "F16", "BF16"} else np.dtype(np.float32)
    )


def _dtype(kind: str, chosen: str | None, as_stored: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if kind == "memory" else jnp.dtype(chosen) if chosen else as_stored


def _unknown(source: Source, kind: str | None) -> UserError:
    names = sorted(source.parts[0].tensors)
    if any(part.config.get("format") == FORMAT for part in source.parts):
        return UserError(f"{source.root} is converted already", fix="--export leads back to other names")
    return UserError(
        f"{source.root} holds no {kind or 'network that we know'}",
        expected=f"tensors of one of: {', '.join(kinds.KINDS)}",
        found=", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else ""),
    )
