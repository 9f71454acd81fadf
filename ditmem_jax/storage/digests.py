"""Digests of files, of arrays and of JSON values: one of each kind for the whole library."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import reading

SEAL = "sha256"


def of_file(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal; a UserError where it cannot be read."""
    with reading(Path(path)), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_json(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values by name with a digest of all of them, as `sha256`; see `unsealed`."""
    return dict(values) | {SEAL: of_json(values)}


def unsealed(values: Mapping[str, Any], name: object, fix: str | None = None) -> dict[str, Any]:
    """The values that `sealed` was given.

    Raises:
        UserError: if any of it, or its digest, is not as it was written; `name` says where it was read.
    """
    rest = {key: value for key, value in values.items() if key != SEAL}
    if (found := of_json(rest)) != values.get(SEAL):
        raise UserError(
            f"{name} was altered", expected=f"{SEAL} {values.get(SEAL)}", found=f"{SEAL} {found}", fix=fix
        )
    return rest


def of_arrays(arrays: Mapping[str, Any]) -> str:
    """SHA-256 of arrays by name: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(as_bytes(array))
    return digest.hexdigest()


def crc32(blocks: Iterable[np.ndarray], value: int = 0) -> int:
    """CRC-32 of the bytes of arrays one after the other, for values that stream by; `value` is that of those before."""
    for block in blocks:
        value = zlib.crc32(as_bytes(block), value)
    return value


def as_bytes(array: np.ndarray) -> memoryview | bytes:
    """The bytes of an array in the order of its axes, without a copy where they lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
