"""Bring weights in from original Wan names or those of diffusers, and out again.

    ditmem convert --list SOURCE
    ditmem convert --dry-run SOURCE DEST
    ditmem convert SOURCE DEST
    ditmem convert BASE DEST --lora FILE
    ditmem convert --verify SOURCE DEST
    ditmem convert --export original CONVERTED DEST
    ditmem convert --export diffusers CONVERTED DEST
    ditmem convert --export comfyui CONVERTED DEST
    ditmem convert --export dit-mem ENCODER OUT.safetensors

SOURCE is a folder of original files, of diffusers, of ComfyUI or of the hub's cache, or one file (.safetensors, .gguf,
.pth, .pt, .ckpt, .bin): the transformer, its VAE, its text encoder, CLIP's image encoder, or a DiT-Mem memory encoder.
Everything in it that is known is converted. DEST becomes a folder that config.weights.path names; a memory encoder in it
is DEST/encoder.safetensors, for --encoder.

A folder can be put together in several calls: a DEST of an earlier call gets what it lacks.

    ditmem convert Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors weights/wan
    ditmem convert Wan2.1-T2V-1.3B/Wan2.1_VAE.pth weights/wan

Sizes are read from shapes and from a config.json beside the files. What neither tells (heads of another width than
128, strides and pools of a memory encoder) can be written there: {"num_heads": 6, "memory": {"stages": ...}}.
"""

from absl import flags

from ditmem_jax.config import flags as cli
from ditmem_jax.errors import UserError

CHOICES = ("kind", "dtype", "role", "ema", "prefix", "lora", "base")
MODES = {  # what can be asked for, and the flags that each takes
    "a conversion": CHOICES,
    "--list": CHOICES,
    "--dry-run": CHOICES,
    "--verify": CHOICES,
    "--export=original": (),
    "--export=diffusers": (),
    "--export=comfyui": (),
    "--export=dit-mem": ("dtype", "prefix"),
}


def main(source: str, dest: str | None = None) -> None:
    from ditmem_jax.convert import commands

    _check_flags()
    options = dict(
        kind=KIND.value,
        dtype=DTYPE.value,
        role=ROLE.value,
        ema=EMA.value,
        prefix=PREFIX.value,
        loras=tuple(LORA.value),
        base=BASE.value,
    )
    if LIST.value:
        commands.list_tensors(source, **options)
        return
    if dest is None:
        raise UserError("DEST is missing", expected="SOURCE DEST", fix="see ditmem convert --help")
    if EXPORT.value == "dit-mem":
        commands.export_encoder(source, dest, prefix=PREFIX.value or "", dtype=DTYPE.value or "float32")
    elif EXPORT.value:
        commands.export_folder(source, dest, EXPORT.value)
    elif VERIFY.value:
        commands.verify(source, dest, **options)
    elif DRY_RUN.value:
        commands.dry_run(source, dest, **options)
    else:
        commands.convert(source, dest, **options)


def _check_flags() -> None:
    """Raise a UserError for flags that mean nothing together."""
    asked = [f"--{flag.name}" for flag in (LIST, DRY_RUN, VERIFY) if flag.value]
    asked += [f"--export={EXPORT.value}"] if EXPORT.value else []
    mode, *others = asked or ["a conversion"]
    others += [
        f"--{flag.name}"
        for flag in (KIND, DTYPE, ROLE, EMA, PREFIX, LORA, BASE)
        if flag.value not in (None, False, []) and flag.name not in MODES[mode]
    ]
    if others:
        takes = ", ".join(f"--{name}" for name in MODES[mode]) or "no such flag"
        raise UserError(
            f"{mode} has no use for {', '.join(others)}", expected=takes, fix="leave out one or the other"
        )


if __name__ == "__main__":
    KIND = flags.DEFINE_enum(
        "kind", None, ["dit", "vae", "text", "clip", "memory"], "Convert this kind of network only."
    )
    DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the result; by default as stored.")
    ROLE = flags.DEFINE_enum(
        "role",
        None,
        ["high", "low", "single"],
        "Which expert of Wan 2.2 the transformer is; by default as names tell.",
    )
    LORA = flags.DEFINE_multi_string(
        "lora",
        [],
        "FILE[:strength[:role]]: an adapter to merge into the transformer; may be given several times.",
    )
    BASE = flags.DEFINE_bool(
        "base", False, "Of a relative such as VACE, the Wan transformer that it extends."
    )
    EMA = flags.DEFINE_bool("ema", None, "Averaged weights, where a file has both; by default yes.")
    LIST = flags.DEFINE_bool("list", False, "Print which tensor goes where; read no values.")
    DRY_RUN = flags.DEFINE_bool("dry-run", False, "Print what would be done.")
    VERIFY = flags.DEFINE_bool(
        "verify", False, "Compare DEST with SOURCE, tensor by tensor, and with its checksums."
    )
    EXPORT = flags.DEFINE_enum(
        "export", None, ["original", "diffusers", "comfyui", "dit-mem"], "Names to write."
    )
    PREFIX = flags.DEFINE_string(
        "prefix", None, "Stands before the names to take, or before every name of an exported memory encoder."
    )
    cli.run(main, "SOURCE [DEST]")
