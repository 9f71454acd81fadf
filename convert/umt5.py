"""Names of the UMT5 encoder in original checkpoints."""

from .engine import Rule, Table

_DECODER = "of the decoder, which a text encoder has no use for"
IGNORED = {
    r"\A(decoder|dec)\.": _DECODER,
    r"\A(lm_head|output)\.": _DECODER,
    r"\Aspiece_model\Z": "the tokenizer as ComfyUI stores it; ours is a file tokenizer.json",
}


def table() -> Table:
    """The encoder, any size."""
    rules = [
        Rule("token_embedding.weight", "token_embedding.embedding"),
        Rule("norm.weight", "norm.scale"),
        Rule("blocks.{i}.norm1.weight", "blocks.norm1.scale"),
        Rule("blocks.{i}.norm2.weight", "blocks.norm2.scale"),
        Rule("blocks.{i}.pos_embedding.embedding.weight", "blocks.positions.embedding"),
        Rule("blocks.{i}.ffn.gate.0.weight", "blocks.feed_forward.gate.kernel", "linear"),
        Rule("blocks.{i}.ffn.fc1.weight", "blocks.feed_forward.fc1.kernel", "linear"),
        Rule("blocks.{i}.ffn.fc2.weight", "blocks.feed_forward.fc2.kernel", "linear"),
    ]
    rules += [Rule(f"blocks.{{i}}.attn.{n}.weight", f"blocks.attention.{n}.kernel", "linear") for n in "qkvo"]
    return Table(rules, ignored=IGNORED)
