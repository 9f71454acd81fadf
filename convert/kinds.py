"""Which network a file holds, told by its tensors, and the configuration that their shapes and a config.json give."""

import dataclasses
import math
import re
from collections import Counter
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
MODEL_TYPES = ("t2v", "i2v", "ti2v", "flf2v")
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
        # Of the published ones only TI2V-5B; Fun-Control has as many channels, most of them a condition.
        clean_frames=channels
        == VAE_PRESETS["wan2.2"].z_dim
        == shapes["head.head.weight"][0] // math.prod(patch),
    )


def _vae(shapes: Shapes) -> dict[str, Any]:
    """Levels end with a resampling, which halves the time as well where it has a convolution over time."""
    for half in ("encoder", "decoder"):
        if f"{half}.conv1.weight" not in shapes:
            raise UserError(
                f"a VAE without its {half} half",
                expected=f"tensors named {half}.*, to {half[:2]}code videos",
                fix="the whole VAE: hf download Wan-AI/Wan2.1-T2V-1.3B Wan2.1_VAE.pth",
            )
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
        {
            "original": r"blocks\.\d+\.attn\.[qkvo]\.", "diffusers": r"encoder\.block\.\d+\.layer\.",
            "gguf": r"enc\.blk\.\d+\.",
        },
        UMT5Config, _text, UMT5, lambda config: umt5.table(),
        {"relative_attention_max_distance": "max_dist"},
    ),
    "clip": Kind(
        {
            "original": r"visual\.transformer\.\d+\.",
            "diffusers": r"encoder\.layers\.\d+\.",
        },
        CLIPConfig, _clip, CLIPVision, clip.table,
        {"num_attention_heads": "num_heads", "layer_norm_eps": "eps"}, clip.SPELLING,
    ),
    "memory": Kind(
        {"original": r"(high|low)_pass_module\."},
        MemoryConfig, _memory, MemoryEncoder, memory.table, {}, memory.table(MemoryConfig(dim=8)),
    ),
}  # fmt: skip


# Segments that wrappers of torch put into names, wherever they stand.
WRAPPERS = re.compile(
    r"(?:(?<=\.)|\A)(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module|_fpw_module|module)\."
)
TRAINING = re.compile(r"(?i)(?:\A|\.)\w*(?:optim|scheduler|scaler)\w*\.")  # states of a training program
SIGNS = [
    (kind, naming, re.compile(rf"((?:.*?\.)?)(?:{sign})"))
    for kind, network in KINDS.items()
    for naming, sign in network.signs.items()
]


@dataclasses.dataclass(frozen=True)
class Found:
    """A network among the tensors of a file: `names` are those in the file by those without prefix and wrappers."""

    kind: str
    naming: str
    prefix: str
    names: dict[str, str]


def networks(names: Collection[str], kind: str | None = None) -> list[Found]:
    """The networks among tensors of these names, whatever stands before the names of each.

    Args:
        kind: look for this kind only.
    Raises:
        UserError: for two names that differ in wrappers only.
    """
    plain = {name: WRAPPERS.sub("", name) for name in names if not TRAINING.search(name)}
    counts: dict[str, Counter] = {}
    for name in plain.values():
        for candidate, naming, pattern in SIGNS:
            if (kind is None or kind == candidate) and (sign := pattern.match(name)):
                counts.setdefault(sign[1], Counter())[candidate, naming] += 1
    members: dict[str, dict[str, str]] = {prefix: {} for prefix in counts}
    ordered = sorted(counts, key=len, reverse=True)
    for name, short in plain.items():
        prefix = next((prefix for prefix in ordered if short.startswith(prefix)), None)
        if prefix is None:
            continue
        inner = short.removeprefix(prefix)
        if inner in members[prefix]:
            raise UserError(
                f"{name} and {members[prefix][inner]} are both the tensor {inner}",
                fix="save the weights of the bare module: model.module.state_dict()",
            )
        members[prefix][inner] = name
    found = []
    for prefix in sorted(counts):
        ((best, naming), _), *_ = counts[prefix].most_common(1)
        found.append(Found(best, naming, prefix, members[prefix]))
    return found


def detect(names: Collection[str], kind: str | None = None) -> tuple[str, str] | None:
    """Kind and naming of the largest network among tensors of these names; None if there is none."""
    found = max(networks(names, kind), key=lambda network: len(network.names), default=None)
    return (found.kind, found.naming) if found else None


def naming_aliases(kind: str, naming: str, names: Collection[str]) -> dict[str, str]:
    """Aliases for `engine.Table` that make the names of a file original."""
    if naming == "original":
        return {}
    found = names_diffusers.TEXT_GGUF if naming == "gguf" else names_diffusers.pairs(kind, names)
    return names_diffusers.aliases(found)


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
        if not values or kind == "vae":
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
    """The settings in a config.json of a network of this kind, in our names."""
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
        raise UserError(
            f"{where} is another kind of transformer",
            expected=expected,
            found=found,
            fix="a transformer of one of these kinds; or, if it is one, take model_type out of its config.json",
        )
    values = {"clean_frames": True} if found == "ti2v" else {}
    # Relatives describe what they add beside; their tensors tell whether it is there.
    known = {field.name for field in dataclasses.fields(DiTConfig)}
    return values | {key: value for key, value in config.items() if key in known}
