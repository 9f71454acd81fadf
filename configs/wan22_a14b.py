"""Wan2.2-T2V-A14B with a memory encoder of the released kind that feeds both experts: 81 frames of 720 x 1280.

The weights come from `ditmem convert Wan2.2-T2V-A14B weights/wan2.2-t2v-a14b`. For an encoder
of each expert train with --config.experts.trains=high and =low, and sample with both files: --encoder=HIGH,LOW.
"""

from ml_collections import ConfigDict

from ditmem_jax.config import to_dict
from ditmem_jax.config.presets import DIT_PRESETS, NEGATIVE_PROMPTS


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.dit = ConfigDict(to_dict(DIT_PRESETS["wan2.2-t2v-a14b"]))
    config.experts = ConfigDict(dict(boundary=0.875, trains="both"))
    config.video = ConfigDict(dict(frames=81, height=720, width=1280, fps=16, trained=(81, 720, 1280)))
    config.memory = ConfigDict(dict(dim=config.dit.dim, latent_grid=(21, 90, 160)))
    config.weights = ConfigDict(
        dict(path="weights/wan2.2-t2v-a14b", hub="Wan-AI/Wan2.2-T2V-A14B", dtype="bfloat16")
    )
    config.data = ConfigDict(dict(records="records", bank="bank", references=5, batch_size=1))
    config.objective = ConfigDict(dict(kind="released", density="shifted", shift=12.0, memory_dropout=0.0))
    config.optim = ConfigDict(dict(learning_rate=1e-5))
    config.sample = ConfigDict(
        dict(
            solver="unipc",
            steps=40,
            shift=12.0,
            guidance=3.0,
            guidance_high=4.0,
            negative_prompt=NEGATIVE_PROMPTS["wan"],
        )
    )
    config.run = ConfigDict(dict(out="runs/wan22_a14b", steps=10_000, remat="blocks"))
    return config
