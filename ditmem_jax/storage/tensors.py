"""Safetensors files tensor by tensor: mapped into memory while one is read, written in pieces as they come.

The safetensors library checks that a file is whole. It does not tell where a tensor lies, and without that a file
can only be mapped at once, which counts as memory; so the header, a JSON text, is read here too.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from ditmem_jax.errors import UserError
from ditmem_jax.storage.digests import as_bytes
from ditmem_jax.storage.files import reading, replacing

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
}
READ_ONLY = {  # what files of others hold beside
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64  # bytes; devices that share the memory of the host then use arrays where they are mapped
POINTER = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on disk. `dtype` is its name in the file, which is not always one that numpy has.

    `quantised` names the format of fewer bits from which `read` makes values of that dtype.
    """

    shape: tuple[int, ...]
    dtype: str
    size: int
    read: Callable[[], np.ndarray]
    quantised: str = ""

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype, copy=copy)


def open_tensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file by name, none of them read yet, and the file's metadata.

    Raises:
        UserError: if the file is missing or damaged, or holds a name twice or one that cannot be printed.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(POINTER))
        if start == POINTER:
            raise UserError(
                f"{path} is a pointer to weights, not the weights", fix=f"git lfs pull --include {path.name}"
            )
        safetensors.safe_open(path, framework="np")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            pairs = json.loads(file.read(length), object_pairs_hook=list)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(
            f"cannot read {path}", expected="a whole safetensors file", found=error, fix="download it again"
        ) from error
    counts = Counter(name for name, _ in pairs)
    if strange := sorted(name for name in counts if not name.isprintable() or counts[name] > 1):
        raise UserError(
            f"{path} has names that are damaged or stand twice", found=", ".join(map(ascii, strange))
        )
    entries = {name: dict(entry) for name, entry in pairs}
    metadata = entries.pop("__metadata__", {})
    return {name: _stored(path, 8 + length, entry) for name, entry in entries.items()}, metadata


def _stored(path: Path, offset: int, entry: Mapping) -> Stored:
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]

    def read() -> np.ndarray:
        dtype = (DTYPES | READ_ONLY)[entry["dtype"]]
        if start == stop:
            return np.zeros(shape, dtype)
        with reading(path):
            return np.memmap(path, dtype, "r", offset + start, shape)

    return Stored(shape, entry["dtype"], stop - start, read)


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in another dtype, aligned so that it need not be copied once more."""
    if array.dtype == dtype:
        return array
    size = array.size * np.dtype(dtype).itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    out = buffer[start : start + size].view(dtype).reshape(array.shape)
    out[...] = array
    return out


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Any],
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: dict[str, str],
) -> None:
    """Writes a safetensors file piece by piece, so that a network larger than the memory can pass through.

    Args:
        shapes: anything with the shape and dtype of each array, in the order in which they are written.
        arrays: name and values; an array may come in several pieces along its leading axis.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, x in shapes.items():
        size = int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize
        header[name] = {
            "dtype": NAMES[np.dtype(x.dtype)],
            "shape": list(x.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    written = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in arrays:
            start, stop = header[name]["data_offsets"]
            assert array.dtype == shapes[name].dtype and start <= written <= written + array.nbytes <= stop
            file.write(as_bytes(array))
            written += array.nbytes
        assert written == offset, f"{offset} bytes were announced, {written} came"
