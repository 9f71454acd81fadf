"""Names of the Wan transformer in original checkpoints."""

from ditmem_jax.config import DiTConfig

from .engine import Rule, Table


def _linear(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.kernel", "linear"), Rule(f"{source}.bias", f"{target}.bias")]


def _norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")]


def table(config: DiTConfig) -> Table:
    """The rules for a transformer of this configuration."""
    rules = [
        Rule("patch_embedding.weight", "patch_embedding.kernel", "patch"),
        Rule("patch_embedding.bias", "patch_embedding.bias"),
        *_linear("text_embedding.0", "text_embedding.up"),
        *_linear("text_embedding.2", "text_embedding.down"),
        *_linear("time_embedding.0", "time_embedding.0"),
        *_linear("time_embedding.2", "time_embedding.1"),
        *_linear("time_projection.1", "time_projection"),
        *_linear("head.head", "head"),
        Rule("head.modulation", "head_modulation", "squeeze0"),
        Rule("blocks.{i}.modulation", "blocks.modulation", "squeeze0"),
        *_norm("blocks.{i}.norm3", "blocks.cross_norm"),
        *_linear("blocks.{i}.ffn.0", "blocks.feed_forward.up"),
        *_linear("blocks.{i}.ffn.2", "blocks.feed_forward.down"),
    ]
    rules += _attention("self_attn.{}", "self_attention", "qkvo")
    rules += _attention("cross_attn.{}", "cross_attention", "qkvo")
    if config.image_dim is not None:
        rules += [
            *_positions(config),
            *_norm("img_emb.proj.0", "image_embedding.norm_in"),
            *_linear("img_emb.proj.1", "image_embedding.feed_forward.up"),
            *_linear("img_emb.proj.3", "image_embedding.feed_forward.down"),
            *_norm("img_emb.proj.4", "image_embedding.norm_out"),
            *_attention("cross_attn.{}_img", "image_attention", "kv"),
        ]
    return Table(rules)


def _positions(config: DiTConfig) -> list[Rule]:
    if config.image_positions is None:
        return []
    return [Rule("img_emb.emb_pos", "image_embedding.positions", "squeeze0")]


def _attention(source: str, target: str, names: str) -> list[Rule]:
    """The projections `names` in every block; `source` has a gap for the name of each."""
    rules = []
    for name in names:
        rules += _linear(f"blocks.{{i}}.{source.format(name)}", f"blocks.{target}.{name}")
        if name in "qk":
            norm = source.format(f"norm_{name}")
            rules.append(Rule(f"blocks.{{i}}.{norm}.weight", f"blocks.{target}.norm_{name}.scale"))
    return rules
