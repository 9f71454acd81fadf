"""Which expert of a mixture by noise level a transformer is: from names, from a pipeline's description, or as told.

Wan 2.2 A14B is two transformers of one shape. Nothing inside of a file tells them apart, and the transformer of Wan 2.1
14B has that shape as well, so that without evidence there is no answer but to ask.
"""

import re
from typing import TYPE_CHECKING, Literal

from ditmem_jax.config import DiTConfig
from ditmem_jax.config.presets import DIT_PRESETS
from ditmem_jax.errors import UserError

if TYPE_CHECKING:
    from .sources import Part

Expert = Literal["high", "low"]
Role = Literal["high", "low", "single"]
NAMES = {"high": "dit_high", "low": "dit", "single": "dit"}  # in a converted folder

# "high_noise", "HighNoise", or "HIGH" as a word that says nothing of something else, such as "high_res".
_NOISE = r"(high|low)[ _.-]?noise"
_WORD = r"(?<![a-z])(high|low)(?![a-z])(?![ _.-]?(?:res|quality|vram|ram|mem|rank|lr|motion|fps|q|cfg|steps?|light)\w*)"
_IN_FILES = re.compile(f"(?i){_NOISE}|{_WORD}")
_IN_FOLDERS = re.compile(rf"(?i){_NOISE}|\A(high|low)\Z")
_FIRST = re.compile(r"(?i)wan[ _.-]?2[ _.-]?1(?!\d)")  # has single transformers only
_SECOND = re.compile(r"(?i)wan[ _.-]?2[ _.-]?2(?!\d).*?(?<![0-9])a?14b")
_MODELS_OF_FIRST = (
    "Wan2.1_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
)  # beside its transformer, not above it


def by_name(name: str, pattern: re.Pattern = _IN_FILES) -> Expert | None:
    """The expert that a name tells; None if it tells none, or both."""
    found = {next(filter(None, groups)).lower() for groups in pattern.findall(name)}
    return found.pop() if len(found) == 1 else None


def evidence(part: "Part") -> tuple[Expert, str] | None:
    """The expert that a part is, and what tells: its prefix, its file, its pipeline, or a folder that it lies in."""
    folder = part.folder.absolute()
    if expert := by_name(part.prefix):
        return expert, part.prefix
    if expert := by_name(part.files[0].name):
        return expert, part.files[0].name
    if folder.name == "transformer_2":
        return "low", "transformer_2"
    if folder.name == "transformer" and (folder.with_name("transformer_2").is_dir() or _has_two(part)):
        return "high", "transformer beside a transformer_2"
    for above in (folder, folder.parent):
        if expert := by_name(above.name, _IN_FOLDERS):
            return expert, above.name
    return None


def network_name(part: "Part", config: DiTConfig, role: Role | None = None) -> str:
    """The name of a transformer in a converted folder: "dit_high", or "dit" for another or a single one.

    Args:
        role: as the user says, which wins over all evidence.
    Raises:
        UserError: for a transformer that may be one of two experts, if nothing tells which.
    """
    if role:
        return NAMES[role]
    if told := evidence(part):
        return NAMES[told[0]]
    if not _may_be_one_of_two(part, config):
        return NAMES["single"]
    source = part.files[0] if len(part.files) == 1 else part.folder
    raise UserError(
        f"{part} may be one of the two transformers of Wan 2.2 A14B, and nothing tells which",
        expected="high_noise or low_noise in the name of the file or its folder, or --role",
        fix=f"ditmem convert {source} DEST --role=high, or --role=low, or --role=single for Wan 2.1 14B",
    )


def _has_two(part: "Part") -> bool:
    """Return True if the pipeline's model_index.json names a second transformer."""
    second = part.pipeline.get("transformer_2")
    return part.pipeline.get("boundary_ratio") is not None or bool(second and second[0])


def _may_be_one_of_two(part: "Part", config: DiTConfig) -> bool:
    folder = part.folder.absolute()
    names = (part.files[0].name, folder.name, folder.parent.name)
    if _FIRST.search(part.files[0].name):
        return False
    if _SECOND.search(part.files[0].name):
        return True
    if part.pipeline and not _has_two(part):
        return False
    if config == DIT_PRESETS["wan2.2-i2v-a14b"]:  # no single transformer has its shape
        return True
    if any(_FIRST.search(name) for name in names) or any(
        (folder / name).exists() for name in _MODELS_OF_FIRST
    ):
        return False
    return config == DIT_PRESETS["wan2.2-t2v-a14b"] or any(_SECOND.search(name) for name in names)
