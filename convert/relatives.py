"""Published relatives of Wan whose transformers hold more than ours: told by their tensors, and named."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from ditmem_jax.config import DiTConfig


@dataclasses.dataclass(frozen=True)
class Relative:
    """A model that extends Wan.

    Args:
        name: with what it adds.
        sign: pattern of the names of what it adds, in original and diffusers spelling.
        types: what config.json calls it, as `model_type` or `_class_name`.
        base: the rest is a transformer of Wan that works by itself, since training left it as it was.
    """

    name: str
    sign: str
    types: tuple[str, ...] = ()
    base: bool = False


RELATIVES = (
    Relative(
        "VACE (control by a video and a mask)", r"\A(vace_blocks|vace_patch_embedding)\b", ("vace", "WanVACETransformer3DModel"),
        base=True,
    ),
    Relative(
        "Wan2.2-S2V (speech to video)", r"\A(casual_audio_encoder|audio_injector|cond_encoder|trainable_cond_mask|frame_packer)\b",
        ("s2v", "WanModel_S2V"),
    ),
    Relative(
        "Wan2.2-Animate (motion and face of a video)",
        r"\A(pose_patch_embedding|motion_encoder|face_adapter|face_encoder)\b", ("animate", "WanAnimateTransformer3DModel"),
    ),
    Relative("Fun-Control-Camera (control by a camera's path)", r"\Acontrol_adapter\b", ("fun_camera",)),
    Relative("Fun-Control with a reference image", r"\Aref_conv\b", ("fun_control_ref",)),
    Relative("MultiTalk or InfiniteTalk (control by speech)", r"\A(audio_proj\b|blocks\.\d+\.(audio_cross_attn|norm_x)\b)"),
    Relative("FantasyTalking (control by speech)", r"\A(proj_model|blocks\.\d+\.cross_attn\.(processor|k_proj|v_proj))\b"),
    Relative("SkyReels-V2 Diffusion Forcing", r"\A(fps_embedding|fps_projection)\b", ("SkyReelsV2Transformer3DModel",)),
    Relative("HuMo (control by people and sound)", r"\Ablocks\.\d+\.audio_cross_attn_wrapper\b"),
    Relative("ReCamMaster (control by a camera's path)", r"\Ablocks\.\d+\.(cam_encoder|projector)\b"),
)  # fmt: skip
# Whole networks beside a transformer that nothing here runs.
OTHERS = {
    r"(visual|textual)\.(transformer|patch_embedding|head)|vision_model\.|log_scale": "a CLIP image encoder, which nothing here reads",
    r"(encoder|decoder)\.\d+\.conv\.\d": "a tiny autoencoder (TAEHV), a preview of the VAE",
    r"double_blocks\.\d+|single_blocks\.\d+": "a transformer of another family (Flux, HunyuanVideo)",
    r"transformer_blocks\.\d+": "a transformer of another family (LTX, CogVideoX, SD3)",
    r"(input_blocks|output_blocks|down_blocks|up_blocks)\.\d+": "a U-Net, of another family (Stable Diffusion)",
    r"model\.layers\.\d+|layers\.\d+\.": "a language model",
}  # fmt: skip


def relative(names: Collection[str], config: Mapping[str, Any]) -> Relative | None:
    """The relative of Wan that a transformer is, by its tensors or else its config.json."""
    for candidate in RELATIVES:
        if any(re.search(candidate.sign, name) for name in names):
            return candidate
    told = (config.get("model_type"), config.get("_class_name"))
    return next((candidate for candidate in RELATIVES if set(candidate.types) & set(told)), None)


def converted(config: DiTConfig) -> str | None:
    """The name of a relative that converts in full, told by its sizes; None for a plain T2V, I2V or TI2V."""
    if config.image_positions is not None:
        return "FLF2V: image tokens of the first and the last frame, with positions"
    if config.condition_dim == 2 * config.out_dim:
        return "Fun-Control: the condition beside the latents is those of a control video, then those of a given frame"
    if config.condition_dim and config.image_dim and config.dim == 1536:
        return "Fun-InP: image to video with CLIP tokens, of the small size"
    return None


def other(names: Collection[str]) -> str:
    """A description of a file that holds no network of ours, by the names of its tensors."""
    for sign, what in OTHERS.items():
        if any(re.search(sign, name) for name in names):
            return what
    return "no network that we know"
