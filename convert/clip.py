"""Names of CLIP's image encoder in `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`."""

from collections.abc import Mapping

import numpy as np

from ditmem_jax.config import CLIPConfig
from ditmem_jax.storage.tensors import Stored

from .dit import _linear, _norm
from .engine import Rule, Table

SPELLING = Table((), prefixes=("vision_model.",))  # in files of transformers before version 5


def table(config: CLIPConfig) -> Table:
    """The rules for an encoder of this configuration."""
    block, ours = "visual.transformer.{i}", "blocks"
    rules = [
        Rule("visual.patch_embedding.weight", "patch_embedding.kernel", "patch"),
        Rule("visual.cls_embedding", "class_token", "flatten"),
        Rule("visual.pos_embedding", "positions", "rows"),
        *_norm("visual.pre_norm", "norm"),
        *_norm(f"{block}.norm1", f"{ours}.norm1"),
        *_norm(f"{block}.norm2", f"{ours}.norm2"),
        *_linear(f"{block}.attn.proj", f"{ours}.attention.o"),
        *_linear(f"{block}.mlp.0", f"{ours}.feed_forward.up"),
        *_linear(f"{block}.mlp.2", f"{ours}.feed_forward.down"),
    ]
    for name in "qkv":
        rules += _linear(f"{block}.attn.{name}", f"{ours}.attention.{name}")
    ignored = {
        rf"^visual\.transformer\.{config.num_layers}\.": "the last block, before which Wan takes the tokens",
        r"^visual\.(post_norm\.|head$)": "what follows the last block",
        r"^(textual\.|log_scale$)": "the text encoder, which Wan has of its own",
    }
    return Table(rules, ignored, prefixes=SPELLING.prefixes)


def unfused(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors with the three projections of attention apart, which original files hold as one."""
    found = {}
    for name, tensor in tensors.items():
        stem, fused, leaf = name.rpartition(".attn.to_qkv.")
        if not fused:
            found[name] = tensor
            continue
        rows = tensor.shape[0] // 3
        for place, part in enumerate("qkv"):
            found[f"{stem}.attn.{part}.{leaf}"] = Stored(
                (rows, *tensor.shape[1:]), tensor.dtype, tensor.size // 3, _rows(tensor, place * rows, rows)
            )
    return found


def _rows(tensor: Stored, start: int, count: int):
    return lambda: np.asarray(tensor.read())[start : start + count]
