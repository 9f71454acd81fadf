"""Weight files of a source, grouped into parts, with their tensors opened but not read.

A source is one file or a folder: of original files, of diffusers, of ComfyUI, or the hub's cache. Files stand in the
folder itself or in a subfolder of `FOLDERS`; shards belong together by their index or by their numbers. Everything
that is wrong with the files is told in one error.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import reading
from ditmem_jax.storage.gguf_files import open_gguf
from ditmem_jax.storage.tensors import POINTER, Stored, open_tensors
from ditmem_jax.storage.torch_files import load_torch, to_numpy

from .engine import findings, one_line

COMFY = ("diffusion_models", "unet", "vae", "text_encoders", "clip", "checkpoints")
FOLDERS = (
    "high_noise_model", "low_noise_model", "high_noise", "low_noise", "HighNoise", "LowNoise", "transformer",
    "transformer_2", "vae", "VAE", "text_encoder", "image_encoder",
    *(f"{tree}{name}" for tree in ("", "split_files/", "models/") for name in COMFY if tree or name != "vae"),
)  # fmt: skip
TOKENIZERS = ("tokenizer.json", "google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json")
SAFETENSORS = (".safetensors", ".sft")
TORCH = (".pth", ".pt", ".ckpt", ".bin")
GGUF = ".gguf"
SUFFIXES = (*SAFETENSORS, *TORCH, GGUF)
SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})(\.\w+)")
INDEX = re.compile(r"(.+)(\.safetensors|\.bin)\.index(\.\w+)?\.json")
VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8\w*|ema|non_ema)$")
TRAINING = re.compile(
    r"(?i)(optim|scheduler|scaler|rng_state|random_states|training_args|trainer_state)\w*\."
)
DEPTH = 12  # of containers in a torch file


@dataclasses.dataclass(frozen=True)
class Part:
    """Files that belong together, their tensors, and what lies beside them.

    `config` is the config.json of their folder, `pipeline` the model_index.json of the pipeline that they are a part
    of; `metadata` stands in the header of the file. `prefix` stood before every name in the file.
    """

    files: tuple[Path, ...]
    tensors: dict[str, Stored]
    config: dict[str, Any]
    pipeline: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = ""

    @property
    def folder(self) -> Path:
        return self.files[0].parent

    def __str__(self) -> str:
        first, *others = self.files
        under = f" (under {self.prefix})" if self.prefix else ""
        return (f"{first} and {len(others)} more" if others else str(first)) + under


@dataclasses.dataclass(frozen=True)
class Source:
    """Parts of a source, its tokenizer, and what in it is no weights: file and reason."""

    root: Path
    parts: list[Part]
    tokenizer: Path | None
    left_out: tuple[tuple[str, str], ...] = ()


def open_source(path: str | Path) -> Source:
    """Open every file of weights in `path`: a file, an index of shards, or a folder.

    Raises:
        UserError: with every file that is missing or damaged, and everything in which an index and its shards
            disagree.
    """
    given = Path(path)
    if not given.exists():
        raise UserError(f"no such file or folder: {given}", fix="ls " + str(_existing(given)))
    root = _snapshot(given)
    problems, parts, left_out = [], [], []
    folders = _folders(root) if root.is_dir() else [root.parent]
    for folder in folders:
        if root.is_dir():
            groups = _groups(folder, problems, left_out)
        elif INDEX.fullmatch(root.name):
            groups = {root.name: list(_indexed(root, [], problems))}
        else:
            _check_whole(root)
            groups = {root.name: [root]}
        config = _config(folder / "config.json", problems)
        pipeline = _config(folder.absolute().parent / "model_index.json", problems)
        for files in groups.values():
            tensors, metadata = _tensors(files, problems)
            if tensors:
                parts.append(Part(tuple(files), tensors, config, pipeline, metadata))
    if problems:
        raise findings(f"{root} cannot be used", problems, fix=_fix(problems, root))
    if not parts:
        raise _nothing(given, root)
    tokenizers = [root / name for name in TOKENIZERS if root.is_dir() and (root / name).is_file()]
    return Source(root, parts, tokenizers[0] if tokenizers else None, tuple(left_out))


def _existing(path: Path) -> Path:
    return next((parent for parent in path.parents if parent.exists()), Path("."))


def _folders(root: Path) -> list[Path]:
    """The folder and those of `FOLDERS` below it, each once even where the file system ignores case."""
    found = {}
    for folder in (root, *(root / name for name in FOLDERS)):
        if folder.is_dir():
            found.setdefault(folder.stat().st_ino, folder)
    return list(found.values())


def _snapshot(root: Path) -> Path:
    """The files themselves, for a folder of the hub's cache: those of the revision that was downloaded last.

    Raises:
        UserError: if it holds several repositories, or several revisions of which none is the main one.
    """
    repositories = sorted(root.glob("models--*")) if root.is_dir() else []
    if len(repositories) > 1:
        raise UserError(
            f"{root} is a cache of {len(repositories)} repositories",
            found=", ".join(folder.name for folder in repositories[:10]),
            fix=f"ditmem convert {repositories[0]} DEST, or another of them",
        )
    root = repositories[0] if repositories else root
    revisions = sorted((root / "snapshots").glob("*")) if (root / "blobs").is_dir() else []
    if not revisions:
        return root
    main = root / "refs" / "main"
    if main.is_file():
        wanted = root / "snapshots" / main.read_text(encoding="utf-8").strip()
        if wanted in revisions:
            return wanted
    if len(revisions) > 1:
        raise UserError(
            f"{root} holds several revisions",
            found=", ".join(folder.name for folder in revisions),
            fix=f"ditmem convert {revisions[0]} DEST, or another of them",
        )
    return revisions[0]


def _check_whole(path: Path) -> None:
    """Raise a UserError for one shard of many, which can only be used with the others."""
    if shard := SHARD.fullmatch(path.name):
        raise UserError(
            f"{path} is one of {int(shard[3])} shards",
            expected="all of them, by their folder",
            fix=f"ditmem convert {path.parent} DEST",
        )


def _fix(problems: list[str], root: Path) -> str:
    """The command that mends the first problem that has one."""
    for problem in problems:
        if found := re.search(r"; fix: (.+)", problem):
            return found[1]
    return (
        f"download {root} again: hf download REPOSITORY --local-dir {root if root.is_dir() else root.parent}"
    )


def _nothing(given: Path, root: Path) -> UserError:
    """The error for a folder without weights, with the folders below it that hold some."""
    below = sorted(
        {
            path.parent
            for depth in ("*/", "*/*/", "*/*/*/")
            for path in root.glob(depth + "*")
            if _is_weights(path)
        }
    )
    if below:
        return UserError(
            f"no weights in {given}, but in {len(below)} folder" + "s" * (len(below) > 1) + " below it",
            found=", ".join(str(folder) for folder in below[:10]),
            fix=f"ditmem convert {below[0]} DEST" + ", or another of them" * (len(below) > 1),
        )
    distributed = next(root.glob("*.distcp"), None)
    return UserError(
        f"no weights in {given}",
        expected=f"files named {', '.join('*' + suffix for suffix in SUFFIXES)}",
        found=", ".join(sorted(p.name for p in root.iterdir())[:10]) or "no files",
        fix=f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {root} {root.name}.pt, then convert that"
        if distributed
        else "ditmem convert SOURCE DEST, with the file or folder of the weights",
    )


def _is_weights(path: Path) -> bool:
    return path.suffix in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object at `path`, {} if there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path} is damaged: {error}")
        return {}
    if not isinstance(config, dict):
        problems.append(f"{path} is damaged: it holds no object")
        return {}
    return config


def _groups(folder: Path, problems: list[str], left_out: list[tuple[str, str]]) -> dict[str, list[Path]]:
    """The files of weights in a folder, by what they belong to."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        if not _is_weights(path):
            continue
        if TRAINING.match(path.name):
            left_out.append((str(path), "the state of a training program, no weights"))
        else:
            groups.setdefault(_stem(path), []).append(path)
    indices = {
        _index_stem(path): path for path in sorted(folder.glob("*.json")) if INDEX.fullmatch(path.name)
    }
    for stem, paths in groups.items():
        if stem not in indices:  # an index knows better
            problems += [
                f"{folder / name} is missing: a shard of {paths[0]}" for name in _missing_shards(paths)
            ]
    for stem, index in indices.items():
        groups[stem] = list(_indexed(index, groups.get(stem, []), problems))
    for stem, paths in groups.items():
        others = [other for other in groups if other != stem and _plain(other) == _plain(stem)]
        if others and paths:
            names = sorted([*(str(indices.get(other, groups[other][0])) for other in others if groups[other]),
                            str(indices.get(stem, paths[0]))])  # fmt: skip
            raise UserError(
                f"{folder} holds the same weights in {len(names)} variants",
                expected="one of them, which nothing tells",
                found=", ".join(Path(name).name for name in names),
                fix=" or ".join(f"ditmem convert {name} DEST" for name in names),
            )
    return groups


def _stem(path: Path) -> str:
    """The name that shards of one network share, and that their index begins with."""
    shard = SHARD.fullmatch(path.name)
    return shard[1] + shard[4] if shard else path.name


def _index_stem(path: Path) -> str:
    name, suffix, variant = INDEX.fullmatch(path.name).groups()
    return name + (variant or "") + suffix


def _plain(stem: str) -> str:
    """The name of a file without what tells its variant: its dtype and its container."""
    name, _, _ = stem.rpartition(".")
    return VARIANT.sub("", name)


def _missing_shards(paths: list[Path]) -> Iterator[str]:
    """Names that the numbers in the names of shards lead to expect."""
    names = {path.name for path in paths}
    for name in sorted(names):
        if shard := SHARD.fullmatch(name):
            stem, _, total, suffix = shard.groups()
            for number in range(1, min(int(total), 999) + 1):
                expected = f"{stem}-{number:0{len(total)}}-of-{total}{suffix}"
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
            tensors = open_file(path)[0].keys()
        except UserError:
            continue  # told when its tensors are wanted
        problems += [
            f"{tensor} is not in {path}, where {index.name} says it is"
            for tensor in sorted(listed[name] - tensors)
        ]
        problems += [
            f"{tensor} in {path} is not in {index.name}" for tensor in sorted(tensors - listed[name])
        ]


def _tensors(files: list[Path], problems: list[str]) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of files that belong together, and the metadata of the first."""
    tensors, places, metadata = {}, {}, {}
    for path in files:
        try:
            found, header = open_file(path)
        except UserError as error:
            problems.append(one_line(error))
            continue
        problems += [f"{name} is in {places[name]} and in {path}" for name in found if name in places]
        tensors |= found
        places |= dict.fromkeys(found, path)
        metadata = metadata or header
    return tensors, metadata


def open_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors and metadata of one file, by its suffix, or by its content where the suffix says nothing."""
    with reading(path), open(path, "rb") as file:
        start = file.read(9)
    if path.suffix in SAFETENSORS or start[8:] == b"{":
        return open_tensors(path)
    if path.suffix == GGUF or start[:4] == b"GGUF":
        if start == POINTER[: len(start)]:
            return open_tensors(path)  # tells it to be a pointer
        return open_gguf(path)
    return (read_torch(path), {}) if path.suffix in TORCH else open_tensors(path)


# --- torch files ------------------------------------------------------------------------------------------------


def read_torch(path: Path) -> dict[str, Stored]:
    """Tensors of a torch file by name; those inside of other containers get dotted names."""
    loaded = load_torch(path)
    tensors = dict(_flat(loaded, "", DEPTH)) if isinstance(loaded, dict) else {}
    if not tensors:
        raise UserError(
            f"{path} holds something else than tensors by name",
            found=type(loaded).__name__,
            fix="torch.save(model.state_dict(), FILE) writes tensors by name",
        )
    return {name: _from_torch(x) for name, x in tensors.items()}


def _flat(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value.detach()
    elif depth and isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            if isinstance(key, str | int):
                yield from _flat(inner, f"{name}.{key}" if name else str(key), depth - 1)


def _from_torch(tensor: Any) -> Stored:
    names = {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
        "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    }  # fmt: skip
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Stored(tuple(tensor.shape), names.get(dtype, dtype), tensor.nbytes, lambda: to_numpy(tensor))
