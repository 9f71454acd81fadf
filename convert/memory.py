"""Names of the DiT-Mem memory encoder (`DiT-Mem-1.3B.safetensors`)."""

from ditmem_jax.config import MemoryConfig

from .engine import Rule, Table


def table(config: MemoryConfig) -> Table:
    """The names for one configuration; those without a counterpart in the released code are chosen alike."""
    rules, aliases = [], {}
    for i in range(len(config.stages)):
        aliases[rf"\.cnn\.{i}\."] = f".conv_block{i + 1}."  # the released module registers each block twice
    for band in ("high", "low"):
        source = f"{band}_pass_module"
        for i in range(len(config.stages)):
            block, stage = f"{source}.conv_block{i + 1}", f"{band}.stages.{i}"
            norm = f"{block}.fft_filter.norm"
            rules += [
                Rule(f"{block}.conv.weight", f"{stage}.conv.kernel", "conv3d"),
                Rule(f"{block}.conv.bias", f"{stage}.conv.bias"),
                Rule(f"{norm}.weight", f"{stage}.norm.scale"),
                Rule(f"{norm}.bias", f"{stage}.norm.bias"),
            ]
            if config.norm == "batch":
                rules += [
                    Rule(f"{norm}.running_mean", f"{stage}.norm.mean"),
                    Rule(f"{norm}.running_var", f"{stage}.norm.var"),
                ]
            if config.filter == "released":
                rules.append(Rule(f"{block}.fft_filter.complex_weight", f"{stage}.filter.complex_weight"))
        rules += [
            Rule(f"{source}.feature_proj.weight", f"{band}.projection.kernel", "linear"),
            Rule(f"{source}.feature_proj.bias", f"{band}.projection.bias"),
        ]
        if not isinstance(config.tokens, int):
            rules.append(Rule(f"{source}.position", f"{band}.position"))
    for part in ("q", "k", "v", "o"):
        rules += [
            Rule(f"self_attention.{part}.weight", f"self_attention.{part}.kernel", "linear"),
            Rule(f"self_attention.{part}.bias", f"self_attention.{part}.bias"),
        ]
    for part in ("norm_q", "norm_k"):
        rules.append(Rule(f"self_attention.{part}.weight", f"self_attention.{part}.scale"))
    if config.strength is not None:
        rules.append(Rule("log_strength", "log_strength"))
    return Table(
        rules=rules,
        ignored={
            r"\.conv_block\d+\.bn\.": "a norm of each block that the released forward pass never applies",
            r"\.num_batches_tracked\Z": "a counter that only a cumulative moving average would read",
        },
        aliases=aliases,
        prefixes=("pipe.dit_mem.", "dit_mem."),
    )
