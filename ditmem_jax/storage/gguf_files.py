"""GGUF files (llama.cpp, ComfyUI-GGUF), tensor by tensor. Needs the library gguf (extra `convert`)."""

from pathlib import Path

import numpy as np

from ditmem_jax.errors import UserError
from ditmem_jax.storage.tensors import DTYPES, Stored

SHAPE = "comfy.gguf.orig_shape."  # of a tensor that has more axes than the format holds
# What the library raises for files that are cut off or altered, which depends on where.
DAMAGED = (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, UnicodeDecodeError)


def open_gguf(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a GGUF file by name, and its architecture. Values of fewer bits are float32 when they are read.

    Raises:
        UserError: if the library is not installed, or the file is missing or damaged.
    """
    try:
        import gguf  # an extra, wanted for these files alone
    except ImportError as error:
        raise UserError(
            f"{path} needs gguf to be read",
            fix="pip install 'ditmem_jax[convert]', or a safetensors file instead",
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        shapes = {
            name.removeprefix(SHAPE): tuple(field.contents())
            for name, field in reader.fields.items()
            if name.startswith(SHAPE)
        }
        tensors = {}
        for tensor in reader.tensors:
            shape = shapes.get(tensor.name, tuple(int(size) for size in reversed(tensor.shape)))
            if int(np.prod(shape)) != tensor.n_elements:
                raise ValueError(f"{tensor.name} has {tensor.n_elements} values, its shape is {list(shape)}")
            if tensor.name.endswith("modulation") and len(shape) == 2:  # leading axes of 1 get lost
                shape = (1, *shape)
            tensors[tensor.name] = _stored(tensor, shape)
        architecture = reader.get_field("general.architecture")
        return tensors, {"architecture": str(architecture.contents())} if architecture else {}
    except DAMAGED as error:
        raise UserError(
            f"cannot read {path}", expected="a whole GGUF file", found=error, fix="download it again"
        ) from error


def _stored(tensor, shape: tuple[int, ...]) -> Stored:
    """A tensor of the library, which maps its bytes."""
    import gguf

    name = tensor.tensor_type.name
    if name in DTYPES:
        dtype = DTYPES[name]
        return Stored(
            shape, name, int(tensor.n_bytes), lambda: tensor.data.reshape(-1).view(dtype).reshape(shape)
        )

    def read() -> np.ndarray:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)

    return Stored(shape, "F32", 4 * int(np.prod(shape)), read, name)
