"""Wan2.1-T2V-1.3B with the released memory encoder and objective: 81 frames of 480 x 832 at 16 per second.

The weights come from `ditmem convert Wan2.1-T2V-1.3B weights/wan2.1-t2v-1.3b`.
"""

from ml_collections import ConfigDict

from ditmem_jax.config import to_dict
from ditmem_jax.config.presets import DIT_PRESETS, NEGATIVE_PROMPTS


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.dit = ConfigDict(to_dict(DIT_PRESETS["wan2.1-t2v-1.3b"]))
    config.video = ConfigDict(dict(frames=81, height=480, width=832, fps=16, trained=(81, 480, 832)))
    config.memory = ConfigDict(dict(dim=config.dit.dim))  # as released: 100 nominal tokens per band and video
    config.weights = ConfigDict(
        dict(path="weights/wan2.1-t2v-1.3b", hub="Wan-AI/Wan2.1-T2V-1.3B", dtype="bfloat16")
    )
    config.data = ConfigDict(dict(records="records", bank="bank", references=5, batch_size=1))
    config.objective = ConfigDict(dict(kind="released", density="shifted", shift=5.0, memory_dropout=0.0))
    config.optim = ConfigDict(dict(learning_rate=1e-5))
    config.sample = ConfigDict(
        dict(steps=40, shift=5.0, guidance=5.0, negative_prompt=NEGATIVE_PROMPTS["wan"])
    )
    config.run = ConfigDict(dict(out="runs/wan", steps=10_000, remat="blocks"))
    return config
