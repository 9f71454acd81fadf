"""What lives on disk: converted weights, trained encoders, and the state of a training run.

Converted weights (`python -m convert`) are a folder:

    config.json           {"format": "ditmem_jax", "version": 1, "networks": {"dit": {...}, "vae": {...}, "text": {...}},
                           "provenance": {where each comes from},
                           "checksums": {file: {array: CRC-32}, "tokenizer.json": SHA-256}}
    dit.safetensors, vae.safetensors, text.safetensors    arrays by our dotted paths, layers stacked
    dit_high.safetensors  of two experts, the one for high noise
    encoder.safetensors   a memory encoder, if one was converted
    tokenizer.json

A trained encoder is one safetensors file that carries its configuration and a checksum. The state of a run is a
folder of orbax checkpoints, each sealed with the checksums of its files.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ditmem_jax.config import Config, MemoryConfig, build, to_dict
from ditmem_jax.data.files import write_text
from ditmem_jax.data.tensors import DTYPES as STORED_DTYPES
from ditmem_jax.data.tensors import as_bytes, cast, open_tensors, write_safetensors
from ditmem_jax.data.tokenizer import Tokenizer
from ditmem_jax.errors import UserError
from ditmem_jax.models.dit import DiT, Experts
from ditmem_jax.models.layers import to_int8
from ditmem_jax.models.memory import MemoryEncoder
from ditmem_jax.models.state import Arrays, abstract
from ditmem_jax.models.umt5 import UMT5
from ditmem_jax.models.vae import VAE

FORMAT, VERSION = "ditmem_jax", 1
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

Place = Callable[[str, np.ndarray], jax.Array]
"""Puts the array of a path on devices."""


def on_default_device(path: str, array: np.ndarray) -> jax.Array:
    del path
    return jnp.asarray(array)


# --- converted weights ------------------------------------------------------------------------------------------


def load_dit(
    config: Config, place: Place = on_default_device, experts: Literal["both", "high", "low"] = "both"
) -> DiT | Experts:
    """The transformer of `config.weights`, in its dtype; for int8 its matrices are rounded as they are read.

    Args:
        experts: which to load, where there are two.
    Raises:
        UserError: if the folder is missing or broken, or holds a network of another configuration.
    """

    def load(stored: str) -> DiT:
        return _load(config, "dit", lambda: _new_dit(config), place, stored)

    if config.experts.boundary is None or experts == "low":
        return load("dit")
    if experts == "high":
        return load("dit_high")
    return Experts(load("dit_high"), load("dit"))


def new_dit(config: Config, experts: Literal["both", "high", "low"] = "both") -> DiT | Experts:
    """A network of the structure that `load_dit` loads, to be made abstractly."""
    if config.experts.boundary is None or experts != "both":
        return _new_dit(config)
    return Experts(_new_dit(config), _new_dit(config))


def _new_dit(config: Config) -> DiT:
    weights = config.weights
    dtype = DTYPES[weights.computed_in]
    return DiT(config.dit, int8=weights.dtype == "int8", rngs=nnx.Rngs(0), dtype=dtype)


def load_vae(config: Config, place: Place = on_default_device) -> VAE:
    """The video VAE of `config.weights`, in float32; errors as `load_dit`."""
    return _load(config, "vae", lambda: VAE(config.vae, rngs=nnx.Rngs(0)), place)


def load_umt5(config: Config, place: Place = on_default_device) -> tuple[UMT5, Tokenizer]:
    """The text encoder of `config.weights`, in its dtype, and its tokeniser; errors as `load_dit`."""
    dtype = DTYPES[config.weights.computed_in]
    text = _load(config, "text", lambda: UMT5(config.text, rngs=nnx.Rngs(0), dtype=dtype), place)
    return text, Tokenizer(Path(config.weights.path) / "tokenizer.json", config.dit.text_len)


def _load(
    config: Config, name: str, create: Callable[[], nnx.Module], place: Place, stored: str | None = None
) -> nnx.Module:
    """The network of `config.<name>` in the folder of converted weights, `stored` there under that or another name."""
    stored = stored or name
    folder = Path(config.weights.path)
    networks, wanted = read_networks(folder), getattr(config, name)
    if stored not in networks:
        raise UserError(f"{folder} holds no network {stored!r}", fix="convert the weights again")
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
    return structure.merge(_read_arrays(folder / f"{stored}.safetensors", shapes, place))


def read_networks(folder: str | Path) -> dict[str, Any]:
    """The configurations of the networks in a folder of converted weights: "dit", "vae", "text", perhaps "dit_high"."""
    return read_index(folder)["networks"]


def empty_index() -> dict[str, Any]:
    """What config.json says of a folder without any network."""
    return {"format": FORMAT, "version": VERSION, "networks": {}, "provenance": {}, "checksums": {}}


def read_index(folder: str | Path) -> dict[str, Any]:
    """The config.json of a folder of converted weights.

    Raises:
        UserError: if the folder is something else, or the file is damaged or of another format.
    """
    path = Path(folder) / "config.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        identity = (index["format"], index["version"])
        index = empty_index() | index
    except OSError as error:
        raise UserError(
            f"{folder} is no folder of converted weights",
            expected=path,
            found=error.strerror,
            fix="another folder, or a new one that python -m convert SOURCE DEST makes",
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged", found=repr(error), fix="convert the weights again") from error
    if identity != (FORMAT, VERSION):
        raise UserError(f"{path} has another format", expected=(FORMAT, VERSION), found=identity)
    return index


def _read_arrays(path: Path, shapes: dict[str, jax.ShapeDtypeStruct], place: Place) -> Arrays:
    """Exactly the arrays that `shapes` names, in its dtypes, mapped and placed one after the other.

    Where `shapes` wants a kernel in 8 bits, it is stored in full, and its factors `scale` are not.
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
    for name, x in shapes.items():
        if name in factors:
            kernel, scale = to_int8(stored[name].read())
            placed |= {name: place(name, kernel), factors[name]: place(factors[name], scale)}
        else:
            placed[name] = place(name, cast(stored[name].read(), x.dtype))
    return placed


# --- trained encoders -------------------------------------------------------------------------------------------


def save_encoder(path: str | Path, arrays: Arrays, config: MemoryConfig, extra: dict[str, Any]) -> None:
    """Writes an encoder (its arrays, see `models.state.split`) as one file, whole or not at all.

    Args:
        extra: JSON values about its making, kept beside the configuration.
    """
    arrays = {name: np.asarray(jax.device_get(arrays[name])) for name in sorted(arrays)}
    metadata = {
        "format": f"{FORMAT}.encoder",
        "config": json.dumps(to_dict(config)),
        "extra": json.dumps(extra),
        "crc32": _crc32(arrays),
    }
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    write_safetensors(Path(path), shapes, arrays.items(), metadata)


def load_encoder(
    path: str | Path, place: Place = on_default_device, *, dtype: DTypeLike = jnp.float32
) -> MemoryEncoder:
    """The encoder in a file of `save_encoder`; its configuration is `.config`.

    Args:
        dtype: of its matrix products; the weights are float32.
    Raises:
        UserError: if the file is no encoder, is cut off or was altered.
    """
    path, (config, _) = Path(path), encoder_metadata(path)
    structure, shapes = abstract(lambda: MemoryEncoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    arrays = _read_arrays(path, shapes, lambda _, array: array)
    expected = open_tensors(path)[1]["crc32"]
    if (found := _crc32({name: arrays[name] for name in sorted(arrays)})) != expected:
        raise UserError(
            f"{path} was altered", expected=f"checksum {expected}", found=found, fix="copy or train it again"
        )
    return structure.merge({name: place(name, array) for name, array in arrays.items()})


def encoder_metadata(path: str | Path) -> tuple[MemoryConfig, dict[str, Any]]:
    """Configuration and `extra` of an encoder's file."""
    _, metadata = open_tensors(Path(path))
    if metadata.get("format") != f"{FORMAT}.encoder":
        raise UserError(f"{path} is no memory encoder", expected="the encoder.safetensors of a training run")
    return build(MemoryConfig, json.loads(metadata["config"]), "memory"), json.loads(metadata["extra"])


def _crc32(arrays: dict[str, np.ndarray]) -> str:
    value = 0
    for array in arrays.values():
        value = zlib.crc32(as_bytes(array), value)
    return f"{value:08x}"


# --- training runs ----------------------------------------------------------------------------------------------

SEAL = "seal.json"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: the state, the data iterator's position, and whatever else was saved."""

    step: int
    state: Any
    position: Any
    extra: dict[str, Any]


class TrainingCheckpoints:
    """The checkpoints of a run: saved in the background, the last `keep` and the one with the best gain kept.

    Use as a context manager, so that the last one is on the disk at the end.

    Raises:
        UserError: if a file of the newest checkpoint is missing, cut off or altered. That is found before orbax
            opens the folder: its threads do not like a program that ends at once.
    """

    def __init__(self, folder: str | Path, keep: int):
        self.folder = Path(folder).resolve()
        if steps := [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]:
            self._check_seal(max(steps))
        self._saving: int | None = None
        best = preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics["gain"], n=1, keep_checkpoints_without_metrics=False
        )
        policy = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), best])
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def __enter__(self) -> "TrainingCheckpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is None or jax.process_count() == 1:  # else it may wait for a process that has ended
            self.close()

    def close(self) -> None:
        """Waits until everything is on the disk."""
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Any, gain: float | None, extra: dict[str, Any]) -> None:
        """Saves in the background; `position` and `extra` are JSON values. Waits for the save before this one."""
        self._manager.wait_until_finished()
        self._saving = step
        saved = ocp.args.Composite(
            state=ocp.args.StandardSave(state), run=ocp.args.JsonSave({"position": position, "extra": extra})
        )
        self._manager.save(step, args=saved, metrics=None if gain is None else {"gain": gain})

    def restore(self, abstract_state: Any) -> Restored:
        """The newest checkpoint, its arrays laid out as `abstract_state` says."""
        step = self.latest()
        wanted = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), run=ocp.args.JsonRestore()
        )
        found = self._manager.restore(step, args=wanted)
        return Restored(step, found["state"], found["run"]["position"], found["run"]["extra"])

    def _seal(self) -> None:
        """Writes checksums into the checkpoint being finished, whether or not it has its final name yet."""
        if jax.process_index() > 0:
            return
        for folder in self.folder.glob(f"{self._saving}*"):
            if folder.name.split(".")[0] == str(self._saving):
                write_text(folder / SEAL, json.dumps(_checksums(folder)))

    def _check_seal(self, step: int) -> None:
        folder = self.folder / str(step)
        fix = f"delete {folder}; the same command then continues from the checkpoint before it"
        try:
            expected = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {folder} is damaged", found=f"{SEAL}: {error}", fix=fix) from error
        found = _checksums(folder)
        if broken := [name for name in expected if found.get(name) != expected[name]]:
            state = "altered or cut off" if broken[0] in found else "missing"
            raise UserError(
                f"checkpoint {folder} is damaged", found=f"{', '.join(broken[:3])}: {state}", fix=fix
            )


def _checksums(folder: Path) -> dict[str, str]:
    """Of the files that hold values, by relative path; what orbax notes beside them may still change."""
    files = sorted(
        path for part in ("state", "run", "metrics") for path in (folder / part).rglob("*") if path.is_file()
    )
    sums = {}
    for path in files:
        with open(path, "rb") as file:
            sums[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums
