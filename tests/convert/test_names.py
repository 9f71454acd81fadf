"""Names in the spelling of diffusers and transformers, for every published network."""

import json
from pathlib import Path

import numpy as np
import pytest

from ditmem_jax.config import DiTConfig, MemoryConfig, UMT5Config
from ditmem_jax.config.presets import DIT_PRESETS, VAE_PRESETS
from ditmem_jax.convert.adapters import from_peft
from ditmem_jax.convert.engine import Table, canonical
from ditmem_jax.convert.kinds import configure, detect
from ditmem_jax.convert.names_diffusers import aliases, pairs, renamed
from ditmem_jax.errors import UserError

MANIFESTS = sorted((Path(__file__).parents[1] / "manifests").glob("*.json"))
CONFIGS = {
    "wan2.1_t2v_1.3b": DIT_PRESETS["wan2.1-t2v-1.3b"],
    "wan2.1_t2v_14b": DIT_PRESETS["wan2.1-t2v-14b"],
    "wan2.1_i2v_14b": DIT_PRESETS["wan2.1-i2v-14b"],
    "wan2.2_i2v_a14b_expert": DIT_PRESETS["wan2.2-i2v-a14b"],
    "wan2.2_ti2v_5b": DIT_PRESETS["wan2.2-ti2v-5b"],
    "wan2.1_vae": VAE_PRESETS["wan2.1"],
    "wan2.2_vae": VAE_PRESETS["wan2.2"],
    "umt5_xxl_encoder": UMT5Config(),
    "dit_mem_1.3b": MemoryConfig(dim=1536),
}


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    tensors = json.loads(path.read_text())["tensors"]
    return {name: tuple(shape) for name, shape in tensors.items()}


def kind_of(path: Path) -> str:
    return next(kind for part, kind in KIND_OF.items() if part in path.stem)


KIND_OF = {"vae": "vae", "umt5": "text", "dit_mem": "memory", "wan": "dit"}


@pytest.mark.parametrize("path", MANIFESTS, ids=[path.stem for path in MANIFESTS])
def test_every_published_name_goes_there_and_back(path):
    names = list(shapes(path))
    found = pairs(kind_of(path), names)
    other = [renamed(found, name) for name in names]
    assert len(set(other)) == len(names)
    back = Table((), aliases=aliases(pairs(kind_of(path), other)))
    assert [canonical(back, name) for name in other] == names
    assert detect(names) == (kind_of(path), "original")
    assert detect(other) == (kind_of(path), "original" if kind_of(path) == "memory" else "diffusers")


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_tell_the_published_sizes(name):
    path = Path(__file__).parents[1] / "manifests" / f"{name}.json"
    assert configure(kind_of(path), shapes(path), {}, name) == CONFIGS[name]


@pytest.mark.parametrize(
    ("kind", "original", "other"),
    [
        ("dit", "blocks.29.self_attn.q.bias", "blocks.29.attn1.to_q.bias"),
        ("dit", "blocks.3.cross_attn.o.weight", "blocks.3.attn2.to_out.0.weight"),
        ("dit", "blocks.3.cross_attn.norm_k.weight", "blocks.3.attn2.norm_k.weight"),
        ("dit", "blocks.3.norm3.bias", "blocks.3.norm2.bias"),
        ("dit", "blocks.3.modulation", "blocks.3.scale_shift_table"),
        ("dit", "head.modulation", "scale_shift_table"),
        ("dit", "patch_embedding.weight", "patch_embedding.weight"),
        ("text", "token_embedding.weight", "shared.weight"),
        ("text", "blocks.7.ffn.gate.0.weight", "encoder.block.7.layer.1.DenseReluDense.wi_0.weight"),
        ("vae", "conv2.bias", "post_quant_conv.bias"),
        ("vae", "encoder.downsamples.2.resample.1.weight", "encoder.down_blocks.2.resample.1.weight"),
        ("vae", "encoder.downsamples.3.shortcut.weight", "encoder.down_blocks.3.conv_shortcut.weight"),
        ("vae", "decoder.middle.2.residual.6.bias", "decoder.mid_block.resnets.1.conv2.bias"),
        ("vae", "decoder.middle.1.to_qkv.weight", "decoder.mid_block.attentions.0.to_qkv.weight"),
        ("vae", "decoder.upsamples.4.residual.0.gamma", "decoder.up_blocks.1.resnets.0.norm1.gamma"),
        ("vae", "decoder.upsamples.7.time_conv.bias", "decoder.up_blocks.1.upsamplers.0.time_conv.bias"),
        ("vae", "decoder.upsamples.14.residual.3.gamma", "decoder.up_blocks.3.resnets.2.norm2.gamma"),
    ],
)
def test_names_by_hand(kind, original, other):
    manifest = next(path for path in MANIFESTS if kind_of(path) == kind and "2.2" not in path.stem)
    assert renamed(pairs(kind, shapes(manifest)), original) == other


def test_nested_levels_by_hand():
    names = shapes(Path(__file__).parents[1] / "manifests" / "wan2.2_vae.json")
    found = pairs("vae", names)
    for original, other in (
        (
            "encoder.downsamples.1.downsamples.0.shortcut.bias",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        ),
        (
            "encoder.downsamples.1.downsamples.2.time_conv.bias",
            "encoder.down_blocks.1.downsampler.time_conv.bias",
        ),
        ("decoder.upsamples.0.upsamples.2.residual.6.bias", "decoder.up_blocks.0.resnets.2.conv2.bias"),
        ("decoder.upsamples.2.upsamples.3.resample.1.bias", "decoder.up_blocks.2.upsampler.resample.1.bias"),
    ):
        assert original in names
        assert renamed(found, original) == other


def test_adapters_that_do_not_fit_a_transformer_are_named():
    config = DiTConfig(dim=8, ffn_dim=8, num_heads=2, num_layers=2, text_dim=8, freq_dim=8)
    tensors = {
        f"transformer.blocks.{i}.attn1.to_q.lora_{part}.weight": np.ones(shape, np.float32)
        for i in range(2)
        for part, shape in (("A", (3, 8)), ("B", (8, 3)))
    }
    assert from_peft(config, tensors, 3.0)[0].targets == (r"^blocks\.self_attention\.q$",)
    with pytest.raises(UserError, match=r"unknown tensor transformer.blocks.0.attn3.to_q.lora_A.weight"):
        from_peft(config, tensors | {"transformer.blocks.0.attn3.to_q.lora_A.weight": np.ones((3, 8))}, 3.0)
    with pytest.raises(UserError, match=r"blocks.1.self_attn.q.lora_B.weight is missing"):
        del tensors["transformer.blocks.1.attn1.to_q.lora_B.weight"]
        from_peft(config, tensors, 3.0)
    with pytest.raises(UserError, match=r"one rank(.|\n)*\[3, 4\]"):
        other = {name.replace("to_q", "to_k"): np.ones((4, 8)) for name in tensors if "lora_A" in name}
        from_peft(config, tensors | other, 3.0)
