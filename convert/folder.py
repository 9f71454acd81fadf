"""Folders of converted weights: written whole or not at all, completed network by network, checked.

A new folder is made under a hidden name beside its place and renamed at the end. A network that is added to a
folder is not part of it until config.json says so, which is written last. Values pass through in blocks.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ditmem_jax.config import to_dict
from ditmem_jax.errors import UserError
from ditmem_jax.storage.digests import as_bytes, crc32, of_file, sealed
from ditmem_jax.storage.encoders import save_encoder
from ditmem_jax.storage.files import cache_folder, reading, replacing, write_text
from ditmem_jax.storage.locks import owned
from ditmem_jax.storage.tensors import Stored, open_tensors, write_safetensors
from ditmem_jax.storage.weights import PARTS, empty_index, read_index

from . import dequantise, lora
from .engine import canonical, convert, differences, findings, one_line, stream
from .plan import DEFAULTS, FILES, Network, Options, plan
from .sources import Source, open_source

TOKENIZER = "tokenizer.json"
UNREAD = "unread.safetensors"  # of a memory encoder: what no program computes with, kept for its export
BLOCK = 32 << 20  # bytes that are in memory at once, beside one mapped tensor

Advance = Callable[[int], None]
"""Told of every number of bytes that are done; see `work` for how many there are."""


def converted(source: str | Path) -> str:
    """Return the converted form of a small folder of weights, made on first use in the user's cache.

    Its name is a hash of the content, so weights that change are converted anew.

    Raises:
        UserError: if `source` is no such folder, or the cache cannot be written.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(source).iterdir() if path.is_file() and path.suffix != ".py"):
        digest.update(path.read_bytes())
    target = cache_folder("weights") / digest.hexdigest()[:12]
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Processes that begin together make one each, and the first one's stays.
            with tempfile.TemporaryDirectory(dir=target.parent) as own:
                made = Path(own, target.name)
                convert_checkpoint(source, made)
                try:
                    made.rename(target)
                except OSError:
                    if not target.exists():
                        raise
        except OSError as error:
            raise UserError(
                f"cannot write {target}",
                found=error,
                fix="set XDG_CACHE_HOME to a folder that can be written",
            ) from error
    return str(target)


def convert_checkpoint(source: str | Path, target: str | Path, options: Options = DEFAULTS) -> None:
    """Convert all weights in `source` that are known, to the folder `target` for `config.weights.path`.

    Args:
        source: folder or file of weights of Wan or DiT-Mem, in any of the names and containers of `sources`.
        target: a new folder, or one of converted weights that lacks them.
        options: choices that the files leave.
    Raises:
        UserError: with every finding: tensors that are unknown, missing or of another shape, and as `write_folder`.
    """
    opened = open_source(source)
    write_folder(opened, plan(opened, options), target)


def write_folder(
    source: Source, networks: list[Network], target: str | Path, advance: Advance = lambda _: None
) -> None:
    """Writes networks of a source to `target`, a new folder or one of converted weights that lacks them.

    Raises:
        UserError: with every finding: values that are not finite, aliases that differ; for a target that is
            something else, holds one of the networks or has another tokenizer; and if the disk is full or fails.
    """
    target = Path(target)
    index = read_index(target) if target.exists() else empty_index()
    check_target(networks, target, index)
    tokenizer = tokenizer_for(source, networks, target)
    with new_folder(target) as unfinished:
        _write(source, networks, tokenizer, unfinished, index, advance)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `target` whose files appear in `target` when the block has succeeded.

    Every OSError of the block counts as one of writing: what it reads, it reads with `reading`.

    Raises:
        UserError: if the disk is full or fails.
    """
    unfinished = target.with_name(f".{target.name}.unfinished")
    with owned(target):
        yield from _fill(target, unfinished)


def _fill(target: Path, unfinished: Path) -> Iterator[Path]:
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        unfinished.mkdir()
        yield unfinished
        _sync(unfinished)
        if target.exists():
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, target / path.name)
            _sync(target)
        else:
            unfinished.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {target}", found=error, fix="free space on the disk, or another target"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_target(networks: list[Network], target: Path, index: dict[str, Any]) -> None:
    """Raises a UserError if `target` holds one of the networks or its disk has no room for them."""
    if held := [network.role for network in networks if network.role in index["networks"]]:
        raise UserError(
            f"{target} exists and holds {', '.join(held)}",
            fix=f"another target; or delete it first: rm -r {target}",
        )
    existing = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    needed, free = sum(network.size for network in networks), shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"no room for {target}",
            expected=f"{needed:,} bytes",
            found=f"{free:,} bytes free on its disk",
            fix="free space, another DEST, or --dtype=bfloat16",
        )


def tokenizer_for(source: Source, networks: list[Network], target: Path) -> Path | None:
    """The tokenizer of a source if it goes to `target`: with a text encoder, or where there is none yet.

    Raises:
        UserError: if `target` has another one than the text encoder of the source.
    """
    held = target / TOKENIZER
    if source.tokenizer is None or not held.exists():
        return source.tokenizer
    if all(network.role != "text" for network in networks):
        return None
    if (found := of_file(held)) != (expected := of_file(source.tokenizer)):
        raise UserError(
            f"{held} is not the tokenizer of this text encoder",
            expected=f"sha256 {expected}, as {source.tokenizer} has",
            found=f"sha256 {found}",
            fix="another target, or delete it first",
        )
    return source.tokenizer


def work(networks: list[Network]) -> int:
    """Bytes that `write_folder` tells of: every file read for its hash, every array written."""
    files = {path for network in networks for path in network.part.files}
    return sum(path.stat().st_size for path in files) + sum(network.size for network in networks)


def _write(
    source: Source,
    networks: list[Network],
    tokenizer: Path | None,
    folder: Path,
    index: dict[str, Any],
    advance: Advance,
) -> None:
    problems = []
    for network in networks:
        path = folder / FILES[network.role]
        if network.kind == "memory":
            sums, rounding = _write_encoder(network, path, problems, advance), 0.0
        else:
            sums, rounding = _write_network(network, path, problems, advance)
        index["networks"][network.role] = to_dict(network.config)
        provenance = _provenance(source, network, advance)
        index["provenance"][network.role] = provenance | ({"rounding": rounding} if rounding else {})
        index["checksums"][path.name] = sums
    if problems:
        raise findings(
            f"the weights in {source.root} are not usable",
            problems,
            fix="download or save them again; for values too large for --dtype=bfloat16 or float16: --dtype=float32",
        )
    if tokenizer:
        with reading(tokenizer):
            content = tokenizer.read_bytes()
        with replacing(folder / TOKENIZER) as temporary:
            temporary.write_bytes(content)
        index["checksums"][TOKENIZER] = of_file(folder / TOKENIZER)
    for part in PARTS:  # in one order, whatever the calls that filled them
        index[part] = dict(sorted(index[part].items()))
    write_text(folder / "config.json", json.dumps(sealed(index), indent=1) + "\n")


def _write_network(
    network: Network, path: Path, problems: list[str], advance: Advance
) -> tuple[dict[str, str], float]:
    """Writes the arrays of a network block by block; returns their checksums, and by how much rounding
    changes them, relative to their norm."""
    sums = dict.fromkeys(network.wanted, 0)
    unequal = differences(network.match.equal, network.part.tensors)
    problems += [f"{network.part}: {problem}" for problem in unequal]
    lost, whole = 0.0, 0.0

    def pieces() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal lost, whole
        for target, _, name, values in stream(network.match.assignments, network.part.tensors):
            finite, dtype, start = True, network.wanted[target].dtype, 0
            for block in blocks(values, dtype):
                finite = finite and bool(np.isfinite(block).all())
                sums[target] = crc32([block], sums[target])
                if dtype != values.dtype and finite:
                    part = np.atleast_1d(values)[start : start + len(block)]
                    lost, whole = lost + _squares(part, block), whole + _squares(part)
                start += len(block)
                yield target, block
                advance(block.nbytes)
            if not finite:
                problems.append(f"{network.part}: {name} holds values that are not finite")

    write_safetensors(path, network.wanted, pieces(), {})
    return {target: f"{value:08x}" for target, value in sums.items()}, math.sqrt(
        lost / whole
    ) if whole else 0.0


def _squares(values: np.ndarray, less: np.ndarray | None = None) -> float:
    """The sum of the squares of values, or of what they differ by from others."""
    values = np.asarray(values, np.float32)
    values = (values if less is None else values - np.asarray(less, np.float32)).reshape(-1)
    return float(np.dot(values, values))


def _write_encoder(network: Network, path: Path, problems: list[str], advance: Advance) -> dict[str, str]:
    """Writes a memory encoder as training saves it; it is small enough to be in memory."""
    try:
        arrays = convert(network.table, network.part.tensors, network.wanted)
    except UserError as error:
        problems.append(f"{network.part}: {one_line(error)}")
        return {}
    save_encoder(path, arrays, network.config, {})
    tensors = network.part.tensors
    unread = {canonical(network.table, name): tensors[name].read() for name in network.match.ignored}
    write_safetensors(path.with_name(UNREAD), unread, unread.items(), {})
    advance(network.size)
    return {name: f"{crc32([array]):08x}" for name, array in arrays.items()}


def blocks(values: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """`values` from front to back in another dtype, about `BLOCK` bytes at a time."""
    values = values.reshape(-1) if values.ndim == 0 else values
    rows = max(1, BLOCK // max(1, values[:1].nbytes))
    for start in range(0, len(values), rows):
        with np.errstate(
            over="ignore"
        ):  # what is too large for the dtype becomes infinite, and is told as such
            block = np.ascontiguousarray(values[start : start + rows]).astype(dtype, copy=False)
        yield block


def _provenance(source: Source, network: Network, advance: Advance) -> dict[str, Any]:
    """Where a network comes from; no times and no places, so that the same source gives the same bytes."""
    root = source.root if source.root.is_dir() else source.root.parent
    files = []
    for path in network.part.files:
        digest, size = of_file(path), path.stat().st_size
        files.append({"name": str(path.relative_to(root)), "bytes": size, "sha256": digest})
        advance(size)
    known = {
        "kind": network.kind,
        "names": network.naming,
        "files": files,
        "tool": f"ditmem_jax {_version()}",
    }
    if network.part.prefix:
        known["prefix"] = network.part.prefix
    if formats := dequantise.summary(network.part.tensors):
        known["quantised"] = formats
    if network.merged:
        known["loras"] = [
            {"name": request.path.name, "strength": request.strength, "role": request.role, "sample": settings,
             "sha256": of_file(lora.file_of(request.path))}
            for request, settings in network.merged
        ]  # fmt: skip
    return known


def _version() -> str:
    try:
        return importlib.metadata.version("ditmem_jax")
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"


def _sync(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- checks -----------------------------------------------------------------------------------------------------


def damage(folder: str | Path) -> list[str]:
    """Problems of a converted folder by its own checksums."""
    folder, problems = Path(folder), []
    checksums = read_index(folder)["checksums"]
    if expected := checksums.pop(TOKENIZER, None):
        if not (folder / TOKENIZER).is_file():
            problems.append(f"{TOKENIZER} is missing")
        elif (found := of_file(folder / TOKENIZER)) != expected:
            problems.append(f"{TOKENIZER} has sha256 {found}, {expected} was written")
    for name, sums in checksums.items():
        try:
            stored, _ = open_tensors(folder / name)
        except UserError as error:
            problems.append(one_line(error))
            continue
        problems += [f"{name}: {path} is missing" for path in sorted(sums.keys() - stored.keys())]
        problems += [f"{name}: {path} is unknown" for path in sorted(stored.keys() - sums.keys())]
        problems += [
            f"{name}: {path} has checksum {found}, {sums[path]} was written"
            for path in sorted(sums.keys() & stored.keys())
            if (found := _checksum(stored[path])) != sums[path]
        ]
    return problems


def _checksum(stored: Stored) -> str:
    """CRC-32 of a tensor, mapped anew for each block, since pages that are mapped and read count as memory."""
    value, length = 0, stored.shape[0] if stored.shape else 1
    rows = max(1, BLOCK * length // max(1, stored.size))
    for start in range(0, length, rows):
        value = crc32([np.atleast_1d(stored.read())[start : start + rows]], value)
    return f"{value:08x}"


def deviations(networks: list[Network], folder: str | Path) -> Iterator[tuple[str, int, str | None]]:
    """Compares a converted folder with its source, tensor by tensor.

    Yields the source's name, the bytes of its values in the folder, and what is wrong with them.
    """
    folder = Path(folder)
    index = read_index(folder)
    for network in networks:
        if index["networks"].get(network.role) != to_dict(network.config):
            yield network.role, network.size, f"{folder} holds no {network.role} of this configuration"
            continue
        stored, _ = open_tensors(folder / FILES[network.role])
        for target, layer, name, values in stream(network.match.assignments, network.part.tensors):
            size = values.size * network.wanted[target].dtype.itemsize
            place = layer if network.match.assignments[target].stacked else ...
            yield name, size, _deviation(stored, target, place, values)


def _deviation(stored: dict, target: str, place: Any, values: np.ndarray) -> str | None:
    if target not in stored:
        return f"{target} is missing"
    array = stored[target].read()[place]
    if array.shape != values.shape:
        return f"{target} has another shape"
    array, start = array.reshape(-1) if array.ndim == 0 else array, 0
    for block in blocks(values, array.dtype):
        if as_bytes(block) != as_bytes(array[start : start + len(block)]):
            return f"{target} holds other values"
        start += len(block)
    return None
