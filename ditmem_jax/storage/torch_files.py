"""Torch files, read without running what may be pickled inside. Needs torch (extra `convert`)."""

import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import reading
from ditmem_jax.storage.tensors import POINTER

# What torch raises for files that are cut off or altered, which depends on where.
DAMAGED = (
    OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip


def load_torch(path: Path) -> Any:
    """Tensors, in the containers that the file holds them in; mapped into memory where the file allows it.

    Raises:
        UserError: if torch is not installed, or the file is missing, damaged, or wants to run something.
    """
    with reading(path), open(path, "rb") as file:
        pointer = file.read(len(POINTER)) == POINTER
    if pointer:
        raise UserError(
            f"{path} is a pointer to weights, not the weights", fix=f"git lfs pull --include {path.name}"
        )
    torch = import_torch(path)
    try:
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} is no plain file of tensors; nothing in it was run",
            found=f"it wants to run {wanted.group(1)}" if wanted else str(error).splitlines()[0],
            fix="take its .safetensors, or have its author save model.state_dict(), and ditmem convert that",
        ) from error
    except DAMAGED as error:
        raise UserError(
            f"cannot read {path}",
            expected="a whole torch file",
            found=str(error).splitlines()[0] if str(error) else repr(error),
            fix="download it again",
        ) from error


def import_torch(path: Path) -> Any:
    """The module, for the file at `path`."""
    try:
        import torch  # the one library that reads its files safely; an extra, wanted for .pth and .pt alone
    except ImportError as error:
        raise UserError(
            f"{path} needs torch to be read or written",
            fix="pip install 'ditmem_jax[convert]', or a safetensors file instead",
        ) from error
    return torch


def to_numpy(tensor: Any) -> np.ndarray:
    """The array of a tensor, without a copy where it lies in order."""
    import torch  # which made the tensor

    # numpy learns of these from ml_dtypes, torch does not know that
    foreign = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    }
    tensor = tensor.detach().contiguous()
    if tensor.dtype in foreign:
        alike, dtype = foreign[tensor.dtype]
        return tensor.view(alike).numpy().view(dtype)
    return tensor.numpy()
