"""Low-rank adapters of the transformer between peft's names and ours.

A file of theirs holds `LAYER.lora_A.weight [rank, inputs]` and `LAYER.lora_B.weight [outputs, rank]` for every adapted
layer of every block, in original or diffusers names; its alpha stands beside it in `adapter_config.json`.
"""

import re
from collections.abc import Mapping

import numpy as np
from flax import nnx

from ditmem_jax.config import AdapterConfig, DiTConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.adapters import NAME, adapted_layers, attach
from ditmem_jax.models.state import Arrays, abstract
from ditmem_jax.models.wan.dit import DiT

from . import dit, names_diffusers
from .engine import Rule, Table, canonical, convert
from .original import original

PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")


def from_peft(
    config: DiTConfig, tensors: Mapping[str, np.ndarray], alpha: float
) -> tuple[AdapterConfig, Arrays]:
    """Configuration and arrays of the adapters of a transformer.

    Args:
        tensors: a file of theirs, in original or diffusers names, with one of `PREFIXES` or none.
    Raises:
        UserError: for adapters of several ranks; and, with every finding, for tensors that are nothing of this
            transformer's, are missing in some block or have other sizes.
    """
    table = _table(config)
    ranks = {canonical(table, name): x.shape[0] for name, x in tensors.items() if ".lora_A." in name}
    if len(set(ranks.values())) != 1:
        raise UserError(
            "these are not adapters of one rank",
            expected="tensors LAYER.lora_A.weight and LAYER.lora_B.weight",
            found=f"ranks {sorted(set(ranks.values()))} in {len(tensors)} tensors",
        )
    found = adapted_layers([rule.target for rule in table.rules if rule.source.format(i=0) in ranks])
    targets = tuple(rf"^{re.escape(layer)}$" for layer in found)
    adapter = AdapterConfig(next(iter(ranks.values())), alpha, targets)
    _, wanted = attach(abstract(lambda: DiT(config, rngs=nnx.Rngs(0)))[0], adapter)
    return adapter, convert(table, tensors, wanted)


def to_peft(
    config: DiTConfig, adapters: Arrays, naming: str = "diffusers", prefix: str = "transformer."
) -> dict[str, np.ndarray]:
    """The tensors of a file of theirs; its `lora_alpha` and `r` are `AdapterConfig.alpha` and `rank`.

    Args:
        naming: of layers, "diffusers" or "original".
        prefix: of every name; with the default, `load_lora_weights` of diffusers' pipelines finds them.
    """
    rules = [rule for rule in _table(config).rules if rule.target in adapters]
    tensors = original(Table(rules), {path: np.asarray(x) for path, x in adapters.items()})
    pairs = names_diffusers.DIT if naming == "diffusers" else ()
    return {f"{prefix}{names_diffusers.renamed(pairs, name)}": x for name, x in tensors.items()}


def _table(config: DiTConfig) -> Table:
    """The rules for an adapter of every matrix in the blocks."""
    rules = []
    for rule in dit.table(config).rules:
        if rule.transform == "linear" and rule.target.startswith("blocks."):
            source, target = rule.source.removesuffix(".weight"), rule.target.removesuffix(".kernel")
            rules += [
                Rule(f"{source}.lora_{part.upper()}.weight", f"{target}.{NAME}.{part}", "linear")
                for part in "ab"
            ]
    return Table(rules, aliases=names_diffusers.aliases(names_diffusers.DIT), prefixes=PREFIXES)
