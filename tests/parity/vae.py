"""The causal video VAE against the released one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.config import VAEConfig
from ditmem_jax.convert.engine import load
from ditmem_jax.convert.vae import table
from ditmem_jax.models.wan.vae import VAE, decode, encode
from tests.parity.golden import Check, GoldenFile


def recognise(golden: GoldenFile) -> str | None:
    """Wan 2.1 convolves pixels, Wan 2.2 squares of 2 x 2 of them."""
    weight = golden.tensors.get("w/encoder.conv1.weight")
    return None if weight is None else {3: "vae_2_1", 12: "vae_2_2"}.get(weight.shape[1])


def build(golden: GoldenFile) -> VAE:
    """The VAE of a golden file, with its weights."""
    meta, tensors, is_2_2 = golden.meta, golden.tensors, recognise(golden) == "vae_2_2"
    config = VAEConfig(
        dim=meta["dim"],
        z_dim=meta["z_dim"],
        dim_mult=tuple(meta["dim_mult"]),
        num_res_blocks=meta["num_res_blocks"],
        temporal_downsample=tuple(meta["temporal_downsample"]),
        mean=tuple(tensors["mean"].tolist()),
        std=tuple(tensors["std"].tolist()),
        **(dict(patch_size=2, decoder_dim=meta["dec_dim"], shortcuts=True) if is_2_2 else {}),
    )
    vae = nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
    load(vae, table(config), golden.under("w/"))
    return vae


def check(golden: GoldenFile) -> list[Check]:
    """Latents of the golden video; pixels of the golden latents."""
    vae = build(golden)
    names = ("video", "latents", "decoded")
    video, latents, decoded = (np.moveaxis(golden.tensors[name], 1, -1) for name in names)
    with jax.default_matmul_precision("highest"):
        return [
            Check("latents", np.asarray(encode(vae, jnp.asarray(video))), latents),
            Check("decoded", np.asarray(decode(vae, jnp.asarray(latents))), decoded),
        ]


KINDS: dict[str, Callable[[GoldenFile], list[Check]]] = {"vae_2_1": check, "vae_2_2": check}
