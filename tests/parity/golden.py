"""Golden files and what is checked of them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ditmem_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class GoldenFile:
    """Inputs, weights and outputs of a released program; `meta` is the decoded header."""

    path: Path
    tensors: dict[str, np.ndarray]
    meta: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> "GoldenFile":
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no such golden file: {path}")
        try:
            with safe_open(path, framework="np") as file:
                meta = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
                return cls(path, {key: file.get_tensor(key) for key in file.keys()}, meta)  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from None

    def sibling(self, name: str) -> "GoldenFile":
        """The file in the same folder that the note names ("weights are those of NAME"), by default `name`."""
        named = re.search(r"those of (\w[\w-]*)", self.meta.get("note", ""))
        return GoldenFile.read(self.path.with_name(f"{named.group(1) if named else name}.safetensors"))

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """The tensors whose names start with `prefix`, without it."""
        return {
            key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)
        }


@dataclasses.dataclass(frozen=True)
class Check:
    """One quantity: what we got, what the released program got, and the limit of their relative L2 distance."""

    name: str
    got: np.ndarray
    want: np.ndarray
    limit: float = 1e-5

    @property
    def error(self) -> float:
        got, want = np.asarray(self.got, np.float64), np.asarray(self.want, np.float64)
        if got.shape != want.shape:
            return float("inf")
        scale = np.linalg.norm(want)
        return float(np.linalg.norm(got - want) / (scale if scale > 0 else 1.0))

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN
