"""Names of the Wan transformer in original checkpoints."""

from convert.engine import Rule, Table


def _linear(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.kernel", "linear"), Rule(f"{source}.bias", f"{target}.bias")]


def table() -> Table:
    """The text-to-video kind, any size."""
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
        Rule("blocks.{i}.norm3.weight", "blocks.cross_norm.scale"),
        Rule("blocks.{i}.norm3.bias", "blocks.cross_norm.bias"),
        *_linear("blocks.{i}.ffn.0", "blocks.feed_forward.up"),
        *_linear("blocks.{i}.ffn.2", "blocks.feed_forward.down"),
    ]
    for source, target in (("self_attn", "self_attention"), ("cross_attn", "cross_attention")):
        for name in ("q", "k", "v", "o"):
            rules += _linear(f"blocks.{{i}}.{source}.{name}", f"blocks.{target}.{name}")
        for name in ("norm_q", "norm_k"):
            rules.append(Rule(f"blocks.{{i}}.{source}.{name}.weight", f"blocks.{target}.{name}.scale"))
    return Table(rules)
