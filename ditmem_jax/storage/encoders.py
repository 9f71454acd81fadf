"""A trained memory encoder as one safetensors file, with its configuration and a checksum."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ditmem_jax.config import EncoderConfig, build, to_dict
from ditmem_jax.errors import UserError
from ditmem_jax.models.encoders import Encoder, new_encoder
from ditmem_jax.models.state import Arrays, abstract
from ditmem_jax.storage.digests import crc32, sealed, unsealed
from ditmem_jax.storage.files import parse_json
from ditmem_jax.storage.tensors import open_tensors, write_safetensors
from ditmem_jax.storage.weights import FORMAT, WEIGHTS, Place, not_converted, on_default_device, read_arrays

UNSEALED = {"format", "config", "extra", "crc32"}
AGAIN = "copy or train it again"


def save_encoder(path: str | Path, arrays: Arrays, config: EncoderConfig, extra: dict[str, Any]) -> None:
    """Writes an encoder (its arrays, see `models.state.split`) as one file, whole or not at all.

    Args:
        extra: JSON values about its making, kept beside the configuration.
    """
    arrays = {name: np.asarray(jax.device_get(arrays[name])) for name in sorted(arrays)}
    metadata = {
        "format": f"{FORMAT}.encoder",
        "config": json.dumps(to_dict(config)),
        "extra": json.dumps(extra),
        "crc32": _checksum(arrays),
    }
    metadata = sealed(metadata)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    write_safetensors(Path(path), shapes, arrays.items(), metadata)


def load_encoder(
    path: str | Path, place: Place = on_default_device, *, dtype: DTypeLike = jnp.float32
) -> Encoder:
    """The encoder in a file of `save_encoder`; its configuration is `.config`.

    Args:
        dtype: of its matrix products; the weights are float32.
    Raises:
        UserError: if the file is no encoder, is cut off or was altered.
    """
    path, (config, _, expected) = Path(path), _header(Path(path))
    structure, shapes = abstract(lambda: new_encoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    arrays = read_arrays(path, shapes, lambda _, array: array)
    if (found := _checksum(arrays)) != expected:
        raise UserError(f"{path} was altered", expected=f"checksum {expected}", found=found, fix=AGAIN)
    return structure.merge({name: place(name, array) for name, array in arrays.items()})


def encoder_metadata(path: str | Path) -> tuple[EncoderConfig, dict[str, Any]]:
    """Configuration and `extra` of an encoder's file.

    Raises:
        UserError: as `load_encoder`; for another file with the command that converts it if it is a released encoder.
    """
    return _header(Path(path))[:2]


def _header(path: Path) -> tuple[EncoderConfig, dict[str, Any], str]:
    """Configuration, `extra` and checksum of the arrays."""
    if path.is_dir():
        inside = path / "encoder.safetensors"
        raise UserError(
            f"{path} is a folder, and no memory encoder",
            expected="the encoder.safetensors of a training run or of ditmem convert",
            fix=f"--encoder={inside}"
            if inside.is_file()
            else f"ditmem convert {path} DEST, then --encoder=DEST/encoder.safetensors",
        )
    if path.suffix in WEIGHTS[1:] and path.is_file():
        raise not_converted(path, f"--encoder={path}-converted/encoder.safetensors")
    converted = f"{path}-converted"
    tensors, metadata = open_tensors(path)
    if metadata.get("format") != f"{FORMAT}.encoder":
        released = any("_pass_module." in name for name in tensors)
        raise UserError(
            f"{path} is {'a released memory encoder, not converted' if released else 'no memory encoder'}",
            expected="the encoder.safetensors of a training run, or of ditmem convert",
            fix=f"ditmem convert {path} {converted}, then --encoder={converted}/encoder.safetensors"
            if released
            else "--encoder=RUN/encoder.safetensors, of a run of ditmem train",
        )
    if metadata.keys() != UNSEALED:  # as files of earlier versions are
        metadata = unsealed(metadata, f"the header of {path}", AGAIN)
    config, extra = (
        parse_json(metadata[name], f"the header of {path}", AGAIN) for name in ("config", "extra")
    )
    return build(EncoderConfig, config, "memory"), extra, metadata["crc32"]


def _checksum(arrays: Arrays) -> str:
    return f"{crc32(arrays[name] for name in sorted(arrays)):08x}"
