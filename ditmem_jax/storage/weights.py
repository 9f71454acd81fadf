"""Converted weights (`ditmem convert`), a folder:

config.json           {"format": "ditmem_jax", "version": 1, "networks": {"dit": {...}, "vae": {...}, "text": {...}},
                       "provenance": {where each comes from},
                       "checksums": {file: {array: CRC-32}, "tokenizer.json": SHA-256},
                       "sha256": of all this as JSON; a folder of an earlier version has none}
dit.safetensors, vae.safetensors, text.safetensors    arrays by our dotted paths, layers stacked
dit_high.safetensors  of two experts, the one for high noise
clip.safetensors      the image encoder of transformers that read image tokens
encoder.safetensors   a memory encoder, if one was converted
tokenizer.json
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.config import Config, build, to_dict
from ditmem_jax.errors import UserError
from ditmem_jax.models.backbone import Experts
from ditmem_jax.models.quantised import to_int8
from ditmem_jax.models.state import Arrays, abstract
from ditmem_jax.models.wan.clip import CLIPVision
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.models.wan.tokenizer import Tokenizer
from ditmem_jax.models.wan.umt5 import UMT5
from ditmem_jax.models.wan.vae import VAE
from ditmem_jax.storage.digests import SEAL, crc32, of_file, unsealed
from ditmem_jax.storage.files import read_json
from ditmem_jax.storage.tensors import DTYPES as STORED_DTYPES
from ditmem_jax.storage.tensors import cast, open_tensors
from ditmem_jax.types import Compute

FORMAT, VERSION = "ditmem_jax", 1
WEIGHTS = (".safetensors", ".gguf", ".pth", ".pt", ".ckpt", ".bin")  # suffixes of files of weights
PARTS = ("networks", "provenance", "checksums")
AGAIN = "convert the weights again, or copy them once more from where they are whole"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

Place = Callable[[str, np.ndarray], jax.Array]
"""Puts the array of a path on devices."""


def on_default_device(path: str, array: np.ndarray) -> jax.Array:
    del path
    return jnp.asarray(array)


# --- converted weights ------------------------------------------------------------------------------------------


def load_dit(
    config: Config,
    place: Place = on_default_device,
    experts: Literal["both", "high", "low"] = "both",
    compute: Compute = Compute(),
) -> DiT | Experts:
    """The transformer of `config.weights`, in its dtype; for int8 its matrices are rounded as they are read.

    Args:
        experts: which to load, where there are two.
    Raises:
        UserError: if the folder is missing, broken or altered, or holds a network of another configuration.
    """
    names = stored_dits(config, experts)
    loaded = [_load(config, "dit", lambda: _new_dit(config, compute), place, name) for name in names]
    return Experts(*loaded) if len(loaded) > 1 else loaded[0]


def stored_dits(config: Config, experts: Literal["both", "high", "low"] = "both") -> tuple[str, ...]:
    """Return the names of what `load_dit` loads: of two experts, the one for high noise first."""
    if config.experts.boundary is None:
        return ("dit",)
    return {"both": ("dit_high", "dit"), "high": ("dit_high",), "low": ("dit",)}[experts]


def new_dit(
    config: Config, experts: Literal["both", "high", "low"] = "both", compute: Compute = Compute()
) -> DiT | Experts:
    """A network of the structure that `load_dit` loads, to be made abstractly."""
    if config.experts.boundary is None or experts != "both":
        return _new_dit(config, compute)
    return Experts(_new_dit(config, compute), _new_dit(config, compute))


def _new_dit(config: Config, compute: Compute) -> DiT:
    weights = config.weights
    dtype = DTYPES[weights.computed_in]
    int8 = weights.dtype == "int8"
    return DiT(config.dit, int8=int8, compute=compute, rngs=nnx.Rngs(0), dtype=dtype)


def load_vae(config: Config, place: Place = on_default_device) -> VAE:
    """The video VAE of `config.weights`, in float32; errors as `load_dit`."""
    return _load(config, "vae", lambda: VAE(config.vae, rngs=nnx.Rngs(0)), place)


def load_umt5(config: Config, place: Place = on_default_device) -> tuple[UMT5, Tokenizer]:
    """The text encoder of `config.weights`, in its dtype, and its tokeniser; errors as `load_dit`."""
    dtype = DTYPES[config.weights.computed_in]
    text = _load(config, "text", lambda: UMT5(config.text, rngs=nnx.Rngs(0), dtype=dtype), place)
    path = Path(config.weights.path) / "tokenizer.json"
    expected = read_index(config.weights.path)["checksums"].get(path.name)
    if expected is not None and path.exists() and (found := of_file(path)) != expected:
        raise UserError(
            f"{path} was altered", expected=f"sha256 {expected}", found=f"sha256 {found}", fix=AGAIN
        )
    return text, Tokenizer(path, config.dit.text_len)


def load_clip(config: Config, place: Place = on_default_device) -> CLIPVision:
    """CLIP's image encoder of `config.weights`, in its dtype; errors as `load_dit`."""
    dtype = DTYPES[config.weights.computed_in]
    return _load(config, "clip", lambda: CLIPVision(config.clip, rngs=nnx.Rngs(0), dtype=dtype), place)


def _load(
    config: Config, name: str, create: Callable[[], nnx.Module], place: Place, stored: str | None = None
) -> nnx.Module:
    """The network of `config.<name>` in the folder of converted weights, `stored` there under that or another name."""
    stored = stored or name
    folder = Path(config.weights.path)
    networks, wanted = check_weights(config, stored), getattr(config, name)
    given = build(type(wanted), networks[stored], f"{folder}: {stored}")  # what it leaves out has its default
    found, wanted = to_dict(given), to_dict(wanted)
    if different := sorted(key for key in wanted if found[key] != wanted[key]):
        raise UserError(
            f"the weights in {folder} do not fit the config",
            expected=", ".join(f"{name}.{key} = {wanted[key]}" for key in different),
            found=", ".join(f"{name}.{key} = {found[key]}" for key in different),
            fix=f"other weights, or config.{name} as they need it",
        )
    structure, shapes = abstract(create)
    file = folder / f"{stored}.safetensors"
    checksums = read_index(folder)["checksums"].get(file.name) if config.weights.verify else None
    return structure.merge(read_arrays(file, shapes, place, checksums))


def check_weights(config: Config, *names: str) -> dict[str, Any]:
    """Return the configurations of the networks in the folder of `config.weights`, by name.

    Args:
        names: networks that must be there: "dit", "vae", "text", "dit_high".
    Raises:
        UserError: with the commands that get them, if the folder or one of them is missing.
    """
    path, hub = config.weights.path, config.weights.hub
    source = hub.rpartition("/")[2] or "SOURCE"
    fix = f"ditmem convert {source} {path or 'DEST'}, for config.weights.path"
    if hub:
        fix = f"hf download {hub} --local-dir {source} && ditmem convert {source} {path}"
    if _original(Path(path)):
        raise not_converted(path, f"--config.weights.path={path}-converted")
    if not Path(path, "config.json").exists():
        raise UserError(f"no weights in {path!r}", expected=f"{', '.join(names)}, converted", fix=fix)
    networks = read_networks(path)
    if missing := [name for name in names if name not in networks]:
        found = ", ".join(networks) or "none"
        raise UserError(f"{path} holds no network {', '.join(missing)}", found=found, fix=fix)
    return networks


def read_networks(folder: str | Path) -> dict[str, Any]:
    """The configurations of the networks in a folder of converted weights: "dit", "vae", "text", perhaps "dit_high"."""
    return read_index(folder)["networks"]


def not_converted(path: str | Path, then: str) -> UserError:
    """The error for weights in other names than ours.

    Args:
        then: what to give in place of them, once they are converted to `path`-converted.
    """
    return UserError(
        f"{path} is not converted",
        expected="a folder that ditmem convert wrote",
        found="weights in the names of another program",
        fix=f"ditmem convert {path} {path}-converted, then {then}",
    )


def _original(path: Path) -> bool:
    """Return True for a file of weights, or a folder of another program: weights, and no config.json of ours."""
    if not path.name or not path.exists():
        return False
    if path.is_file():
        return True
    patterns = [f"{below}*{suffix}" for below in ("", "*/") for suffix in WEIGHTS]
    if not any(next(path.glob(pattern), None) for pattern in (*patterns, "model_index.json")):
        return False
    try:
        index = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError):  # told by `read_index`
        return False
    return isinstance(index, dict) and "format" not in index


def empty_index() -> dict[str, Any]:
    """The config.json of a folder without any network."""
    return {"format": FORMAT, "version": VERSION} | {part: {} for part in PARTS}


def read_index(folder: str | Path) -> dict[str, Any]:
    """The config.json of a folder of converted weights.

    Raises:
        UserError: if the folder is something else, or the file is damaged or of another format.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(
            f"{folder} is no folder of converted weights",
            expected=path,
            found="no such file",
            fix="another folder, or a new one that ditmem convert SOURCE DEST makes",
        )
    again = f"ditmem convert SOURCE DEST again, in place of {folder}"
    index = read_json(path, again)
    if isinstance(index, dict) and "format" not in index:
        raise not_converted(folder, f"{folder}-converted in its place")
    try:
        identity = (index["format"], index["version"])
        index = empty_index() | index
        unknown = index.keys() - empty_index().keys() - {SEAL}
        if unknown or not all(isinstance(index[part], dict) for part in PARTS):
            raise ValueError(f"{', '.join(sorted(index))}, where {', '.join(PARTS)} are objects")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged", found=repr(error), fix=again) from error
    if identity != (FORMAT, VERSION):
        raise UserError(f"{path} has another format", expected=(FORMAT, VERSION), found=identity, fix=again)
    fix = f"{again}; or, if you changed it on purpose, delete {SEAL} in it"
    return unsealed(index, path, fix) if SEAL in index else index


def read_arrays(
    path: Path, shapes: dict[str, jax.ShapeDtypeStruct], place: Place, checksums: dict[str, str] | None = None
) -> Arrays:
    """Exactly the arrays that `shapes` names, in its dtypes, mapped and placed one after the other.

    Where `shapes` wants a kernel in 8 bits, it is stored in full, and its factors `scale` are not.

    Args:
        checksums: CRC-32 of each array as stored, computed by a thread while the array is placed; None: unchecked.
    """
    stored, _ = open_tensors(path)
    rounded = [name for name, x in shapes.items() if x.dtype == jnp.int8]
    factors = {name: f"{name.removesuffix('kernel')}scale" for name in rounded}
    shapes = {name: x for name, x in shapes.items() if name not in factors.values()}
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - stored.keys())]
    problems += [f"{name} is unknown" for name in sorted(stored.keys() - shapes.keys())]
    for name in sorted(shapes.keys() & stored.keys()):
        if (shape := stored[name].shape) != shapes[name].shape:
            problems.append(f"{name} has shape {list(shape)}, {list(shapes[name].shape)} is needed")
        elif stored[name].dtype not in STORED_DTYPES:
            problems.append(
                f"{name} has dtype {stored[name].dtype}, one of {', '.join(STORED_DTYPES)} is needed"
            )
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise UserError(f"{path} does not fit the config", found="; ".join(problems[:10] + more))
    placed = {}
    with ThreadPoolExecutor(1) as pool:
        for name, x in shapes.items():
            array = stored[name].read()
            checking = pool.submit(crc32, [array]) if checksums is not None else None
            if name in factors:
                kernel, scale = to_int8(array)
                placed |= {name: place(name, kernel), factors[name]: place(factors[name], scale)}
            else:
                placed[name] = place(name, cast(array, x.dtype))
            if checking and (found := f"{checking.result():08x}") != checksums.get(name):
                raise UserError(
                    f"{name} in {path} was altered",
                    expected=f"CRC-32 {checksums.get(name)}",
                    found=f"CRC-32 {found}",
                    fix=AGAIN,
                )
    return placed
