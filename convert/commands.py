"""The work of `ditmem convert`: list, convert, verify and export, with progress and what is left to do on the terminal."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

from ditmem_jax.progress import make_progress
from ditmem_jax.storage.weights import empty_index, read_index

from . import export, folder
from .engine import differences, findings
from .plan import FILES, Network, Options, left_out, mapping, plan
from .sources import Source, open_source

RATE = 150e6  # bytes per second that two slow cores read, turn and write


def list_tensors(source: str, **options: Any) -> None:
    """Print which tensor goes where; read no values. `options` are those of `plan.Options`, here and below."""
    for network in plan(open_source(source), Options(**options)):
        print("\n".join(mapping(network)))


def convert(source: str, dest: str, **options: Any) -> None:
    """Convert the networks of `source` into the folder `dest`; print what it still lacks."""
    opened, networks = _planned(source, options)
    with _progress(folder.work(networks)) as advance:
        folder.write_folder(opened, networks, dest, advance)
    _print_ready(Path(dest), networks)


def dry_run(source: str, dest: str, **options: Any) -> None:
    """Print what `convert` would read and write; raise what it would raise."""
    opened, networks = _planned(source, options)
    target = Path(dest)
    index = read_index(target) if target.exists() else empty_index()
    folder.check_target(networks, target, index)
    for network in networks:
        read = sum(path.stat().st_size for path in network.part.files)
        print(f"{read:,} bytes of {network.part} -> {network.size:,} bytes of {target / FILES[network.role]}")
    if tokenizer := folder.tokenizer_for(opened, networks, target):
        print(f"{tokenizer} -> {target / folder.TOKENIZER}")
    print(f"about {folder.work(networks) / RATE:.0f} seconds; nothing was written")


def verify(source: str, dest: str, **options: Any) -> None:
    """Compare `dest` with `source` tensor by tensor, and with its checksums.

    Raises:
        UserError: with a list of all that differs.
    """
    _, networks = _planned(source, options)
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
        raise findings(
            f"{dest} is not what its source gives", problems, fix=f"ditmem convert {source} ANOTHER_DEST"
        )
    print(f"{compared} tensors agree, and so do the checksums of {dest}")


def export_encoder(encoder: str, dest: str, *, prefix: str, dtype: str) -> None:
    """Write a trained memory encoder under the names of the released program."""
    export.export_encoder(encoder, dest, prefix=prefix, dtype=dtype)
    print(f"{dest} is ready")


def export_folder(converted: str, dest: str, names: str) -> None:
    """Write the networks of a converted folder under the names "original", "diffusers" or "comfyui"."""
    size = sum(path.stat().st_size for path in Path(converted).glob("*.safetensors"))
    with _progress(size) as advance:
        if names == "comfyui" and dest.endswith(".safetensors"):
            unwritten = export.export_file(converted, dest, advance)
        else:
            unwritten = export.export_folder(converted, dest, names, advance)
    for network, reason in unwritten.items():
        print(f"left out: {network}: {reason}")
    print(f"{dest} is ready")


def _planned(source: str, options: dict[str, Any]) -> tuple[Source, list[Network]]:
    """Open a source, and print what of it is converted, what is worth knowing of that, and what is left out."""
    opened = open_source(source)
    networks = plan(opened, Options(**options))
    for network in networks:
        print(network)
        for note in network.notes:
            print(f"  {note}")
    for line in left_out(opened, networks):
        print(f"left out: {line}")
    return opened, networks


def _print_ready(dest: Path, networks: list[Network]) -> None:
    print(f"{dest} is ready")
    index = read_index(dest)
    for network in networks:
        if rounding := index["provenance"][network.role].get("rounding"):
            print(f"{network.role}: rounding changed its weights by {100 * rounding:.2g} % of their norm")
    held = index["networks"]
    missing = [name for name in ("dit", "vae", "text") if name not in held]
    if missing and held.keys() & {"dit", "dit_high"}:
        print(f"to train and sample, add {' and '.join(missing)} by another call with the same DEST")
    if "text" in held and not (dest / folder.TOKENIZER).exists():
        print(f"the text encoder needs its tokenizer.json: copy it to {dest / folder.TOKENIZER}")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar over that many bytes; yield what to tell of those that are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with make_progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("weights", total=total)
        yield lambda size: progress.advance(bar, size)
