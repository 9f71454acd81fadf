"""Low-rank adapters (LoRA) of others, merged into a transformer as it is converted.

A file holds, for a module of the transformer: two matrices whose product, times alpha / rank, is added to its weight
(`lora_A`/`lora_B` of peft and diffusers, `lora_down`/`lora_up` of kohya, musubi and ComfyUI), or a whole difference
(`diff`, `diff_b`, `diff_m`: of a weight, a bias, a modulation). Its names are original ones or those of diffusers, below
some prefix, with dots or with underscores. Sums are float32 and are rounded once, to the dtype that is written.

    ditmem convert BASE DEST --lora style.safetensors:0.8 --lora lightning_high.safetensors:1:high
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ditmem_jax.errors import UserError
from ditmem_jax.storage.tensors import Stored

from . import experts, names_diffusers
from .engine import findings, listed
from .sources import SUFFIXES, open_file

_ADAPTER = r"(?:\.(?!weight\Z|bias\Z)\w+)?"  # peft puts the name of an adapter behind lora_A
PARTS = {
    "down": re.compile(
        rf"(?:\.lora_A{_ADAPTER}|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)(?:\.weight)?\Z"
    ),
    "up": re.compile(
        rf"(?:\.lora_B{_ADAPTER}|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)(?:\.weight)?\Z"
    ),
    "up_bias": re.compile(rf"\.(?:lora_B{_ADAPTER}|lora_up)\.bias\Z"),
    "alpha": re.compile(r"\.(?:lora_)?alpha\Z"),
    "diff": re.compile(r"\.(?:diff|w_norm)\Z"),
    "diff_b": re.compile(r"\.(?:diff_b|b_norm)\Z"),
    "diff_m": re.compile(r"\.diff_m\Z"),
}
REFUSED = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoHa": re.compile(r"\.hada_[wt]\d"),
    "LoKr": re.compile(r"\.lokr_[wt]\d"),
    "OFT": re.compile(r"\.(?:oft|boft)_"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight\Z"),
    "LoCon with a middle factor": re.compile(r"\.lora_mid\."),
    "a control LoRA, which reshapes its base": re.compile(r"\.(?:reshape_weight|set_weight)\Z"),
}
_SIGN = re.compile(
    r"[._]lora[._]|\.lora_(?:A|B|up|down|linear_layer)|\.(?:diff|diff_b|diff_m|dora_scale)\Z|\.hada_|\.lokr_|\.oft_"
)
# Distilled models of few steps, by name, and how they sample: without guidance, at the levels that they were made for.
FEW_STEPS = (
    (r"causvid", dict(steps=6, shift=8.0)),
    (r"fast[-_]?wan", dict(steps=3, sigmas=(1.0, 0.757, 0.522))),
    (r"accvid", dict(steps=10, shift=5.0)),
    (r"light(?:x2v|ning)|self[-_ ]?forc|cfg[-_ ]?step|distill|[-_ ]dmd|turbo", dict(steps=4, shift=5.0)),
    (r"\d+[-_ ]?steps?(?![a-z0-9])", dict(steps=4, shift=5.0)),
)


@dataclasses.dataclass(frozen=True)
class Request:
    """One `--lora FILE[:strength[:role]]`. `role` None: the expert that its name tells."""

    path: Path
    strength: float = 1.0
    role: Literal["high", "low", "both"] | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.strength:g}" + (f":{self.role}" if self.role else "")


@dataclasses.dataclass(frozen=True)
class Change:
    """The addition of a file to one tensor: a product of two matrices, or a tensor of the same shape."""

    factor: float
    tensor: Stored
    down: Stored | None = None

    def size(self) -> int:
        """Elements of the tensor that it fits."""
        elements = int(np.prod(self.tensor.shape))
        return (
            elements
            if self.down is None
            else self.tensor.shape[0] * (int(np.prod(self.down.shape)) // self.down.shape[0])
        )

    def added_to(self, values: np.ndarray) -> None:
        """Adds to `values`, float32, some rows at a time."""
        factor, tensor = np.float32(self.factor), self.tensor.read()
        if self.down is None:
            values += factor * np.asarray(tensor, np.float32).reshape(values.shape)
            return
        rank = self.down.shape[0]
        down = np.asarray(self.down.read(), np.float32).reshape(rank, -1)
        up = np.asarray(tensor, np.float32).reshape(-1, rank) * factor
        flat = values.reshape(len(up), -1)
        for start in range(0, len(up), 1024):
            flat[start : start + 1024] += up[start : start + 1024] @ down


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened file: its changes by module and part, and what to tell of it."""

    path: Path
    tensors: dict[tuple[str, str], Stored]
    ranks: tuple[int, ...]
    alphas: "Alphas"

    def __str__(self) -> str:
        rank = f" of rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        return f"{self.path.name}: LoRA{rank}"


@dataclasses.dataclass(frozen=True)
class Alphas:
    """Alpha by module, where it stands beside the tensors: in adapter_config.json of peft, or in the metadata."""

    default: float | None = None
    patterns: Mapping[str, float] = dataclasses.field(default_factory=dict)
    by_root: bool = False

    def scale(self, module: str, rank: int) -> float:
        """The factor of the product; 1 where no alpha is told, as all programs take it."""
        alpha = self.default
        for pattern, value in self.patterns.items():
            if re.search(rf"(?:\A|\.){pattern}\Z", module):
                alpha = value
                break
        return 1.0 if alpha is None else alpha / (rank**0.5 if self.by_root else rank)


def parse(text: str) -> Request:
    """The request that FILE[:strength[:role]] writes.

    Raises:
        UserError: for a file that is not there, or a strength or role that is none.
    """
    path, *rest = [text] if Path(text).exists() else _split(text)
    fix = "ditmem convert BASE DEST --lora FILE:1.0:high, with high, low or both"
    if not Path(path).exists():
        raise UserError(f"--lora {text}: no such file: {path}", expected="FILE[:strength[:role]]", fix=fix)
    role = rest[1] if len(rest) > 1 else None
    try:
        strength = float(rest[0]) if rest and rest[0] else 1.0
    except ValueError:
        strength = float("nan")
    if not np.isfinite(strength) or role not in (None, "high", "low", "both"):
        raise UserError(f"--lora {text}", expected="FILE[:strength[:role]]", found=":".join(rest), fix=fix)
    return Request(Path(path), strength, role)


def _split(text: str) -> list[str]:
    """File, strength and role; a file may have colons of its own."""
    for count in (1, 2):
        path, *rest = text.rsplit(":", count)
        if len(rest) == count and Path(path).exists():
            return [path, *rest]
    return [text.split(":")[0] if not re.match(r"[A-Za-z]:[\\/]", text) else text]


def is_lora(names: Mapping[str, Any]) -> bool:
    """Return True for tensors of an adapter, and not of a network."""
    return any(_SIGN.search(name) for name in names)


def describe(names: Mapping[str, Any]) -> str:
    """An adapter in a few words: rank, and whose names it has."""
    ranks = sorted({x.shape[0] for name, x in names.items() if PARTS["down"].search(name)})
    kohya = any(re.match(r"(lora|lycoris)_\w+\.", name) for name in names)
    theirs = any(re.search(r"attn[12][._]to_", name) for name in names)
    naming = "kohya" if kohya else "diffusers" if theirs else "original"
    refused = next((kind for kind, sign in REFUSED.items() if any(map(sign.search, names))), "LoRA")
    return f"{refused}" + (f" of rank {', '.join(map(str, ranks))}" if ranks else "") + f", in {naming} names"


def open_adapter(path: Path) -> Adapter:
    """The tensors of an adapter's file, or of a folder that holds one, none of them read yet.

    Raises:
        UserError: if it is no LoRA, or one of a kind that cannot be merged, or is incomplete.
    """
    path = file_of(path)
    tensors, metadata = open_file(path)
    if not is_lora(tensors):
        raise UserError(
            f"--lora {path} is no LoRA",
            expected="names such as blocks.0.self_attn.q.lora_A.weight",
            found=listed(tensors),
            fix=f"ditmem convert {path} DEST, if it is a model",
        )
    for kind, sign in REFUSED.items():
        if any(map(sign.search, tensors)):
            raise UserError(
                f"{path} is {'a ' if kind[:2] != 'a ' else ''}{kind}, which is not merged here",
                expected="LoRA: two matrices for each module, or whole differences",
                fix="merge it with the program that made it, and convert the merged model: ditmem convert MERGED DEST",
            )
    parts, unknown = {}, []
    for name, tensor in tensors.items():
        part, stem = next(
            ((part, sign.sub("", name)) for part, sign in PARTS.items() if sign.search(name)), (None, name)
        )
        if part is None:
            unknown.append(name)
        elif (stem, part) in parts:
            raise UserError(
                f"{path} holds several adapters: {name} is there twice",
                fix="save one of them: model.save_pretrained(DIR, selected_adapters=[NAME])",
            )
        else:
            parts[stem, part] = tensor
    problems = [f"{listed(unknown)}: of no part of a LoRA"] if unknown else []
    for one, other in (("down", "up"), ("up", "down")):
        alone = [stem for stem, part in parts if part == one and (stem, other) not in parts]
        problems += [f"{listed(alone)}: {one} without {other}"] if alone else []
    ranks = sorted(
        {tensor.shape[0] for (_, part), tensor in parts.items() if part == "down" and tensor.shape}
    )
    if problems:
        raise findings(f"{path} is no whole LoRA", problems, fix="download it again, or save it again")
    return Adapter(path, parts, tuple(ranks), _alphas(path, metadata))


def file_of(path: Path) -> Path:
    """The file of an adapter that is given by its folder, as peft writes it."""
    if not path.is_dir():
        return path
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
    if len(files) != 1:
        raise UserError(
            f"--lora {path} is a folder with {len(files)} files of weights",
            found=", ".join(file.name for file in files) or None,
            fix=f"ditmem convert BASE DEST --lora {files[0] if files else path / 'FILE.safetensors'}",
        )
    return files[0]


def _alphas(path: Path, metadata: Mapping[str, str]) -> Alphas:
    """Alpha as peft and diffusers note it; tensors called alpha go before it."""
    beside = path.with_name("adapter_config.json")
    text = metadata.get("lora_adapter_metadata")
    try:
        if text is None and beside.is_file() and path.stem.startswith("adapter_model"):
            text = beside.read_text(encoding="utf-8")
        described = json.loads(text) if text else {}
        described = {key.removeprefix("transformer."): value for key, value in described.items()}
        alpha = described.get("lora_alpha")
        return Alphas(
            None if alpha is None else float(alpha),
            {name: float(value) for name, value in (described.get("alpha_pattern") or {}).items()},
            bool(described.get("use_rslora")),
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"the settings of {path} are damaged", found=error, fix=f"download {beside.name} again"
        ) from error


def merged(
    tensors: Mapping[str, Stored], canonical: Mapping[str, str], adapter: Adapter, strength: float
) -> tuple[dict[str, Stored], list[str], list[str]]:
    """Tensors of a transformer with an adapter added.

    Args:
        tensors: by the names of their file.
        canonical: those names in original spelling.
    Returns:
        the tensors, the names of those that were changed, and the modules of the adapter that are not there.
    Raises:
        UserError: with every matrix that does not fit, or if nothing of the adapter is there.
    """
    names = {original: name for name, original in canonical.items()}
    modules = _modules(names)
    changes: dict[str, list[Change]] = {}
    missing = []
    for (stem, part), tensor in adapter.tensors.items():
        if part in ("down", "alpha"):
            continue
        module = _resolved(stem, modules)
        down, target = None, None
        if module is not None:
            ends = {"diff_b": (".bias",), "up_bias": (".bias",), "diff_m": (".modulation",)}.get(
                part, (".weight", "")
            )
            target = next((module + end for end in ends if module + end in names), None)
        if target is None:
            missing.append(stem)
            continue
        factor = strength
        if part in ("up", "up_bias"):
            down = adapter.tensors[stem, "down"]
            factor *= _scale(adapter, stem, down.shape[0] if down.shape else 1)
        changes.setdefault(names[target], []).append(Change(factor, tensor, down if part == "up" else None))
    if not changes:
        raise UserError(
            f"nothing in {adapter.path} is a module of this transformer",
            expected="names such as blocks.0.self_attn.q",
            found=listed(missing),
            fix="a LoRA that was made for this model: see the page that it was downloaded from",
        )
    problems = [
        f"{name} {list(tensors[name].shape)}: the adapter is {list(change.tensor.shape)}"
        + (f" times {list(change.down.shape)}" if change.down else "")
        for name, those in changes.items()
        for change in those
        if not _fits(change, tensors[name].shape)
    ]
    if problems:
        raise findings(
            f"{adapter.path} does not fit this transformer",
            problems,
            fix="a LoRA that was made for a model of this size: see the page that it was downloaded from",
        )
    changed = {name: _changed(tensors[name], those) for name, those in changes.items()}
    return {**tensors, **changed}, list(changed), missing


def _scale(adapter: Adapter, stem: str, rank: int) -> float:
    if alpha := adapter.tensors.get((stem, "alpha")):
        return float(np.asarray(alpha.read(), np.float32).reshape(-1)[0]) / rank
    return adapter.alphas.scale(stem, rank)


def _fits(change: Change, shape: tuple[int, ...]) -> bool:
    if change.down is None:
        return int(np.prod(change.tensor.shape)) == int(np.prod(shape))
    rank, outputs = change.down.shape[0], change.tensor.shape[0]
    inputs = int(np.prod(change.down.shape[1:]))
    return int(np.prod(change.tensor.shape[1:])) == rank and (outputs, outputs * inputs) == (
        shape[0],
        int(np.prod(shape)),
    )


def _changed(base: Stored, changes: list[Change]) -> Stored:
    def read() -> np.ndarray:
        values = np.array(base.read(), np.float32)
        for change in changes:
            change.added_to(values)
        return values

    return dataclasses.replace(base, read=read)


def _modules(names: Mapping[str, str]) -> dict[str, str]:
    """Original path of every module and parameter, by all its spellings."""
    paths = {*names, *(name.rpartition(".")[0] for name in names)} - {""}
    paths |= {name.removesuffix(".modulation") for name in names}
    found = {}
    for path in paths:
        for spelled in (path, names_diffusers.renamed(names_diffusers.DIT, path)):
            found[spelled] = path
            found.setdefault(spelled.replace(".", "_"), path)
    return found


def _resolved(stem: str, modules: Mapping[str, str]) -> str | None:
    """The module that a name of an adapter means, whatever stands before it."""
    for separator in ".", "_":
        rest = stem
        while rest:
            if rest in modules:
                return modules[rest]
            if separator == "_" and "." in rest:
                break
            rest = rest.partition(separator)[2]
    return None


def sampling(name: str, two: bool) -> str | None:
    """Settings of `ditmem sample` for a distilled model of few steps, told by its name; None for another."""
    for pattern, settings in FEW_STEPS:
        if re.search(f"(?i){pattern}", name):
            if steps := re.search(r"(?i)(?<!\d)(\d{1,2})[-_ ]?steps?", name):
                settings = settings | (dict(steps=int(steps[1])) if "sigmas" not in settings else {})
            settings = settings | dict(guidance=1.0) | (dict(guidance_high=1.0) if two else {})
            return " ".join(
                f"--config.sample.{key}={str(value).replace(' ', '')}" for key, value in settings.items()
            )
    return None


def for_expert(request: Request, network_names: Mapping[str, experts.Expert | None]) -> list[str]:
    """The networks that an adapter is merged into.

    Args:
        network_names: of the transformers of a source, and which expert each is, None for a single one.
    Raises:
        UserError: if nothing tells which of two, or the one that it is for is not there.
    """
    told = request.role or experts.by_name(request.path.name)
    if told == "both" or (None in network_names.values() and request.role is None):
        return list(network_names)
    if told is None and len(network_names) == 1:
        return list(network_names)
    if told is None:
        raise UserError(
            f"--lora {request}: which of the two transformers is it for? its name does not tell",
            expected="high or low in its name, or as its role",
            fix=f"--lora {request.path}:{request.strength:g}:high, or :low, or :both",
        )
    if fitting := [name for name, expert in network_names.items() if expert == told]:
        return fitting
    raise UserError(
        f"--lora {request} is for the expert for {told} noise, which the source does not hold",
        found=", ".join(
            f"{name} ({expert or 'a single transformer'})" for name, expert in network_names.items()
        ),
        fix=f"--lora {request.path}:{request.strength:g}, or with the role of what is there",
    )
