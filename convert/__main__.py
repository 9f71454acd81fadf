"""Weights of Wan and DiT-Mem in and out.

    python -m convert SOURCE DEST
    python -m convert --list SOURCE
    python -m convert --dry-run SOURCE DEST
    python -m convert --verify SOURCE DEST
    python -m convert --export original|diffusers CONVERTED DEST
    python -m convert --export dit-mem ENCODER OUT.safetensors

SOURCE is a folder of original files or of diffusers, or one file (.safetensors, .pth): the transformer, its VAE, its
text encoder, or a DiT-Mem memory encoder. Everything in it that is known is converted. DEST becomes a folder that
config.weights.path names; a memory encoder in it is DEST/encoder.safetensors, for --encoder.

A folder can be put together in several calls: a DEST of an earlier call gets what it lacks.

    python -m convert Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors weights/wan
    python -m convert Wan2.1-T2V-1.3B/Wan2.1_VAE.pth weights/wan

Sizes are read from shapes and from a config.json beside the files. What neither tells (heads of another width than
128, strides and pools of a memory encoder) can be written there: {"num_heads": 6, "memory": {"stages": ...}}.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ditmem_jax.config import flags as cli
from ditmem_jax.convert import export, folder
from ditmem_jax.convert.engine import differences, findings
from ditmem_jax.convert.kinds import KINDS
from ditmem_jax.convert.plan import FILES, Network, mapping, plan, skipped
from ditmem_jax.convert.sources import Source, open_source
from ditmem_jax.errors import UserError
from ditmem_jax.storage.weights import empty_index, read_index

KIND = flags.DEFINE_enum("kind", None, list(KINDS), "Convert this kind of network only.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the result; by default as stored.")
LIST = flags.DEFINE_bool("list", False, "Print which tensor goes where; read no values.")
DRY_RUN = flags.DEFINE_bool("dry-run", False, "Print what would be done.")
VERIFY = flags.DEFINE_bool(
    "verify", False, "Compare DEST with SOURCE, tensor by tensor, and with its checksums."
)
EXPORT = flags.DEFINE_enum("export", None, ["original", "diffusers", "dit-mem"], "Names to write.")
PREFIX = flags.DEFINE_string("prefix", "", "Stands before every name of an exported memory encoder.")

MODES = {  # what can be asked for, and the flags that each takes
    "a conversion": ("kind", "dtype"),
    "--list": ("kind",),
    "--dry-run": ("kind", "dtype"),
    "--verify": ("kind", "dtype"),
    "--export=original": (),
    "--export=diffusers": (),
    "--export=dit-mem": ("dtype", "prefix"),
}
RATE = 150e6  # bytes per second that two slow cores read, turn and write


def main(source: str, dest: str | None = None) -> None:
    _check_flags()
    if dest is None and not LIST.value:
        raise UserError("DEST is missing", expected="SOURCE DEST", fix="see --help")
    if EXPORT.value == "dit-mem":
        export.export_encoder(source, dest, prefix=PREFIX.value, dtype=DTYPE.value or "float32")
    elif EXPORT.value:
        size = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
        with _progress(size) as advance:
            left_out = export.export_folder(source, dest, EXPORT.value, advance)
        for network in left_out:
            print(f"left out: {network}: --export dit-mem writes it")
    else:
        _convert(source, dest)
        return
    print(f"{dest} is ready")


def _check_flags() -> None:
    """Raises a UserError for flags that mean nothing together."""
    asked = [f"--{flag.name}" for flag in (LIST, DRY_RUN, VERIFY) if flag.value]
    asked += [f"--export={EXPORT.value}"] if EXPORT.value else []
    mode, *others = asked or ["a conversion"]
    others += [
        f"--{flag.name}" for flag in (KIND, DTYPE, PREFIX) if flag.value and flag.name not in MODES[mode]
    ]
    if others:
        takes = ", ".join(f"--{name}" for name in MODES[mode]) or "no such flag"
        raise UserError(
            f"{mode} has no use for {', '.join(others)}", expected=takes, fix="leave out one or the other"
        )


def _convert(source: str, dest: str | None) -> None:
    opened = open_source(source)
    networks = plan(opened, kind=KIND.value, dtype=DTYPE.value)
    if LIST.value:
        for network in networks:
            print("\n".join(mapping(network)))
        return
    for network in networks:
        print(network)
    for part in skipped(opened, networks):
        print(f"skipped: {part}: no network that we know")
    if VERIFY.value:
        _verify(networks, dest)
    elif DRY_RUN.value:
        _dry_run(opened, networks, Path(dest))
    else:
        with _progress(folder.work(networks)) as advance:
            folder.write_folder(opened, networks, dest, advance)
        _print_ready(opened, networks, Path(dest))


def _dry_run(source: Source, networks: list[Network], dest: Path) -> None:
    index = read_index(dest) if dest.exists() else empty_index()
    folder.check_target(networks, dest, index)
    for network in networks:
        read = sum(path.stat().st_size for path in network.part.files)
        print(f"{read:,} bytes of {network.part} -> {network.size:,} bytes of {dest / FILES[network.role]}")
    if tokenizer := folder.tokenizer_for(source, networks, dest):
        print(f"{tokenizer} -> {dest / folder.TOKENIZER}")
    print(f"about {folder.work(networks) / RATE:.0f} seconds; nothing was written")


def _verify(networks: list[Network], dest: str) -> None:
    problems = folder.damage(dest)
    for network in networks:
        problems += differences(network.match.equal, network.part.tensors)
    compared = 0
    with _progress(sum(network.size for network in networks)) as advance:
        for name, size, problem in folder.deviations(networks, dest):
            advance(size)
            compared += 1
            if problem:
                problems.append(f"{name}: {problem}")
    if problems:
        raise findings(f"{dest} is not what its source gives", problems, fix="convert again")
    print(f"{compared} tensors agree, and so do the checksums of {dest}")


def _print_ready(source: Source, networks: list[Network], dest: Path) -> None:
    print(f"{dest} is ready")
    held = read_index(dest)["networks"]
    missing = [name for name in ("dit", "vae", "text") if name not in held]
    if missing and held.keys() & {"dit", "dit_high"}:
        print(f"to train and sample, add {' and '.join(missing)} by another call with the same DEST")
    if "text" in held and not (dest / folder.TOKENIZER).exists():
        print(f"the text encoder needs its tokenizer.json: copy it to {dest / folder.TOKENIZER}")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar over that many bytes; yields what to tell of those that are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("weights", total=total)
        yield lambda size: progress.advance(bar, size)


if __name__ == "__main__":
    cli.run(main, "SOURCE [DEST]")
