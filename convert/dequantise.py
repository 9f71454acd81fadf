"""Weights of 8 bits as the numbers that they stand for.

Float8 comes plain, or as matrices with factors beside them: `scale_weight` (ComfyUI), `weight_scale` (ComfyUI later,
LightX2V), one for the matrix, for each output, or for each tile. A matrix is never taken without its factor. What has
factors becomes float32, in which the product is exact; plain float8 fits bfloat16. Formats of GGUF are multiplied out
where such files are opened (`storage.gguf_files`).
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from ditmem_jax.storage.tensors import DTYPES, Stored

EIGHT_BITS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8"}
FACTORS = (".scale_weight", ".weight_scale", ".weight_scale_inv")
COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_rowwise")
ASIDE = (".scale_input", ".input_scale", ".comfy_quant")  # factors of activations, and marks
MARKS = ("scaled_fp8",)
REFUSED = {  # what stands beside a matrix in other formats
    ".weight_scale_2": "NVFP4", ".absmax": "4 bits of bitsandbytes", ".quant_map": "4 bits of bitsandbytes",
    ".qweight": "4 bits in groups (GPTQ, AWQ or SVDQuant)", ".wscales": "4 bits of SVDQuant",
    ".SCB": "8 bits of bitsandbytes",
}  # fmt: skip


def dequantised(tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """Tensors without the factors and marks beside matrices, which are multiplied out when they are read.

    Returns:
        the tensors, and what is wrong with them: formats that are unknown, and factors that are missing or do not fit.
    """
    strange = {kind for name in tensors for suffix, kind in REFUSED.items() if name.endswith(suffix)}
    if strange:
        return dict(tensors), [f"its weights are in {kind}; take the fp16, bf16, fp8 or GGUF file of the model" for kind in sorted(strange)]  # fmt: skip
    factors = {name: x for name, x in tensors.items() if name.endswith(FACTORS)}
    if not factors and not any(x.dtype in EIGHT_BITS for x in tensors.values()):
        return dict(tensors), []
    problems, missing = [], []
    scaled = bool(factors) or any(name.endswith((*MARKS, *ASIDE)) for name in tensors)
    found, used = {}, set()
    for name, tensor in tensors.items():
        if name in factors or name.endswith((*MARKS, *ASIDE)):
            continue
        stem = name.removesuffix(".weight")
        factor = next((stem + end for end in FACTORS if stem + end in factors), None)
        if factor:
            used.add(factor)
            if _places(tensor.shape, factors[factor].shape) is None:
                problems.append(
                    f"{factor} {list(factors[factor].shape)} does not fit {name} {list(tensor.shape)}"
                )
                continue
            found[name] = _multiplied(tensor, factors[factor])
        elif tensor.dtype in EIGHT_BITS and (scaled or tensor.dtype == "I8"):
            missing.append(name)
        else:
            found[name] = _plain(tensor) if tensor.dtype in EIGHT_BITS else tensor
    problems += [f"{name} is in 8 bits and has no factor beside it" for name in missing]
    problems += [f"{name} is the factor of nothing" for name in sorted(factors.keys() - used)]
    problems += _formats({name: x for name, x in tensors.items() if name.endswith(".comfy_quant")})
    return found, problems


def summary(tensors: Mapping[str, Stored]) -> str | None:
    """The formats of what is multiplied out, in one line; None where nothing is."""
    counts = Counter(tensor.quantised for tensor in tensors.values() if tensor.quantised)
    if not counts:
        return None
    return "dequantised: " + ", ".join(f"{count} tensors of {name}" for name, count in counts.most_common())


def _plain(tensor: Stored) -> Stored:
    """Float8 without a factor, whose every value bfloat16 has."""

    def read() -> np.ndarray:
        return tensor.read().astype(DTYPES["BF16"])

    return Stored(tensor.shape, "BF16", 2 * tensor.size, read, EIGHT_BITS[tensor.dtype])


def _multiplied(tensor: Stored, factor: Stored) -> Stored:
    place = _places(tensor.shape, factor.shape)

    def read() -> np.ndarray:
        values = np.array(tensor.read(), np.float32)
        values *= place(np.asarray(factor.read(), np.float32))
        return values

    name = f"{EIGHT_BITS.get(tensor.dtype, tensor.dtype)} with factors"
    return Stored(tensor.shape, "F32", 4 * int(np.prod(tensor.shape)), read, name)


def _places(shape: tuple[int, ...], factor: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray] | None:
    """How factors of this shape are laid over a tensor: one, one a row, or one a tile; None if they do not fit."""
    if np.prod(factor) == 1:
        return lambda x: x.reshape(())
    if factor in ((shape[0],), (shape[0], *(1,) * (len(shape) - 1))):
        return lambda x: x.reshape(-1, *(1,) * (len(shape) - 1))
    if len(factor) == len(shape) == 2:
        tiles = [-(-size // count) for size, count in zip(shape, factor, strict=True)]
        # The last tile of a row may be smaller, as in the published tiles of 128 x 128.
        if all(-(-size // tile) == count for size, tile, count in zip(shape, tiles, factor, strict=True)):
            return lambda x: x.repeat(tiles[0], 0)[: shape[0]].repeat(tiles[1], 1)[:, : shape[1]]
    return None


def _formats(marks: Mapping[str, Stored]) -> list[str]:
    """Problems of the formats that ComfyUI's marks name."""
    found: dict[str, list[str]] = {}
    for name, mark in marks.items():
        try:
            described = json.loads(mark.read().tobytes())
            format = described["format"]
        except (ValueError, KeyError, TypeError) as error:
            found.setdefault(f"is damaged: {error!r}", []).append(name)
            continue
        more = described.keys() - {"format", "full_precision_matrix_mult"}
        if format not in COMFY_FORMATS or more:
            found.setdefault(f"names a format that is unknown here: {json.dumps(described)}", []).append(name)
    return [f"{names[0]} {problem}" + f" (and {len(names) - 1} more)" * (len(names) > 1) for problem, names in found.items()]  # fmt: skip
