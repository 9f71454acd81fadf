"""What lies in a source: its files of weights, which of them belong together, and their tensors, none read yet.

A source is one file (`.safetensors`, `.pth`) or a folder, in the layout of the original models or of diffusers.
Files stand in the folder itself or in a subfolder of `FOLDERS`; shards belong together by their index or by their
numbers. Everything that is wrong with the files is told in one error.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ditmem_jax.errors import UserError
from ditmem_jax.storage.tensors import Stored, open_tensors
from ditmem_jax.storage.torch_files import load_torch, to_numpy

from .engine import findings, one_line

FOLDERS = (
    "high_noise_model",
    "low_noise_model",
    "transformer",
    "transformer_2",
    "vae",
    "text_encoder",
    "image_encoder",
)
TOKENIZERS = ("tokenizer.json", "google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json")
TORCH = ".pth"
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors")


@dataclasses.dataclass(frozen=True)
class Part:
    """Files that belong together, their tensors, and what a config.json beside them says."""

    files: tuple[Path, ...]
    tensors: dict[str, Stored]
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.files[0].parent

    def __str__(self) -> str:
        first, *others = self.files
        return f"{first} and {len(others)} more" if others else str(first)


@dataclasses.dataclass(frozen=True)
class Source:
    root: Path
    parts: list[Part]
    tokenizer: Path | None


def open_source(path: str | Path) -> Source:
    """Opens every file of weights in `path`, a file or a folder.

    Raises:
        UserError: with every file that is missing or damaged, and everything in which an index and its shards
            disagree.
    """
    root, problems, parts = Path(path), [], []
    if not root.exists():
        raise UserError(f"no such file or folder: {root}")
    folders = [root, *(root / name for name in FOLDERS)] if root.is_dir() else [root.parent]
    for folder in folders:
        groups = _groups(folder, problems) if root.is_dir() else {root.name: [root]}
        config = _config(folder / "config.json", problems)
        for files in groups.values():
            if tensors := _tensors(files, problems):
                parts.append(Part(tuple(files), tensors, config))
    if problems:
        raise findings(f"{root} cannot be used", problems)
    if not parts:
        raise UserError(
            f"no weights in {root}",
            expected="files named *.safetensors or *.pth",
            found=", ".join(sorted(p.name for p in root.iterdir())[:10]) or "no files",
        )
    tokenizers = [root / name for name in TOKENIZERS if root.is_dir() and (root / name).is_file()]
    return Source(root, parts, tokenizers[0] if tokenizers else None)


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    """The config.json at `path`, {} if there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} is damaged: {error}")
        return {}
    if not isinstance(config, dict):
        problems.append(f"{path} is damaged: it holds no object")
        return {}
    return config


def _groups(folder: Path, problems: list[str]) -> dict[str, list[Path]]:
    """The files of weights in a folder, by what they belong to."""
    files = [p for p in sorted(folder.glob("*")) if p.suffix in (".safetensors", TORCH) and p.is_file()]
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault(_stem(path), []).append(path)
    for paths in groups.values():
        if not (folder / (_stem(paths[0]) + INDEX)).is_file():  # an index knows better
            problems += [
                f"{folder / name} is missing: a shard of {paths[0]}" for name in _missing_shards(paths)
            ]
    for index in sorted(folder.glob("*" + INDEX)):
        stem = index.name.removesuffix(INDEX)
        groups[stem] = list(_indexed(index, groups.get(stem, []), problems))
    return groups


def _stem(path: Path) -> str:
    """The name that shards of one network share, and that their index begins with."""
    shard = SHARD.fullmatch(path.name)
    return shard.group(1) if shard else path.name


def _missing_shards(paths: list[Path]) -> Iterator[str]:
    """Names that the numbers in the names of shards lead to expect."""
    names = {path.name for path in paths}
    for name in sorted(names):
        if shard := SHARD.fullmatch(name):
            stem, total = shard.group(1), shard.group(3)
            for number in range(1, min(int(total), 999) + 1):
                expected = f"{stem}-{number:0{len(total)}}-of-{total}.safetensors"
                if expected not in names:
                    yield expected
            return


def _indexed(index: Path, found: list[Path], problems: list[str]) -> Iterator[Path]:
    """The shards that an index lists; what the index and the shards do not agree on goes to `problems`."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        listed: dict[str, set[str]] = {}
        for tensor, name in places.items():
            listed.setdefault(name, set()).add(tensor)
        if strange := [name for name in listed if Path(name).name != name]:
            raise ValueError(f"{strange[0]!r} is no name of a file beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problems.append(f"{index} is damaged: {error!r}")
        return
    for path in found:
        if path.name not in listed:
            problems.append(f"{path} is not in {index.name}")
    for name in sorted(listed):
        path = index.with_name(name)
        if not path.is_file():
            problems.append(f"{path} is missing: a shard of {index.name}")
            continue
        yield path
        try:
            tensors = open_tensors(path)[0].keys()
        except UserError:
            continue  # told when its tensors are wanted
        problems += [
            f"{tensor} is not in {path}, where {index.name} says it is"
            for tensor in sorted(listed[name] - tensors)
        ]
        problems += [
            f"{tensor} in {path} is not in {index.name}" for tensor in sorted(tensors - listed[name])
        ]


def _tensors(files: list[Path], problems: list[str]) -> dict[str, Stored]:
    """The tensors of files that belong together."""
    tensors, places = {}, {}
    for path in files:
        try:
            found = _read_pth(path) if path.suffix == TORCH else open_tensors(path)[0]
        except UserError as error:
            problems.append(one_line(error))
            continue
        problems += [f"{name} is in {places[name]} and in {path}" for name in found if name in places]
        tensors |= found
        places |= dict.fromkeys(found, path)
    return tensors


# --- torch files ------------------------------------------------------------------------------------------------


def _read_pth(path: Path) -> dict[str, Stored]:
    """Tensors of a torch file by name."""
    loaded = load_torch(path)
    import torch

    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in loaded.items()
    ):
        raise UserError(f"{path} holds something else than tensors by name", found=type(loaded).__name__)
    return {name: _from_torch(x) for name, x in loaded.items()}


def _from_torch(tensor: Any) -> Stored:
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Stored(tuple(tensor.shape), names.get(dtype, dtype), tensor.nbytes, lambda: to_numpy(tensor))
