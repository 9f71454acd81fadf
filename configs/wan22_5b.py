"""Wan2.2-TI2V-5B from text or a first frame, with a released kind of memory: 121 frames of 704 x 1280 at 24 per second.

The weights come from `ditmem convert Wan2.2-TI2V-5B weights/wan2.2-ti2v-5b`.
"""

from ml_collections import ConfigDict

from ditmem_jax.config import to_dict
from ditmem_jax.config.presets import DIT_PRESETS, NEGATIVE_PROMPTS, VAE_PRESETS


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.dit = ConfigDict(to_dict(DIT_PRESETS["wan2.2-ti2v-5b"]))
    config.vae = ConfigDict(to_dict(VAE_PRESETS["wan2.2"]))
    config.video = ConfigDict(dict(frames=121, height=704, width=1280, fps=24, trained=(121, 704, 1280)))
    config.memory = ConfigDict(dict(dim=config.dit.dim, in_dim=config.vae.z_dim, latent_grid=(31, 44, 80)))
    config.weights = ConfigDict(
        dict(path="weights/wan2.2-ti2v-5b", hub="Wan-AI/Wan2.2-TI2V-5B", dtype="bfloat16")
    )
    config.data = ConfigDict(dict(records="records", bank="bank", references=5, batch_size=1))
    config.objective = ConfigDict(dict(kind="released", density="shifted", shift=5.0, memory_dropout=0.0))
    config.optim = ConfigDict(dict(learning_rate=1e-5))
    config.sample = ConfigDict(
        dict(solver="unipc", steps=50, shift=5.0, guidance=5.0, negative_prompt=NEGATIVE_PROMPTS["wan"])
    )
    config.run = ConfigDict(dict(out="runs/wan22_5b", steps=10_000, remat="blocks"))
    return config
