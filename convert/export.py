"""Converted weights and trained encoders back to the names and files that other programs read."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ditmem_jax.config import DiTConfig, MemoryConfig, build
from ditmem_jax.config.presets import VAE_PRESETS
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import split
from ditmem_jax.storage.encoders import load_encoder
from ditmem_jax.storage.files import make_folder, reading, write_text
from ditmem_jax.storage.tensors import open_tensors, write_safetensors
from ditmem_jax.storage.weights import DTYPES, read_index

from . import names_diffusers
from .engine import findings
from .folder import UNREAD, Advance, blocks, damage, new_folder
from .kinds import KINDS
from .original import original, originals
from .plan import FILES

# --- memory encoders --------------------------------------------------------------------------------------------

RELEASED = {"filter": "released", "norm": "batch", "strength": None}


def export_encoder(source: str | Path, out: str | Path, *, prefix: str = "", dtype: str = "float32") -> None:
    """Writes a memory encoder as the released program saves it: every name of its module, aliases included.

    Args:
        source: file of a trained encoder, or a converted folder that holds one.
        prefix: stands before every name: nothing, "dit_mem." or "pipe.dit_mem.".
    Raises:
        UserError: if the file is no encoder, or one that the released program cannot hold.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise UserError(f"{out} exists", fix=f"another file; or delete it first: rm {out}")
    encoder = load_encoder(source / FILES["memory"] if source.is_dir() else source)
    config = encoder.config
    if not isinstance(config, MemoryConfig):
        raise UserError(
            f"the released program has no place for the encoder in {source}",
            expected="memory.kind = dit_mem",
            found=f"memory.kind = {config.kind}",
        )
    other = {key: getattr(config, key) for key, value in RELEASED.items() if getattr(config, key) != value}
    if not isinstance(config.tokens, int):
        other["tokens"] = config.tokens
    if other:
        raise UserError(
            f"the released program has no place for the encoder in {source}",
            expected=", ".join(f"memory.{key} = {RELEASED.get(key, 'a number')}" for key in other),
            found=", ".join(f"memory.{key} = {value}" for key, value in other.items()),
        )
    arrays = {name: np.asarray(jax.device_get(x)) for name, x in split(encoder)[1].items()}
    tensors = original(KINDS["memory"].table(config), arrays) | _unread(config)
    if source.is_dir() and (source / UNREAD).exists():
        tensors |= {name: np.array(x) for name, x in open_tensors(source / UNREAD)[0].items()}
    tensors |= {
        re.sub(r"\.conv_block(\d+)\.", lambda found: f".cnn.{int(found[1]) - 1}.", name): x
        for name, x in tensors.items()
    }
    tensors = {
        prefix + name: x if np.issubdtype(x.dtype, np.integer) else x.astype(DTYPES[dtype])
        for name, x in tensors.items()
    }
    make_folder(out.parent)
    write_safetensors(out, tensors, tensors.items(), {"format": "pt"})


def _unread(config: MemoryConfig) -> dict[str, np.ndarray]:
    """Tensors of the released module that nothing computes with, as they are at its creation."""
    tensors = {}
    for band in ("high", "low"):
        for i, (channels, *_) in enumerate(config.stages, start=1):
            block = f"{band}_pass_module.conv_block{i}"
            for name, fill in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
                tensors[f"{block}.bn.{name}"] = np.full(channels, fill, np.float32)
            for norm in ("bn", "fft_filter.norm"):
                tensors[f"{block}.{norm}.num_batches_tracked"] = np.zeros((), np.int64)
    return tensors


# --- folders of networks ----------------------------------------------------------------------------------------

ORIGINAL_FILES = {
    "dit": "diffusion_pytorch_model.safetensors",
    "vae": "Wan2.1_VAE.safetensors",
    "text": "models_t5_umt5-xxl-enc-bf16.safetensors",
}
VAE_2_2 = "Wan2.2_VAE.safetensors"  # instead, for a VAE with shortcuts
DIFFUSERS_FILES = {
    "dit": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text": "text_encoder/model.safetensors",
}
EXPERTS = {
    "original": {
        "dit": "low_noise_model/diffusion_pytorch_model.safetensors",
        "dit_high": "high_noise_model/diffusion_pytorch_model.safetensors",
    },
    "diffusers": {
        "dit": "transformer_2/diffusion_pytorch_model.safetensors",
        "dit_high": "transformer/diffusion_pytorch_model.safetensors",
    },
    "comfyui": {
        "dit": "diffusion_models/wan_low_noise.safetensors",
        "dit_high": "diffusion_models/wan_high_noise.safetensors",
    },
}


COMFY_FILES = {
    "dit": "diffusion_models/wan.safetensors",
    "vae": "vae/wan_vae.safetensors",
}
PLACES = {"original": ORIGINAL_FILES, "diffusers": DIFFUSERS_FILES, "comfyui": COMFY_FILES}
LEFT_OUT = {
    "clip": "not all of it was converted",
    "memory": "--export=dit-mem writes it",
    "text": "ComfyUI reads its tokenizer from the same file: take its own umt5_xxl_fp16.safetensors",
}


def export_file(source: str | Path, dest: str | Path, advance: Advance = lambda _: None) -> dict[str, str]:
    """Writes the transformer of a converted folder as one file for ComfyUI's models/diffusion_models.

    Returns:
        the networks that are left out, with the reasons.
    Raises:
        UserError: if `dest` exists, or the folder is damaged or holds no transformer, or two.
    """
    source, dest = Path(source), Path(dest)
    networks = _networks(source, dest, ("dit", "dit_high"), "comfyui")
    if len(found := sorted(networks.keys() & {"dit", "dit_high"})) > 1:
        raise UserError(
            f"{source} holds two transformers, and {dest} is one file",
            found=", ".join(found),
            fix=f"ditmem convert --export=comfyui {source} {dest.with_suffix('')}, a folder",
        )
    (role,) = found
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        _export_network(
            source / FILES[role],
            dest,
            "dit",
            "comfyui",
            build(KINDS["dit"].config, networks[role], role),
            advance,
        )
    except OSError as error:
        raise UserError(
            f"cannot write {dest}", found=error, fix="free space on the disk, or another file"
        ) from error
    return {
        name: LEFT_OUT.get(name, f"ditmem convert --export=comfyui {source} FOLDER writes it")
        for name in networks
        if name != role
    }


def _networks(source: Path, dest: Path, places: Iterable[str], naming: str) -> dict[str, Any]:
    """Configurations of the networks in a converted folder, after a check that they can be written to `dest`."""
    if dest.exists():
        raise UserError(f"{dest} exists", fix=f"another folder or file; or delete it first: rm -r {dest}")
    networks = read_index(source)["networks"]
    if not networks.keys() & set(places):
        raise UserError(
            f"{source} holds no network that has {naming} names",
            expected=f"one of: {', '.join(places)}",
            found=", ".join(networks) or "none at all",
            fix=f"ditmem convert --export dit-mem {source} OUT.safetensors writes a memory encoder",
        )
    if problems := damage(source):
        raise findings(
            f"{source} is damaged", problems, fix=f"ditmem convert SOURCE DEST again, in place of {source}"
        )
    return networks


def export_folder(
    source: str | Path, dest: str | Path, naming: str, advance: Advance = lambda _: None
) -> dict[str, str]:
    """Writes the networks of a converted folder in the names and layout of another program, to a new folder.

    Args:
        naming: "original"; "diffusers", with all that its pipelines open beside the weights; or "comfyui".
    Returns:
        the networks that are left out, which have no place there, with the reasons.

    Raises:
        UserError: if `dest` exists, or the folder is damaged or holds nothing that has a place there.
    """
    source, dest = Path(source), Path(dest)
    networks = read_index(source)["networks"]
    files = PLACES[naming] | (EXPERTS[naming] if "dit_high" in networks else {})
    if naming == "original" and networks.get("vae", {}).get("shortcuts"):
        files = files | {"vae": VAE_2_2}
    networks = _networks(source, dest, files, naming)
    with new_folder(dest) as unfinished:
        for role in sorted(networks.keys() & files.keys()):
            kind = role.removesuffix("_high")
            config = build(KINDS[kind].config, networks[role], role)
            path = unfinished / files[role]
            path.parent.mkdir(parents=True, exist_ok=True)
            _export_network(source / FILES[role], path, kind, naming, config, advance)
            if naming == "diffusers":
                _write_json(path.with_name("config.json"), _theirs(kind, config))
            elif kind == "dit" and naming == "original":
                _write_json(
                    path.with_name("config.json"), {"model_type": _model_type(config)} | networks[role]
                )
        if naming == "original":
            _add_sizes(unfinished / "config.json", networks)
        has_tokenizer = (source / "tokenizer.json").exists() and naming != "comfyui"
        if naming == "diffusers":
            _write_pipeline(unfinished, networks, has_tokenizer)
        if has_tokenizer:
            path = (
                unfinished / ("google/umt5-xxl" if naming == "original" else "tokenizer") / "tokenizer.json"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            with reading(source / "tokenizer.json"):
                content = (source / "tokenizer.json").read_bytes()
            path.write_bytes(content)
            if naming == "diffusers":
                _write_json(path.with_name("tokenizer_config.json"), _tokenizer_config(content))
    return {name: LEFT_OUT[name] for name in sorted(networks.keys() - files.keys())}


def _write_pipeline(folder: Path, networks: dict[str, Any], has_tokenizer: bool) -> None:
    """Writes the description of a pipeline of diffusers, and the scheduler that it needs beside the networks."""
    role = "dit" if "dit" in networks else "dit_high"
    config = build(DiTConfig, networks[role], role) if role in networks else None
    given = bool(config and config.condition_dim)
    parts = {
        "scheduler": ("diffusers", "UniPCMultistepScheduler"),
        "transformer": ("diffusers", "WanTransformer3DModel"),
        "transformer_2": ("diffusers", "WanTransformer3DModel"),
        "vae": ("diffusers", "AutoencoderKLWan"),
        "text_encoder": ("transformers", "UMT5EncoderModel"),
        "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    }
    two = "dit_high" in networks
    there = {
        "scheduler": True, "transformer": config is not None, "transformer_2": two and "dit" in networks,
        "vae": "vae" in networks, "text_encoder": "text" in networks, "tokenizer": has_tokenizer,
    }  # fmt: skip
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if given else "WanPipeline",
        "_diffusers_version": "0.35.0",
        "boundary_ratio": (0.9 if given else 0.875) if two else None,
        "expand_timesteps": bool(config and config.clean_frames),
    }
    index |= {name: list(place) if there[name] else [None, None] for name, place in parts.items()}
    if given:
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    _write_json(folder / "model_index.json", index)
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 12.0 if two and not given else 5.0,
        "solver_order": 2,
    }
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)


def _tokenizer_config(content: bytes) -> dict[str, Any]:
    """The configuration that transformers wants beside a tokenizer.json; of the special tokens those that it has."""
    text = content.decode()
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    found = {key: token for key, token in tokens.items() if json.dumps(token) in text}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **found}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")


def _model_type(config: DiTConfig) -> str:
    """The word of original configurations for a kind of transformer."""
    if config.condition_dim:
        return "flf2v" if config.image_positions else "i2v"
    return "ti2v" if config.clean_frames else "t2v"


def _add_sizes(path: Path, networks: dict[str, Any]) -> None:
    """Tells the sizes of VAE and text encoder, which original configurations leave out, in the config.json."""
    described = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    _write_json(path, described | {kind: networks[kind] for kind in ("vae", "text") if kind in networks})


def _export_network(source: Path, path: Path, kind: str, naming: str, config: Any, advance: Advance) -> None:
    arrays = open_tensors(source)[0]
    table, patch = KINDS[kind].table(config), config.patch_size if kind == "dit" else (1, 2, 2)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in originals(table, arrays, patch)}
    found = names_diffusers.pairs(kind, shapes) if naming == "diffusers" else ()

    def pieces() -> Iterator[tuple[str, np.ndarray]]:
        for name, x in originals(table, arrays, patch):
            for block in blocks(x, x.dtype):
                yield names_diffusers.renamed(found, name), block
                advance(block.nbytes)

    shapes = {names_diffusers.renamed(found, name): x for name, x in shapes.items()}
    write_safetensors(path, shapes, pieces(), {"format": "pt"})


def _untold(config: DiTConfig) -> dict[str, Any]:
    """Settings that diffusers has no word for and shapes do not tell, where they differ from the published models."""
    inferred = config.out_dim == VAE_PRESETS["wan2.2"].z_dim
    return {
        "text_len": None if config.text_len == 512 else config.text_len,
        "clean_frames": None if config.clean_frames == inferred else config.clean_frames,
    }


def _theirs(kind: str, config: Any) -> dict[str, Any]:
    """The config.json of diffusers or transformers for a network."""
    if kind == "dit":
        return {
            "_class_name": "WanTransformer3DModel",
            "patch_size": config.patch_size,
            "num_attention_heads": config.num_heads,
            "attention_head_dim": config.head_dim,
            "in_channels": config.in_dim,
            "out_channels": config.out_dim,
            "text_dim": config.text_dim,
            "freq_dim": config.freq_dim,
            "ffn_dim": config.ffn_dim,
            "num_layers": config.num_layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": config.eps,
            "image_dim": config.image_dim,
            "pos_embed_seq_len": config.image_positions,
            "added_kv_proj_dim": config.dim if config.image_dim else None,
        } | {key: value for key, value in _untold(config).items() if value is not None}
    if kind == "vae":
        return {
            "_class_name": "AutoencoderKLWan",
            "base_dim": config.dim,
            "z_dim": config.z_dim,
            "dim_mult": config.dim_mult,
            "num_res_blocks": config.num_res_blocks,
            "temperal_downsample": config.temporal_downsample,  # so spelled there
            "latents_mean": config.mean,
            "latents_std": config.std,
            "in_channels": 3 * config.patch_size**2,
            "out_channels": 3 * config.patch_size**2,
            "patch_size": config.patch_size if config.patch_size > 1 else None,
            "decoder_base_dim": config.decoder_dim,
            "is_residual": config.shortcuts,
            "scale_factor_spatial": config.spatial_stride,
            "scale_factor_temporal": config.temporal_stride,
        }
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "d_model": config.dim,
        "d_kv": config.dim_attn // config.num_heads,
        "d_ff": config.dim_ffn,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "vocab_size": config.vocab,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_dist,
        "feed_forward_proj": "gated-gelu",
    }
