"""The published networks of Wan 2.1 and 2.2, by name."""

import dataclasses

from ditmem_jax.config import DiTConfig, VAEConfig

# Statistics of Wan 2.2's latents over its training videos, one pair per channel.
WAN22_LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
DIT_PRESETS = {
    "wan2.1-t2v-1.3b": DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan2.1-t2v-14b": _14B,
    "wan2.1-i2v-14b": dataclasses.replace(_14B, in_dim=36, image_dim=1280),
    "wan2.1-flf2v-14b": dataclasses.replace(_14B, in_dim=36, image_dim=1280, image_positions=514),
    "wan2.2-t2v-a14b": _14B,  # each of the two experts
    "wan2.2-i2v-a14b": dataclasses.replace(_14B, in_dim=36),  # each of the two experts
    "wan2.2-ti2v-5b": DiTConfig(
        dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48, clean_frames=True
    ),
}
VAE_PRESETS = {
    "wan2.1": VAEConfig(),
    "wan2.2": VAEConfig(
        dim=160,
        z_dim=48,
        mean=WAN22_LATENT_MEAN,
        std=WAN22_LATENT_STD,
        patch_size=2,
        decoder_dim=256,
        shortcuts=True,
    ),
}

_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPTS = {
    "wan": _NEGATIVE,
    "wan2.1-i2v": f"镜头晃动，{_NEGATIVE}",
    "wan2.1-flf2v": f"镜头切换，镜头晃动，{_NEGATIVE}",
}
"""Negative prompts of Wan's own programs: of Wan 2.1 that make clips of pictures, and of all others."""
