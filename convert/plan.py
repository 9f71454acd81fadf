"""The plan of a conversion: which network each part of a source is, and which tensor fills which array."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.errors import UserError
from ditmem_jax.storage.tensors import DTYPES, Stored
from ditmem_jax.storage.weights import FORMAT

from . import dequantise, experts, kinds, lora, relatives
from .clip import unfused
from .dequantise import dequantised
from .engine import Match, Table, canonical, compact, findings, listed, match, one_line, targets, told_fix
from .sources import Part, Source

FILES = {name: f"{name}.safetensors" for name in ("dit", "dit_high", "vae", "text", "clip")} | {
    "memory": "encoder.safetensors"
}
EMA = re.compile(r"(?i)(?:\A|[._])ema(?:[._]|\Z)|\Ashadow")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices of a conversion, where files leave one.

    Args:
        kind: take every part for this kind of network instead of looking at its names.
        dtype: "float32" or "bfloat16" for every array; None for one that loses nothing. A memory encoder is always
            float32.
        role: which of two experts a transformer is, or that it is a single one; None: as names tell.
        ema: take averaged weights, or those that are not, where a file has both; None: averaged ones.
        prefix: take the tensors under this prefix, where a file holds several networks of a kind.
        loras: adapters to merge into transformers, as FILE[:strength[:role]] (see `lora`).
        base: of a relative that extends Wan's transformer (VACE), take that transformer.
    """

    kind: str | None = None
    dtype: str | None = None
    role: experts.Role | None = None
    ema: bool | None = None
    prefix: str | None = None
    loras: tuple[str, ...] = ()
    base: bool = False


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a source. `wanted` are the arrays to write, in the dtypes in which they will be stored.

    `notes` are what its user should know of the choices that were made, `merged` the adapters that were merged, with the
    settings to sample with where they were distilled.
    """

    role: str
    kind: str
    naming: str
    part: Part
    config: Any
    table: Table
    match: Match
    wanted: dict[str, jax.ShapeDtypeStruct]
    notes: tuple[str, ...] = ()
    merged: tuple[tuple[lora.Request, str], ...] = ()

    @property
    def size(self) -> int:
        """Bytes to write."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in self.wanted.values())

    def __str__(self) -> str:
        elements = sum(math.prod(x.shape) for x in self.wanted.values())
        dtypes = ", ".join(sorted({str(x.dtype) for x in self.wanted.values()}))
        return f"{self.role}: {elements:,} parameters of {self.part} in {self.naming} names -> {dtypes}"


DEFAULTS = Options()


def plan(source: Source, options: Options = DEFAULTS) -> list[Network]:
    """The networks of a source.

    Raises:
        UserError: with every finding, or if the source holds no network at all.
    """
    adapters = [part for part in source.parts if lora.is_lora(part.tensors)]
    chosen = [
        (found, part, notes)
        for part in source.parts
        if part not in adapters
        for found, notes in _chosen(part, options)
    ]
    _check_role(chosen, options)
    roles: dict[str, Part] = {}
    networks, problems = [], []
    for found, part, notes in chosen:
        try:
            network = _network(found, part, options, notes)
        except UserError as error:
            if len(chosen) == 1:
                raise
            problems.append(one_line(error))
            continue
        if network.role in roles:
            raise _both(network.role, roles[network.role], part)
        roles[network.role] = part
        problems += [f"{network.part}: {problem}" for problem in network.match.problems]
        networks.append(network)
    if problems:
        raise findings(
            f"the weights do not fit the module: {source.root}",
            problems,
            fix=told_fix(problems)
            or f"ditmem convert --list {source.root} prints what was recognised; a config.json "
            "beside the file tells sizes that its shapes do not",
        )
    if not networks:
        raise _unknown(source, options)
    return _with_loras(networks, options)


def left_out(source: Source, networks: list[Network]) -> Iterator[str]:
    """A line for each file of a source, and each kind of tensor, that nothing is made of, with the reason."""
    used = {network.part.files for network in networks}
    for name, reason in source.left_out:
        yield f"{name}: {reason}"
    for part in source.parts:
        if part.files not in used:
            yield f"{part}: {_other(part)}"
            continue
        named = {name for found in kinds.networks(part.tensors) for name in found.names.values()}
        training = [name for name in part.tensors if kinds.TRAINING.search(name)]
        if training:
            yield f"{part}: {listed(training)}: the state of a training program"
        if others := part.tensors.keys() - named - set(training):
            yield f"{part}: {listed(others)}: of no network that we know"
    for network in networks:
        reasons: dict[str, list[str]] = {}
        for name in network.match.ignored:
            pattern = next(p for p in network.table.ignored if re.search(p, canonical(network.table, name)))
            reasons.setdefault(network.table.ignored[pattern], []).append(name)
        for reason, names in reasons.items():
            yield f"{network.part}: {listed(names)}: {reason}"


def _other(part: Part) -> str:
    """A description of a part that holds none of our networks."""
    if lora.is_lora(part.tensors):
        return f"a {lora.describe(part.tensors)}; --lora {part.files[0]} merges it"
    return relatives.other(part.tensors)


def _with_loras(networks: list[Network], options: Options) -> list[Network]:
    """The networks with the adapters of `options.loras` merged into their transformers.

    Raises:
        UserError: for an adapter that fits none, and as `lora.merged`.
    """
    transformers = {network.role: _expert(network, options) for network in networks if network.kind == "dit"}
    two = len(transformers) > 1 or "dit_high" in transformers
    found = {network.role: network for network in networks}
    for text in options.loras:
        request = lora.parse(text)
        if not transformers:
            raise UserError(
                f"--lora {text} is for a transformer, and the source holds none",
                found=", ".join(found),
                fix=f"ditmem convert BASE DEST --lora {text}, with the file of a transformer as BASE",
            )
        adapter = lora.open_adapter(request.path)
        for role in lora.for_expert(request, transformers):
            network = found[role]
            canonicals = {
                name: canonical(network.table, name)
                for name in network.part.tensors
                if name not in network.match.ignored
            }
            tensors, changed, missing = lora.merged(
                network.part.tensors, canonicals, adapter, request.strength
            )
            settings = lora.sampling(request.path.name, two)
            notes = [f"{adapter} at strength {request.strength:g}: {len(changed)} tensors of {role} changed"]
            if missing:
                notes.append(
                    f"{request.path.name}: nothing here matches {', '.join(compact(sorted(missing)))}"
                )
            if settings:
                notes.append(f"{request.path.name} is distilled to few steps: ditmem sample {settings}")
            found[role] = dataclasses.replace(
                network,
                part=dataclasses.replace(network.part, tensors=tensors),
                notes=(*network.notes, *notes),
                merged=(*network.merged, (request, settings or "")),
            )
    return list(found.values())


def _expert(network: Network, options: Options) -> experts.Expert | None:
    """The expert that a transformer is, None for a single one."""
    if network.role == "dit_high":
        return "high"
    if options.role:
        return "low" if options.role == "low" else None
    told = experts.evidence(network.part)
    return told[0] if told else None


def _chosen(part: Part, options: Options) -> Iterator[tuple[kinds.Found, tuple[str, ...]]]:
    """The networks to take from a part, each with notes on what else there was.

    Raises:
        UserError: for several of one kind that nothing tells apart.
    """
    found = kinds.networks(part.tensors, options.kind)
    if options.prefix is not None:
        wanted = [network for network in found if network.prefix.rstrip(".") == options.prefix.rstrip(".")]
        if found and not wanted:
            raise UserError(
                f"{part} has no network under --prefix={options.prefix}",
                found=", ".join(network.prefix or "(no prefix)" for network in found),
                fix=f"ditmem convert {part.files[0]} DEST --prefix={found[0].prefix}",
            )
        found = wanted
    for kind in dict.fromkeys(network.kind for network in found):
        alike = [network for network in found if network.kind == kind]
        averaged = [network for network in alike if EMA.search(network.prefix)]
        if options.ema and kind == "dit" and not averaged:
            raise UserError(
                f"{part} holds no averaged weights",
                expected="names under ema, generator_ema or the like, for --ema",
                found=", ".join(network.prefix or "(no prefix)" for network in alike),
                fix=f"ditmem convert {part.files[0]} DEST",
            )
        plain = [network for network in alike if network not in averaged]
        taken = averaged if averaged and options.ema is not False else plain or averaged
        notes = tuple(
            f"{part}: {len(other.names)} tensors under {other.prefix or '(no prefix)'} are left out for those under "
            f"{taken[0].prefix or '(no prefix)'}; {'--noema' if taken is averaged else '--ema'} takes them"
            for other in alike
            if other not in taken
        )
        told = [experts.by_name(network.prefix) for network in taken]
        if len(taken) > 1 and (None in told or len(set(told)) < len(told)):
            raise UserError(
                f"{part} holds {len(taken)} networks of the kind {kind}",
                expected="one, or a prefix that tells which",
                found=", ".join(network.prefix or "(no prefix)" for network in taken),
                fix=f"ditmem convert {part.files[0]} DEST --prefix={taken[0].prefix}, or another of them",
            )
        for network in taken:
            yield network, notes


def _check_role(chosen: list, options: Options) -> None:
    """Raise a UserError for a role that is given to several transformers, or to none."""
    transformers = [part for found, part, _ in chosen if found.kind == "dit"]
    if options.role and len(transformers) != 1:
        raise UserError(
            f"--role={options.role} is for one transformer",
            found=", ".join(map(str, transformers)) or "none",
            fix=f"ditmem convert {transformers[0].files[0]} DEST --role={options.role}" if transformers
            else "leave out --role",
        )  # fmt: skip


def _both(role: str, first: Part, second: Part) -> UserError:
    files = [part.files[0] if len(part.files) == 1 else part.folder for part in (first, second)]
    alike = f"ditmem convert {files[0]} DEST, or {files[1]}"
    experts_fix = (
        f"; for two experts: ditmem convert {files[0]} DEST --role=high, then {files[1]} with --role=low"
    )
    return UserError(
        f"{first} and {second} are both the network {role}",
        expected="one, or names that tell experts apart: high_noise and low_noise"
        if role.startswith("dit")
        else "one",
        fix=alike + (experts_fix if role.startswith("dit") else ""),
    )


def mapping(network: Network) -> Iterator[str]:
    """A line for each source tensor: where its values go and how they are turned."""
    for path, assignment in network.match.assignments.items():
        for layer, name in enumerate(assignment.sources):
            place = f"{path}[{layer}]" if assignment.stacked else path
            yield f"{name} {list(network.part.tensors[name].shape)} -> {network.role}.{place} ({assignment.transform})"
    for names in network.match.equal:
        yield from (f"{name} = {names[0]}" for name in names[1:])
    yield from (f"{name} -> nothing reads it" for name in network.match.ignored)


def _network(found: kinds.Found, part: Part, options: Options, notes: tuple[str, ...]) -> Network:
    kind, naming = found.kind, found.naming
    tensors = {name: part.tensors[stored] for name, stored in found.names.items()}
    tensors, problems = dequantised(unfused(tensors) if kind == "clip" else tensors)
    part = dataclasses.replace(part, tensors=tensors, prefix=found.prefix)
    if problems:
        raise findings(
            f"{part}: quantised weights that cannot be read",
            problems,
            fix="ditmem convert the fp16 or bf16 file of the same model in its place",
        )
    extension = relatives.relative(tensors, part.config) if kind == "dit" else None
    if extension:
        tensors, note = _base(part, extension, options)
        described = {key: value for key, value in part.config.items() if key != "model_type"}
        part, notes = dataclasses.replace(part, tensors=tensors, config=described), (*notes, note)
    if summary := dequantise.summary(tensors):
        notes = (*notes, summary)
    if kind == "dit" and (settings := lora.sampling(part.files[0].name, two=False)):
        notes = (*notes, f"{part.files[0].name} is distilled to few steps: ditmem sample {settings}")
    network = kinds.KINDS[kind]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    aliases = kinds.naming_aliases(kind, naming, tensors)
    spelling = dataclasses.replace(network.spelling, aliases={**aliases, **network.spelling.aliases})
    config = kinds.configure(
        kind, {canonical(spelling, name): shape for name, shape in shapes.items()}, part.config, str(part)
    )
    if kind == "dit" and (name := relatives.converted(config)):
        notes = (*notes, name)
    table = network.table(config)
    table = dataclasses.replace(table, aliases={**aliases, **table.aliases})
    wanted = _arrays(kind, config)
    matched = match(table, shapes, wanted)
    if kind == "text" and (zeros := _zeros(matched.equal, tensors)):
        tensors = {name: x for name, x in tensors.items() if name not in zeros}
        part = dataclasses.replace(part, tensors=tensors)
        notes = (*notes, f"{part}: {listed(zeros)}: left out: all zero, beside the same with values")
        matched = match(table, {name: x.shape for name, x in tensors.items()}, wanted)
    ignored = set(matched.ignored)
    for name, tensor in tensors.items():
        known = FLOATS if name not in ignored else DTYPES if kind == "memory" else {tensor.dtype}
        if tensor.dtype not in known:
            matched.problems.append(f"{name} has dtype {tensor.dtype}, one of {', '.join(known)} is needed")
    stored = {
        path: _stored_dtype({tensors[name].dtype for name in assignment.sources if name})
        for path, assignment in matched.assignments.items()
    }
    wanted = {
        path: jax.ShapeDtypeStruct(wanted[path].shape, _dtype(kind, options.dtype, as_stored))
        for path, as_stored in stored.items()
    }
    role = experts.network_name(part, config, options.role) if kind == "dit" else kind
    return Network(role, kind, naming, part, config, table, matched, wanted, notes)


def _base(part: Part, extension: relatives.Relative, options: Options) -> tuple[dict[str, Stored], str]:
    """The tensors of the Wan transformer inside of a relative, if that is asked for.

    Raises:
        UserError: with the relative's name, and what can be used of it.
    """
    rest = {name: x for name, x in part.tensors.items() if not re.search(extension.sign, name)}
    extra = listed(part.tensors.keys() - rest.keys(), 3)
    file = part.files[0] if len(part.files) == 1 else part.folder
    if options.base and extension.base:
        return (
            rest,
            f"{part}: {extra}: left out: of {extension.name}; the rest is the Wan transformer that it extends",
        )
    raise UserError(
        f"{part} is {extension.name}, a relative of Wan that is not run here",
        expected="a transformer of text or image to video: T2V, I2V, TI2V, FLF2V, Fun-InP, Fun-Control",
        found=f"{extra or part.config.get('model_type', part.config.get('_class_name'))}, beside {len(rest)} tensors of Wan's own",
        fix=f"ditmem convert {file} DEST --base takes the Wan transformer that it extends"
        if extension.base
        else f"ditmem convert {file.parent} DEST --kind=vae for its VAE, --kind=text for its text encoder; "
        "its transformer was trained as a whole and is of no use without the rest",
    )


def _zeros(equal: list[list[str]], tensors: Mapping[str, Stored]) -> set[str]:
    """Names of tensors that are all zero, of those that are there under another name with values."""

    def empty(name: str) -> bool:
        values = tensors[name].read()
        return not (values[:16].any() or values.any())

    zeros = set()
    for names in equal:
        of_these = {name for name in names if empty(name)}
        zeros |= of_these if len(of_these) < len(names) else set()
    return zeros


@functools.cache
def _arrays(kind: str, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a network of this configuration; two experts are alike."""
    return targets(nnx.eval_shape(lambda: kinds.KINDS[kind].module(config, rngs=nnx.Rngs(0))))


def _stored_dtype(names: set[str]) -> np.dtype:
    """The dtype that holds the values of all layers of an array."""
    return (
        DTYPES[names.pop()] if len(names) == 1 and names <= {"F32", "F16", "BF16"} else np.dtype(np.float32)
    )


def _dtype(kind: str, chosen: str | None, as_stored: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if kind == "memory" else jnp.dtype(chosen) if chosen else as_stored


def _unknown(source: Source, options: Options) -> UserError:
    """The error for a source without any network."""
    root = source.root
    if adapters := [part for part in source.parts if lora.is_lora(part.tensors)]:
        file = adapters[0].files[0]
        if any(".base_layer." in name for name in adapters[0].tensors):
            return UserError(
                f"{file} is a model with adapters that are not merged ({lora.describe(adapters[0].tensors)})",
                expected="a model, or adapters alone",
                fix="model.merge_and_unload().save_pretrained(DIR) of peft, then ditmem convert DIR DEST",
            )
        return UserError(
            f"{file} is a {lora.describe(adapters[0].tensors)}, and no model",
            expected="the model that it was made for, as BASE",
            fix=f"ditmem convert BASE DEST --lora {file}",
        )
    if any(part.config.get("format") == FORMAT for part in source.parts):
        return UserError(
            f"{root} is converted already",
            fix=f"--config.weights.path={root} uses it; ditmem convert --export=diffusers {root} DEST leads back",
        )
    return UserError(
        f"{root} holds no {options.kind or 'network that we know'}",
        expected=f"tensors of one of: {', '.join(kinds.KINDS)}",
        found=f"{relatives.other(source.parts[0].tensors)}: {listed(source.parts[0].tensors)}",
        fix=f"ditmem convert {root} DEST" if options.kind else "ditmem convert SOURCE DEST, with a transformer, VAE "
        "or text encoder of Wan, or a memory encoder of DiT-Mem",
    )  # fmt: skip
