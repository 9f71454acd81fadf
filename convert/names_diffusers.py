"""Names of the same tensors in the folders of diffusers and transformers.

Original names are the hub: a file in other names is read through aliases, and exported through their inverse. A
pair is (original, other), both as dotted beginnings of names; `{i}` stands for a number that both have.
"""

import re
from collections.abc import Iterable, Sequence

Pairs = Sequence[tuple[str, str]]

DIT: Pairs = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
    ("blocks.{i}.norm3", "blocks.{i}.norm2"),
    ("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj"),
    ("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2"),
    *(
        (f"blocks.{{i}}.{original}.{leaf}", f"blocks.{{i}}.{other}.{other_leaf}")
        for original, other in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for leaf, other_leaf in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
            ("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k"),
        )
    ),
)  # fmt: skip

TEXT: Pairs = (
    ("token_embedding", "shared"),
    ("token_embedding", "encoder.embed_tokens"),  # the same once more, in files that hold both
    ("norm", "encoder.final_layer_norm"),
    ("blocks.{i}.norm1", "encoder.block.{i}.layer.0.layer_norm"),
    ("blocks.{i}.norm2", "encoder.block.{i}.layer.1.layer_norm"),
    ("blocks.{i}.pos_embedding.embedding", "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias"),
    ("blocks.{i}.ffn.gate.0", "encoder.block.{i}.layer.1.DenseReluDense.wi_0"),
    ("blocks.{i}.ffn.fc1", "encoder.block.{i}.layer.1.DenseReluDense.wi_1"),
    ("blocks.{i}.ffn.fc2", "encoder.block.{i}.layer.1.DenseReluDense.wo"),
    *((f"blocks.{{i}}.attn.{leaf}", f"encoder.block.{{i}}.layer.0.SelfAttention.{leaf}") for leaf in "qkvo"),
)

CLIP: Pairs = (
    ("visual.patch_embedding", "embeddings.patch_embedding"),
    ("visual.cls_embedding", "embeddings.class_embedding"),
    ("visual.pos_embedding", "embeddings.position_embedding.weight"),
    ("visual.pre_norm", "pre_layrnorm"),  # so spelled there
    ("visual.post_norm", "post_layernorm"),
    *(
        (f"visual.transformer.{{i}}.{original}", f"encoder.layers.{{i}}.{other}")
        for original, other in (
            ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2"),
            ("attn.q", "self_attn.q_proj"), ("attn.k", "self_attn.k_proj"), ("attn.v", "self_attn.v_proj"),
            ("attn.proj", "self_attn.out_proj"),
        )
    ),
)  # fmt: skip

TEXT_GGUF: Pairs = (
    ("token_embedding", "token_embd"),
    ("norm", "enc.output_norm"),
    ("blocks.{i}.norm1", "enc.blk.{i}.attn_norm"),
    ("blocks.{i}.norm2", "enc.blk.{i}.ffn_norm"),
    ("blocks.{i}.pos_embedding.embedding", "enc.blk.{i}.attn_rel_b"),
    ("blocks.{i}.ffn.gate.0", "enc.blk.{i}.ffn_gate"),
    ("blocks.{i}.ffn.fc1", "enc.blk.{i}.ffn_up"),
    ("blocks.{i}.ffn.fc2", "enc.blk.{i}.ffn_down"),
    *((f"blocks.{{i}}.attn.{leaf}", f"enc.blk.{{i}}.attn_{leaf}") for leaf in "qkvo"),
)

RESIDUAL = (
    ("residual.0", "norm1"), ("residual.2", "conv1"), ("residual.3", "norm2"), ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)  # fmt: skip


def pairs(kind: str, names: Iterable[str]) -> Pairs:
    """The pairs of a kind of network, for a file or table with these names (original or other)."""
    return _vae(list(names)) if kind == "vae" else {"dit": DIT, "text": TEXT, "clip": CLIP}.get(kind, ())


def aliases(found: Pairs) -> dict[str, str]:
    """Regular expression of other names -> replacement that makes them original (see `engine.Table`)."""
    return dict(_substitution(other, original) for original, other in found)


def renamed(found: Pairs, name: str) -> str:
    """An original name in the other spelling; names that both share stay as they are."""
    for original, other in found:
        pattern, replacement = _substitution(original, other)
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _substitution(source: str, target: str) -> tuple[str, str]:
    pattern = re.escape(source).replace(re.escape("{i}"), r"(\d{1,6})")
    return rf"\A{pattern}(?=\.|\Z)", target.replace("{i}", r"\1")


def _vae(names: list[str]) -> Pairs:
    """Pairs of the VAE, whose numbers depend on its size.

    Levels of the Wan 2.2 VAE are nested in both spellings. Those of 2.1 stand in a row in the original ones, and
    in the others the encoder's do, too.
    """
    found = [("conv1", "quant_conv"), ("conv2", "post_quant_conv")]
    for chain in ("encoder", "decoder"):
        found += [
            (f"{chain}.conv1", f"{chain}.conv_in"),
            (f"{chain}.head.0", f"{chain}.norm_out"),
            (f"{chain}.head.2", f"{chain}.conv_out"),
            (f"{chain}.middle.1", f"{chain}.mid_block.attentions.0"),
            *_residual(f"{chain}.middle.0", f"{chain}.mid_block.resnets.0"),
            *_residual(f"{chain}.middle.2", f"{chain}.mid_block.resnets.1"),
        ]
    if _count(names, r"encoder\.(?:downsamples\.\d+\.downsamples|down_blocks\.\d+\.resnets)\.(\d+)"):
        return found + _nested_levels(names)
    return [
        *found,
        *_residual("encoder.downsamples.{i}", "encoder.down_blocks.{i}"),
        ("encoder.downsamples.{i}", "encoder.down_blocks.{i}"),
        *_levels_in_a_row(names),
    ]


def _nested_levels(names: list[str]) -> list[tuple[str, str]]:
    levels = _count(names, r"decoder\.(?:upsamples|up_blocks)\.(\d+)\.")
    residuals = max(
        _count(names, r"decoder\.upsamples\.\d+\.upsamples\.(\d+)\.residual"),
        _count(names, r"decoder\.up_blocks\.\d+\.resnets\.(\d+)"),
    )
    found = []
    for level in range(levels):
        down, up = f"encoder.downsamples.{level}.downsamples", f"decoder.upsamples.{level}.upsamples"
        other_down, other_up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        for i in range(residuals):
            found += _residual(f"{up}.{i}", f"{other_up}.resnets.{i}")
        for i in range(residuals - 1):
            found += _residual(f"{down}.{i}", f"{other_down}.resnets.{i}")
        found.append((f"{up}.{residuals}", f"{other_up}.upsampler"))
        found.append((f"{down}.{residuals - 1}", f"{other_down}.downsampler"))
    return found


def _levels_in_a_row(names: list[str]) -> list[tuple[str, str]]:
    """Levels of the decoder: some residuals and an upsampling each, the last one without."""
    resamples = [
        int(m[1]) for name in names if (m := re.match(r"decoder\.upsamples\.(\d{1,6})\.resample\.", name))
    ]
    residuals = min(resamples, default=0) or _count(names, r"decoder\.up_blocks\.0\.resnets\.(\d+)")
    places = max(
        _count(names, r"decoder\.upsamples\.(\d+)"),
        _count(names, r"decoder\.up_blocks\.(\d+)") * (residuals + 1),
    )
    found = []
    for place in range(places):
        level, number = divmod(place, residuals + 1)
        if number < residuals:
            found += _residual(f"decoder.upsamples.{place}", f"decoder.up_blocks.{level}.resnets.{number}")
        else:
            found.append((f"decoder.upsamples.{place}", f"decoder.up_blocks.{level}.upsamplers.0"))
    return found


def _count(names: list[str], pattern: str) -> int:
    """One more than the largest number that the pattern finds, 0 for none."""
    found = (re.match(pattern.replace(r"(\d+)", r"(\d{1,2})(?!\d)"), name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _residual(original: str, other: str) -> list[tuple[str, str]]:
    return [(f"{original}.{a}", f"{other}.{b}") for a, b in RESIDUAL]
