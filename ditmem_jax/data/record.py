"""One encoded video, and its bytes: a safetensors file with all that is not an array as metadata."""

import dataclasses
import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from jaxtyping import Float

from ditmem_jax.data.video import Facts, Stamp

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SAFETENSORS_DTYPES = {"F32": DTYPES["float32"], "BF16": DTYPES["bfloat16"]}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A record without its arrays. `extra` holds whatever else the user's table says about the video."""

    id: str
    caption: str
    source: str
    extra: dict[str, str] = dataclasses.field(default_factory=dict, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Record(Entry):
    """One encoded video: normalised VAE latents, and its caption's embedding without padding.

    `facts` are of the video that the latents were made from, and `stamp` of its file, where they are known. The stamp is
    in the list beside a shard only, so that records of equal videos are equal. `condition` holds what a transformer that
    takes given frames as channels is told of the video's own, by field of `types.Conditioning`.
    """

    latents: Float[np.ndarray, "T H W C"]
    text_embedding: Float[np.ndarray, "L D"]
    facts: Facts | None = dataclasses.field(default=None, kw_only=True)
    condition: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, kw_only=True)
    stamp: Stamp | None = dataclasses.field(default=None, kw_only=True, compare=False)

    @property
    def entry(self) -> Entry:
        return Entry(self.id, self.caption, self.source, extra=self.extra)


def checksum(latents: np.ndarray) -> str:
    """The identity of latents whatever their record is called: a digest of their type, shape and bytes."""
    digest = hashlib.blake2b(f"{latents.dtype} {latents.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(latents).view(np.uint8).data)
    return digest.hexdigest()


def to_bytes(record: Record) -> bytes:
    """The record as a safetensors file, with its entry and facts as metadata."""
    metadata = dataclasses.asdict(record.entry) | {"extra": json.dumps(record.extra)}
    metadata |= {name: json.dumps(facts) for name, facts in facts_to_json(record).items()}
    tensors = record.condition | {"latents": record.latents, "text_embedding": record.text_embedding}
    return to_safetensors(tensors, metadata)


def from_bytes(data: bytes) -> Record:
    """The inverse of `to_bytes`.

    Raises:
        ValueError: if `data` is no such record.
    """
    tensors, metadata = from_safetensors(data)
    try:
        entry = metadata | {"extra": json.loads(metadata["extra"])}
        facts = facts_from_json(json.loads(entry.pop("facts", "null")))
        own = {name: tensors.pop(name) for name in ("latents", "text_embedding")}
        return Record(**entry, **own, facts=facts, condition=tensors)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("a safetensors file, but not of a record") from error


def facts_to_json(record: Record) -> dict[str, Any]:
    return {"facts": dataclasses.asdict(record.facts)} if record.facts else {}


def facts_from_json(values: dict[str, Any] | None) -> Facts | None:
    return Facts(**values) if values else None


def to_safetensors(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file with its metadata in the order of their names; the library's own is random."""
    data = safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in tensors.items()}, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))} | header
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def from_safetensors(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata. By hand: safetensors' loader for numpy knows neither bfloat16 nor metadata."""
    try:
        tensors = {
            name: np.frombuffer(info["data"], _SAFETENSORS_DTYPES[info["dtype"]]).reshape(info["shape"])
            for name, info in safetensors.deserialize(data)
        }
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"not a safetensors file of float32 or bfloat16: {error}") from error
    header_length = int.from_bytes(data[:8], "little")
    return tensors, json.loads(data[8 : 8 + header_length]).get("__metadata__", {})
