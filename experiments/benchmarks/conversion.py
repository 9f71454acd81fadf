"""Seconds and memory of `ditmem convert` for a transformer of full size in every container and quantisation.

    python -m experiments.benchmarks.conversion
    python -m experiments.benchmarks.conversion --only='.pth,GGUF Q8_0' --small --out=small.json

The weights are random. One source at a time is written to `--work`, converted in a process of its own, `--rounds` times,
and deleted. Memory is the most that was anonymous at once: pages of a mapped file, which the system may drop, do not
count. Needs the extra `convert` (torch, gguf), Linux, and disk for one source and its conversion. Results go to
`conversion.json` beside this file and to the table in the README.
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import flags
from flax import nnx
from rich.console import Console

from ditmem_jax.config import DiTConfig
from ditmem_jax.config import flags as cli
from ditmem_jax.config.presets import DIT_PRESETS
from ditmem_jax.convert import dit
from ditmem_jax.convert.original import original
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.progress import track
from ditmem_jax.storage.files import write_text
from experiments import provenance

RESULTS = Path(__file__).with_name("conversion.json")
README = Path(__file__).with_name("README.md")
Tensors = dict[str, np.ndarray]


def random(config: DiTConfig) -> Tensors:
    """Random float32 weights under their original names."""
    rng = np.random.default_rng(0)
    shapes = abstract(lambda: DiT(config, rngs=nnx.Rngs(0)))[1]
    return original(
        dit.table(config), {n: rng.standard_normal(x.shape, np.float32) for n, x in shapes.items()}
    )


def _matrices(tensors: Tensors) -> Tensors:
    return {name: x for name, x in tensors.items() if name.startswith("blocks.") and x.ndim == 2}


def _safetensors(folder: Path, tensors: Tensors, dtype: Any = np.float32, prefix: str = "") -> None:
    from safetensors.numpy import save_file

    save_file({prefix + name: x.astype(dtype) for name, x in tensors.items()}, folder / "wan.safetensors")


def _float8(folder: Path, tensors: Tensors, scaled: bool) -> None:
    from safetensors.numpy import save_file

    found = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    found |= {name: x.astype(ml_dtypes.float8_e4m3fn) for name, x in _matrices(tensors).items()}
    if scaled:
        names = [name.removesuffix("weight") + "scale_weight" for name in _matrices(tensors)]
        found |= {"scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)} | {n: np.float32([1.5]) for n in names}
    save_file(found, folder / "wan.safetensors")


def _gguf(folder: Path, tensors: Tensors, kind: str) -> None:
    """K-quants, which the library only reads, are random bits with small factors."""
    import gguf

    type = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type]
    writer, rng = gguf.GGUFWriter(folder / "wan.gguf", "wan"), np.random.default_rng(0)
    for name, x in tensors.items():
        if x.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", x.shape)
            writer.add_tensor(name, x.reshape(len(x), -1))
        elif name not in _matrices(tensors):
            writer.add_tensor(name, x)
        elif kind in ("Q4_K", "Q6_K"):
            rows = rng.integers(256, size=(len(x), x.shape[1] // block * size), dtype=np.uint8)
            factors = slice(0, 4) if kind == "Q4_K" else slice(208, 210)
            small = np.tile(np.float16([0.01]).view(np.uint8), 2)
            rows.reshape(-1, size)[:, factors] = small[: factors.stop - factors.start]
            writer.add_tensor(name, rows, raw_dtype=type)
        else:
            writer.add_tensor(name, gguf.quants.quantize(x, type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _torch(folder: Path, tensors: Tensors, nest: Callable[[dict], Any], name: str, **options: Any) -> None:
    import torch

    torch.save(nest({n: torch.from_numpy(x) for n, x in tensors.items()}), folder / name, **options)


def _shards(folder: Path, tensors: Tensors, count: int = 5) -> None:
    names, index = list(tensors), {}
    for number in range(count):
        file = f"pytorch_model-{number + 1:05}-of-{count:05}.bin"
        part = {name: tensors[name] for name in names[number::count]}
        _torch(folder, part, lambda x: x, file)
        index |= dict.fromkeys(part, file)
    write_text(folder / "pytorch_model.bin.index.json", json.dumps({"metadata": {}, "weight_map": index}))


SOURCES: dict[str, Callable[[Path, Tensors], None]] = {
    "float32": _safetensors,  # the plain file, that others are compared with
    "bfloat16": lambda f, x: _safetensors(f, x, ml_dtypes.bfloat16),
    "float16 of ComfyUI": lambda f, x: _safetensors(f, x, np.float16, "model.diffusion_model."),
    "float8, plain": lambda f, x: _float8(f, x, False),
    "float8, scaled": lambda f, x: _float8(f, x, True),
    **{f"GGUF {k}": lambda f, x, k=k: _gguf(f, x, k) for k in ("F16", "BF16", "Q8_0", "Q4_K", "Q6_K")},
    ".pth": lambda f, x: _torch(f, x, lambda x: x, "wan.pth"),
    ".pt of a training with EMA": lambda f, x: _torch(
        f, x, lambda x: {"generator_ema": x, "step": 7}, "w.pt"
    ),
    ".pt of torch before 1.6": lambda f, x: _torch(
        f, x, lambda x: x, "wan.pt", _use_new_zipfile_serialization=False
    ),
    ".bin in five shards": _shards,
}


def measure(source: Path, target: Path) -> dict[str, float]:
    """Seconds, those of the processor, and the most anonymous memory, in GB, of one conversion.

    Raises:
        UserError: if it fails.
    """
    shutil.rmtree(target, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "convert", str(source), str(target)]
    with tempfile.TemporaryFile("w+") as told:
        begun, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max(peak, *found, 0)
            time.sleep(0.02)
        seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        told.seek(0)
        if process.returncode:
            raise UserError(f"{source} was not converted", found=told.read()[-2000:])
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "processor": busy, "gb": peak * 1024 / 1e9}


def write_table(results: dict) -> None:
    """Puts the results into the README of this folder."""
    rows = results["rows"]
    plain = rows["float32"]
    lines = [
        "| source | GB | s | of the plain file's | of the processor | of the plain file's | anonymous memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        times = (f"{row[key]:.1f} | {row[key] / plain[key]:.2f}" for key in ("seconds", "processor"))
        lines.append(f"| {name} | {row['size']:.2f} | {' | '.join(times)} | {row['gb']:.2f} |")
    before, rest = README.read_text().split("<!-- conversion -->\n", 1)
    after = rest.split("<!-- end of conversion -->", 1)[1]
    text = "\n".join(lines)
    write_text(README, f"{before}<!-- conversion -->\n{text}\n<!-- end of conversion -->{after}")


def main() -> None:
    wanted = ONLY.value or list(SOURCES)
    if unknown := [name for name in wanted if name not in SOURCES]:
        raise UserError(f"unknown source {unknown[0]!r}", expected=f"some of: {', '.join(SOURCES)}")
    small = DiTConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2)
    tensors = random(small if SMALL.value else DIT_PRESETS["wan2.1-t2v-1.3b"])
    results = {
        "commit": provenance.commit(),
        "digests": provenance.folder_digests("convert", "ditmem_jax/storage"),
        "device": provenance.processor(),
        "rows": {},
    }
    for name in track(wanted, "converting", console=Console(stderr=True)):
        with tempfile.TemporaryDirectory(dir=WORK.value) as work:
            source, target = Path(work, "source"), Path(work, "target")
            source.mkdir()
            SOURCES[name](source, tensors)
            size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
            found = [measure(source, target) for _ in range(ROUNDS.value)]
            row = {"size": size} | {key: statistics.median(x[key] for x in found) for key in found[0]}
            results["rows"][name] = {key: round(value, 3) for key, value in row.items()}
            write_text(Path(OUT.value), json.dumps(results, indent=1) + "\n")
    if Path(OUT.value) == RESULTS:
        write_table(results)
    print(Path(OUT.value).read_text())


if __name__ == "__main__":
    ONLY = flags.DEFINE_list("only", [], "Sources to convert; all of them without this flag.")
    SMALL = flags.DEFINE_bool("small", False, "A tiny transformer, for a test.")
    ROUNDS = flags.DEFINE_integer("rounds", 2, "How often each is converted.", lower_bound=1)
    WORK = flags.DEFINE_string("work", None, "Folder with room for a source and its conversion.")
    OUT = flags.DEFINE_string("out", str(RESULTS), "File for the results, instead of those that are kept.")
    cli.run(main)
