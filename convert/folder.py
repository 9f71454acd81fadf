"""A folder of weights in original names and files to the folder of converted weights that the library loads.

The original folder holds, as Wan 2.1 is published,

    config.json                                   of the transformer
    diffusion_pytorch_model*.safetensors          or dit.safetensors
    Wan2.1_VAE.safetensors or .pth                or vae.safetensors
    models_t5_umt5-xxl-enc-bf16.safetensors or .pth    or text.safetensors
    google/umt5-xxl/tokenizer.json                or tokenizer.json

Its config.json may have entries "vae" and "text" for networks of other sizes than the published ones.
Arrays pass through one at a time, and the converted folder appears whole or not at all.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

import convert.dit
import convert.umt5
import convert.vae
from convert.engine import Table, stream, targets
from ditmem_jax.checkpoint import FORMAT, VERSION, write_safetensors
from ditmem_jax.config import DiTConfig, UMT5Config, VAEConfig, build, to_dict
from ditmem_jax.errors import UserError
from ditmem_jax.models.dit import DiT
from ditmem_jax.models.umt5 import UMT5
from ditmem_jax.models.vae import VAE

ROOT = Path(__file__).parents[1]
UNUSED = {"_class_name", "_diffusers_version", "model_type", "window_size", "qk_norm", "cross_attn_norm"}


@dataclasses.dataclass(frozen=True)
class Network:
    """Where a network is in an original folder, and how it is made and filled."""

    files: tuple[str, ...]
    config: type
    module: Callable[..., nnx.Module]
    table: Callable[[Any], Table]


NETWORKS = {
    "dit": Network(
        ("diffusion_pytorch_model*.safetensors", "dit.safetensors"),
        DiTConfig, DiT, convert.dit.table,
    ),
    "vae": Network(
        ("Wan2.1_VAE.safetensors", "vae.safetensors", "Wan2.1_VAE.pth"),
        VAEConfig, VAE, convert.vae.table,
    ),
    "text": Network(
        ("models_t5_umt5-xxl-enc-bf16.safetensors", "text.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"),
        UMT5Config, UMT5, lambda _: convert.umt5.table(),
    ),
}  # fmt: skip
TOKENIZERS = ("google/umt5-xxl/tokenizer.json", "tokenizer.json")


def converted(source: str | Path) -> str:
    """The converted form of a small folder in the repository, made on first use under `build/`.

    Its name holds a hash of the content, so weights that change are converted anew.
    """
    source = ROOT / source
    files = _sources(source)
    digest = hashlib.sha256()
    for path in sorted(path for paths in files.values() for path in paths):
        digest.update(path.read_bytes())
    target = ROOT / "build" / "weights" / f"{source.parent.name}-{digest.hexdigest()[:12]}"
    if not target.exists():
        convert_folder(source, target)
    return str(target)


def convert_folder(source: str | Path, target: str | Path) -> None:
    """Writes the converted form of the folder `source` to `target`, which must not exist.

    Raises:
        UserError: if files are missing or do not hold what their configuration says.
    """
    source, target = Path(source), Path(target)
    files = _sources(source)
    if target.exists():
        raise UserError(f"{target} exists", fix="another target, or delete it first")
    configs = _configs(source / "config.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name, network in NETWORKS.items():
        _convert_network(network, configs[name], files[name], unfinished / f"{name}.safetensors")
    shutil.copyfile(files["tokenizer"][0], unfinished / "tokenizer.json")
    index = {
        "format": FORMAT,
        "version": VERSION,
        "networks": {name: to_dict(c) for name, c in configs.items()},
    }
    (unfinished / "config.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(target)


def _sources(folder: Path) -> dict[str, list[Path]]:
    """The files of each network, of the tokeniser and of the configuration."""
    patterns = {name: network.files for name, network in NETWORKS.items()}
    patterns |= {"tokenizer": TOKENIZERS, "config": ("config.json",)}
    found = {
        name: next(filter(None, (sorted(folder.glob(p)) for p in options)), [])
        for name, options in patterns.items()
    }
    if missing := [name for name, paths in found.items() if not paths]:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}",
            expected="; ".join(f"{name}: {' or '.join(patterns[name])}" for name in missing),
            found=", ".join(sorted(path.name for path in folder.glob("*"))) or "no files",
        )
    return found


def _configs(path: Path) -> dict[str, Any]:
    """Configuration of each network, in our types."""
    try:
        original = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged", found=error) from error
    if (kind := original.get("model_type", "t2v")) != "t2v":
        raise UserError(f"{path} is of another kind of transformer", expected="model_type t2v", found=kind)
    others = {name: original.pop(name, {}) for name in ("vae", "text")}
    return {
        name: build(network.config, {k: v for k, v in values.items() if k not in UNUSED}, f"{path}: {name}")
        for (name, network), values in zip(
            NETWORKS.items(), (original, others["vae"], others["text"]), strict=True
        )
    }


def _convert_network(network: Network, config: Any, files: Iterable[Path], target: Path) -> None:
    tensors = {name: tensor for path in files for name, tensor in _tensors(path).items()}
    half = all(tensor.dtype == jnp.bfloat16 for tensor in tensors.values())
    dtype = jnp.bfloat16 if half else jnp.float32
    wanted = targets(nnx.eval_shape(lambda: network.module(config, rngs=nnx.Rngs(0), dtype=dtype)))
    write_safetensors(target, wanted, stream(network.table(config), tensors, wanted), {})


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """A tensor of a safetensors file, read when numpy asks for it."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.file.get_tensor(self.name), dtype, copy=copy)


def _tensors(path: Path) -> dict[str, Any]:
    """The tensors of a file by name; those of a `.pth` are all in memory."""
    if path.suffix == ".pth":
        return _read_pth(path)
    try:
        file = safetensors.safe_open(path, framework="np")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {path}", expected="a whole safetensors file", found=error) from error
    dtypes = {"BF16": jnp.bfloat16}
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 safetensors files are not iterable
    return {
        name: _Lazy(file, name, tuple(x.get_shape()), np.dtype(dtypes.get(x.get_dtype(), np.float32)))
        for name, x in slices.items()
    }


def _read_pth(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a torch file. `weights_only` keeps it from running what may be pickled inside."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} needs torch to be read",
            fix="pip install 'ditmem_jax[convert]', or a safetensors file instead",
        ) from error
    tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    bits = {torch.bfloat16: (torch.int16, jnp.bfloat16)}
    arrays = {}
    for name, x in tensors.items():
        as_integer, dtype = bits.get(x.dtype, (x.dtype, None))
        array = x.contiguous().view(as_integer).numpy()
        arrays[name] = array.view(dtype) if dtype else array
    return arrays
