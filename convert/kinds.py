"""Which network a file holds, told by its tensors, and the configuration that their shapes and a config.json give."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from flax import nnx

from ditmem_jax.config import CLIPConfig, DiTConfig, MemoryConfig, UMT5Config, VAEConfig, build
from ditmem_jax.config.presets import VAE_PRESETS
from ditmem_jax.errors import UserError
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.wan.clip import CLIPVision
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.models.wan.umt5 import UMT5
from ditmem_jax.models.wan.vae import VAE

from . import clip, dit, memory, names_diffusers, umt5, vae
from .engine import Table

PLAIN = Table(())
Shapes = Mapping[str, tuple[int, ...]]
MODEL_TYPES = ("t2v", "i2v", "ti2v")
UNUSED = {"_class_name", "_diffusers_version", "model_type", "window_size", "qk_norm", "cross_attn_norm"}
CLIP_HEAD = 80  # width of a head in ViT-H
HEAD = 128  # width of a head in every published transformer, where no config.json tells


@dataclasses.dataclass(frozen=True)
class Kind:
    """A network: how its files are recognised, and how it is configured, made and filled.

    `signs` are patterns of tensor names by naming; `fields` translates the config.json of diffusers. `spelling`
    holds the prefixes and aliases of names, which are needed before the configuration is known.
    """

    signs: Mapping[str, str]
    config: type
    infer: Callable[[Shapes], dict[str, Any]]
    module: Callable[..., nnx.Module]
    table: Callable[[Any], Table]
    fields: Mapping[str, str]
    spelling: Table = PLAIN


def _dit(shapes: Shapes) -> dict[str, Any]:
    dim, channels, *patch = shapes["patch_embedding.weight"]
    return dict(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_heads=max(dim // HEAD, 1),
        num_layers=_layers(shapes, "blocks"),
        in_dim=channels,
        out_dim=shapes["head.head.weight"][0] // math.prod(patch),
        text_dim=shapes["text_embedding.0.weight"][1],
        freq_dim=shapes["time_embedding.0.weight"][1],
        patch_size=patch,
        image_positions=shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else None,
        image_dim=shapes["img_emb.proj.0.weight"][0] if "img_emb.proj.0.weight" in shapes else None,
        clean_frames=channels == VAE_PRESETS["wan2.2"].z_dim,  # of the published ones only TI2V-5B
    )


def _vae(shapes: Shapes) -> dict[str, Any]:
    """Levels end with a resampling, which halves the time as well where it has a convolution over time."""
    (dim, channels, *_), z_dim = shapes["encoder.conv1.weight"], shapes["conv2.weight"][0]
    level, levels, in_time = [], [], []
    for layer in _encoder_layers(shapes):
        if f"{layer}.resample.1.weight" in shapes:
            in_time.append(f"{layer}.time_conv.weight" in shapes)
            levels, level = [*levels, level], []
        else:
            level.append(shapes[f"{layer}.residual.6.weight"][0])
    levels.append(level)
    values: dict[str, Any] = dict(
        dim=dim,
        z_dim=z_dim,
        dim_mult=[level[-1] // dim for level in levels],
        num_res_blocks=len(levels[0]),
        temporal_downsample=in_time,
    )
    for published in VAE_PRESETS.values():
        if published.z_dim == z_dim:
            values |= dict(mean=published.mean, std=published.std)
    if _layers(shapes, "encoder.downsamples.0.downsamples"):  # the kind of Wan 2.2
        width = shapes["decoder.conv1.weight"][0] // values["dim_mult"][-1]
        values |= dict(patch_size=math.isqrt(channels // 3), decoder_dim=width, shortcuts=True)
    return values


def _encoder_layers(shapes: Shapes) -> Iterator[str]:
    """Names of the layers between the first convolution and the middle, whether or not levels nest them."""
    for i in range(_layers(shapes, "encoder.downsamples")):
        level = f"encoder.downsamples.{i}"
        inner = _layers(shapes, f"{level}.downsamples")
        yield from (f"{level}.downsamples.{j}" for j in range(inner)) if inner else [level]


def _text(shapes: Shapes) -> dict[str, Any]:
    vocab, dim = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return dict(
        dim=dim,
        dim_attn=shapes["blocks.0.attn.q.weight"][0],
        dim_ffn=shapes["blocks.0.ffn.fc1.weight"][0],
        num_heads=heads,
        num_layers=_layers(shapes, "blocks"),
        vocab=vocab,
        num_buckets=buckets,
    )


def _clip(shapes: Shapes) -> dict[str, Any]:
    (dim, _, _, patch), tokens = shapes["visual.patch_embedding.weight"], shapes["visual.pos_embedding"][-2]
    return dict(
        dim=dim,
        ffn_dim=shapes["visual.transformer.0.mlp.0.weight"][0],
        num_heads=max(dim // CLIP_HEAD, 1),
        num_layers=_layers(shapes, "visual.transformer") - 1,
        image_size=patch * math.isqrt(tokens - 1),
        patch_size=patch,
    )


def _memory(shapes: Shapes) -> dict[str, Any]:
    """Strides and pools leave no trace in shapes: the released ones. The latent grid is one that the filter fits."""
    stages, block = [], "high_pass_module.conv_block{}"
    for i, (_, _, stride, pool) in enumerate(MemoryConfig.stages, start=1):
        channels, _, kernel, *_ = shapes[f"{block.format(i)}.conv.weight"]
        stages.append((channels, kernel, stride, pool))
    _, frames, height, half_width, _ = shapes[f"{block.format(1)}.fft_filter.complex_weight"]
    stride = stages[0][2]
    return dict(
        dim=shapes["high_pass_module.feature_proj.weight"][0],
        in_dim=shapes[f"{block.format(1)}.conv.weight"][1],
        stages=stages,
        latent_grid=((frames - 1) * stride + 1, height * stride, 2 * (half_width - 1) * stride),
    )


def _layers(shapes: Shapes, stem: str) -> int:
    pattern = re.compile(re.escape(stem) + r"\.(\d{1,3})\.")
    return 1 + max((int(found[1]) for name in shapes if (found := pattern.match(name))), default=-1)


KINDS = {
    "dit": Kind(
        {"original": r"blocks\.\d+\.(self|cross)_attn\.", "diffusers": r"blocks\.\d+\.attn[12]\."},
        DiTConfig, _dit, DiT, dit.table,
        {"num_attention_heads": "num_heads", "eps": "eps", "text_len": "text_len", "clean_frames": "clean_frames"},
    ),
    "vae": Kind(
        {
            "original": r"(en|de)coder\.((down|up)samples|middle)\.",
            "diffusers": r"(en|de)coder\.((down|up)_blocks|mid_block)\.",
        },
        VAEConfig, _vae, VAE, vae.table,
        {"latents_mean": "mean", "latents_std": "std"},
    ),
    "text": Kind(
        {"original": r"blocks\.\d+\.attn\.[qkvo]\.", "diffusers": r"encoder\.block\.\d+\.layer\."},
        UMT5Config, _text, UMT5, lambda config: umt5.table(),
        {"relative_attention_max_distance": "max_dist"},
    ),
    "clip": Kind(
        {
            "original": r"visual\.transformer\.\d+\.",
            "diffusers": r"(vision_model\.)?encoder\.layers\.\d+\.",
        },
        CLIPConfig, _clip, CLIPVision, clip.table,
        {"num_attention_heads": "num_heads", "layer_norm_eps": "eps"}, clip.SPELLING,
    ),
    "memory": Kind(
        {"original": r"(pipe\.)?(dit_mem\.)?(high|low)_pass_module\."},
        MemoryConfig, _memory, MemoryEncoder, memory.table, {}, memory.table(MemoryConfig(dim=8)),
    ),
}  # fmt: skip


def detect(names: Collection[str], kind: str | None = None) -> tuple[str, str] | None:
    """Kind and naming with the most names that only they have; None if there are none.

    Args:
        kind: look for this kind only.
    """
    counts = {
        (candidate, naming): sum(bool(re.match(pattern, name)) for name in names)
        for candidate in ([kind] if kind else KINDS)
        for naming, pattern in KINDS[candidate].signs.items()
    }
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else None


def naming_aliases(kind: str, naming: str, names: Collection[str]) -> dict[str, str]:
    """Aliases for `engine.Table` that make the names of a file original."""
    return names_diffusers.aliases(names_diffusers.pairs(kind, names)) if naming == "diffusers" else {}


def configure(kind: str, shapes: Shapes, described: Mapping[str, Any], where: str) -> Any:
    """The configuration of a network.

    Args:
        shapes: of its tensors, by canonical name.
        described: the config.json beside it, which wins over what shapes tell.
        where: the network, for errors.
    Raises:
        UserError: for another kind of network, a tensor that the sizes are read from and that is not there, or
            values that are impossible.
    """
    network, values = KINDS[kind], _described(kind, described, where)
    try:
        values = _inferred(network, shapes, where) | values
    except UserError:
        if not values:
            raise  # else what is missing is told with everything else that does not fit
    return build(network.config, values, where)


def _inferred(network: Kind, shapes: Shapes, where: str) -> dict[str, Any]:
    try:
        return network.infer(shapes)
    except KeyError as error:
        raise UserError(f"{where} lacks {error.args[0]}, which tells its size") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{where} has tensors of shapes that fit no such network", found=error) from error


def _described(kind: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a config.json says of a network of this kind, in our names."""
    theirs = KINDS[kind].fields
    if kind == "clip" and (found := config.get("hidden_act", "gelu")) != "gelu":
        raise UserError(f"{where} is another kind of CLIP", expected="hidden_act gelu", found=found)
    if any(key in config for key, ours in theirs.items() if key != ours):
        return {ours: config[key] for key, ours in theirs.items() if key in config}
    if kind != "dit":
        values = config.get(kind, {})
        if not isinstance(values, dict):
            raise UserError(
                f"{where}: entry {kind!r} of config.json", expected="values by name", found=values
            )
        return values
    if not config.keys() & {field.name for field in dataclasses.fields(DiTConfig)}:
        return {}
    if (found := config.get("model_type", "t2v")) not in MODEL_TYPES:
        expected = f"model_type {' or '.join(MODEL_TYPES)}"
        raise UserError(f"{where} is another kind of transformer", expected=expected, found=found)
    values = {"clean_frames": True} if found == "ti2v" else {}
    return values | {key: value for key, value in config.items() if key not in {*UNUSED, *KINDS}}
