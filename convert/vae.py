"""Tensor names of `Wan2.1_VAE.pth` and `Wan2.2_VAE.pth`."""

from collections.abc import Iterator, Sequence

from flax import nnx

from ditmem_jax.config import VAEConfig
from ditmem_jax.models.wan import vae

from .engine import Rule, Table

# Parts of each layer: original name, our name, kind of tensor.
PARTS = {
    vae.CausalConv: [("", "", "conv3d")],
    vae.Residual: [
        ("residual.0", "norm1", "norm"),
        ("residual.2", "conv1", "conv3d"),
        ("residual.3", "norm2", "norm"),
        ("residual.6", "conv2", "conv3d"),
        ("shortcut", "shortcut", "conv3d"),
    ],
    vae.FrameAttention: [("norm", "norm", "norm"), ("to_qkv", "qkv", "conv2d"), ("proj", "out", "conv2d")],
    vae.Downsample: [("resample.1", "conv", "conv2d"), ("time_conv", "time_conv", "conv3d")],
    vae.Upsample: [("resample.1", "conv", "conv2d"), ("time_conv", "time_conv", "conv3d")],
    vae.Head: [("0", "norm", "norm"), ("2", "conv", "conv3d")],
}


def table(config: VAEConfig) -> Table:
    """The rules for a VAE of this configuration."""
    model = nnx.eval_shape(lambda: vae.VAE(config, rngs=nnx.Rngs(0)))
    rules = [*_rules("conv1", "quant", "conv3d"), *_rules("conv2", "post_quant", "conv3d")]
    for chain, names in (("encoder", _encoder_names(model)), ("decoder", _decoder_names(model))):
        for layer, source, target in _layers(getattr(model, chain), names, f"{chain}.layers"):
            for part, ours, kind in PARTS[type(layer)]:
                if ours == "" or getattr(layer, ours) is not None:
                    rules += _rules(_join(chain, source, part), _join(target, ours), kind)
    return Table(rules)


def _layers(chain: vae.Chain, names: Sequence[str], target: str) -> Iterator[tuple[nnx.Module, str, str]]:
    """Each layer with its original name and its path, those inside of a level too."""
    for number, (layer, name) in enumerate(zip(chain.layers, names, strict=True)):
        if isinstance(layer, vae.Level):  # "downsamples.2" holds "downsamples.2.downsamples.0" and so on
            inner = [f"{name}.{name.split('.')[0]}.{i}" for i in range(len(layer.layers))]
            yield from _layers(layer, inner, f"{target}.{number}.layers")
        else:
            yield layer, name, f"{target}.{number}"


def _encoder_names(model: vae.VAE) -> list[str]:
    downsamples = (f"downsamples.{i}" for i in range(len(model.encoder.layers) - 5))
    return ["conv1", *downsamples, "middle.0", "middle.1", "middle.2", "head"]


def _decoder_names(model: vae.VAE) -> list[str]:
    upsamples = (f"upsamples.{i}" for i in range(len(model.decoder.layers) - 5))
    return ["conv1", "middle.0", "middle.1", "middle.2", *upsamples, "head"]


def _rules(source: str, target: str, kind: str) -> Iterator[Rule]:
    if kind == "norm":
        yield Rule(f"{source}.gamma", f"{target}.scale", "flatten")
    else:
        yield Rule(f"{source}.weight", f"{target}.kernel", kind)
        yield Rule(f"{source}.bias", f"{target}.bias")


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
