"""Compiles the real step of training or sampling for TPUs that are not there, and tells whether it fits and
how fast it can be: `python -m ditmem_jax.aot --config configs/wan_14b.py --topology v5p:2x2x1 --mesh fsdp=4`.

The TPU compiler (extra `tpu`) runs on any x86-64 Linux. Nothing is loaded: shapes, dtypes and shardings stand for all
arrays. Memory is the compiler's own statement about one chip; operations, bytes and collectives are read from the
compiled program (see `roof`).
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ditmem_jax import cli, roof
from ditmem_jax.checkpoint import new_dit
from ditmem_jax.config import Config, MeshConfig
from ditmem_jax.errors import UserError, nearest
from ditmem_jax.models.ditmem import Networks, attention_backend
from ditmem_jax.models.memory import row_counts
from ditmem_jax.models.state import Arrays, abstract
from ditmem_jax.models.vae import VAE
from ditmem_jax.sampler import make_step, schedule
from ditmem_jax.sharding import (
    AXES,
    batch_parts,
    batch_sharding,
    check_mesh,
    laid_out,
    make_mesh,
    replicated,
    tree_shardings,
)
from ditmem_jax.train import batch_layout, jit_train_step, make_encoder, make_optimizer, state_layout

# libtpu looks for the machine that it is on, complains where that is none of its own, and lets one process at a time
# have its chips, of which none is wanted here.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
Program = Literal["train", "sample"]
Kinds = dict[str, Any]
"""What lies in memory by kind, each a pytree of shapes with shardings."""


@dataclasses.dataclass(frozen=True)
class Report:
    """One program on one mesh; sizes in bytes and counts are those of one chip, and of one step."""

    program: str
    topology: str
    mesh: dict[str, int]
    batch: int
    tokens: int
    remat: str | None
    weights: str
    hbm: int
    memory: dict[str, int]
    beside: dict[str, int]  # what stays in memory and is no argument of the program
    fits: bool = True
    statement: str = ""  # of the compiler, where it does not fit
    host: int = 0
    operations: float = 0.0
    kernels: float = 0.0
    hbm_bytes: float = 0.0
    collective_bytes: float = 0.0
    collectives: tuple[tuple[str, str, float], ...] = ()
    roofs: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds
    uncounted: dict[str, int] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.memory.values()) + sum(self.beside.values())

    @property
    def roof(self) -> tuple[str, float]:
        """The slowest of compute, HBM and interconnect, and its seconds."""
        return max(self.roofs.items(), key=lambda item: item[1], default=("", math.inf))


# --- programs from shapes ---------------------------------------------------------------------------------------


def training(config: Config, mesh: Mesh) -> tuple[Callable, tuple, Kinds, Kinds]:
    """The jitted step, its arguments, these by kind, and what stays in memory beside them."""
    optimizer = make_optimizer(config.optim, config.run.steps)
    dit, backbone = _network(lambda: new_dit(config, config.experts.trains), "dit", mesh)
    encoder, _ = abstract(lambda: make_encoder(config))
    state = state_layout(config, optimizer, mesh)
    batch = batch_layout(config, mesh, jnp.dtype(config.weights.computed_in))
    step = jit_train_step(config, Networks(dit, encoder), optimizer, mesh)
    kinds = {
        "transformer": backbone,
        "encoder": (state.params, state.rest),
        "optimiser": state.optimizer,
        "batch": (batch, state.step, state.baseline),
    }
    return step, (state, backbone, batch), kinds, {}


def sampling(config: Config, mesh: Mesh) -> tuple[Callable, tuple, Kinds, Kinds]:
    """As `training`, for a step of denoising with guidance and memory.

    Of two experts it is that of the first step, with one encoder for both. Decoding, which follows, is not part of it.
    """
    structure, arrays = _network(lambda: new_dit(config, "high"), "dit", mesh)
    encoder, encoder_arrays = _network(lambda: make_encoder(config), "encoder", mesh)
    _, vae = _network(lambda: VAE(config.vae, rngs=nnx.Rngs(0)), "vae", mesh)

    video, size = config.video, config.data.batch_size
    grid = (*config.vae.latent_grid(video.frames, video.height, video.width), config.vae.z_dim)
    rows = (size, config.data.references, 2, len(row_counts(config.memory)), config.memory.dim)
    memory = jax.eval_shape(
        lambda arrays, rows: encoder.merge(arrays).mix(rows, jnp.ones(rows.shape[:2], bool)),
        encoder_arrays,
        jax.ShapeDtypeStruct(rows, jnp.float32),
    )
    each, every = batch_sharding(mesh), replicated(mesh)
    noise = jax.ShapeDtypeStruct((size, *grid), jnp.float32, sharding=each)
    text = jax.ShapeDtypeStruct((size, config.dit.text_len, config.dit.text_dim), jnp.float32, sharding=every)
    level = jax.ShapeDtypeStruct((), jnp.float32, sharding=every)
    memory = laid_out(memory, jax.tree.map(lambda _: each, memory))
    inputs = noise, level, level, text, text, memory

    graph, weights = nnx.split(structure.merge(arrays))
    _, _, scale = schedule(config)[0]
    step = make_step(config, graph, attention_backend(config, mesh), scale)
    program = jax.jit(step, out_shardings=each)
    beside = {"memory encoder": encoder_arrays, "VAE": vae}
    if config.experts.boundary is not None:
        beside["other expert"] = weights
    return program, (weights, *inputs), {"transformer": weights, "batch": inputs}, beside


PROGRAMS: dict[Program, Callable] = {"train": training, "sample": sampling}


def _network(create: Callable[[], nnx.Module], prefix: str, mesh: Mesh) -> tuple[Any, Arrays]:
    structure, shapes = abstract(create)
    named = {f"{prefix}.{path}": x for path, x in shapes.items()}
    placed = laid_out(named, tree_shardings(named, mesh))
    return structure, {path: placed[f"{prefix}.{path}"] for path in shapes}


# --- one report -------------------------------------------------------------------------------------------------


def examine(program: Program, config: Config, topology: str) -> Report:
    """Compiles `program` of `config`, mesh and batch included, for the chips of `topology`.

    Raises:
        UserError: if libtpu is missing, there is no such topology, or the config does not fit the mesh.
    """
    devices = topology_devices(topology)
    chip = roof.CHIPS[devices[0].device_kind]
    mesh = make_mesh(config.mesh, devices)
    check_mesh(config, mesh, config.data.batch_size)
    jitted, arguments, kinds, beside = PROGRAMS[program](config, mesh)
    tokens = math.prod(
        size // patch
        for size, patch in zip(
            config.vae.latent_grid(config.video.frames, config.video.height, config.video.width),
            config.dit.patch_size,
            strict=True,
        )
    )
    report = Report(
        program=program,
        topology=topology,
        mesh={axis: mesh.shape[axis] for axis in AXES},
        batch=config.data.batch_size,
        tokens=tokens,
        remat=config.run.remat if program == "train" else None,
        weights=config.weights.dtype,
        hbm=chip.hbm,
        memory={kind: _bytes(tree) for kind, tree in kinds.items()},
        beside={kind: _bytes(tree) for kind, tree in beside.items()},
    )
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = jitted.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - start
        return dataclasses.replace(
            report, fits=False, statement=_statement(str(error)), compile_seconds=seconds
        )
    seconds = time.perf_counter() - start
    return _measured(dataclasses.replace(report, compile_seconds=seconds), compiled, kinds, config, chip)


def _measured(
    report: Report, compiled: jax.stages.Compiled, kinds: Kinds, config: Config, chip: roof.Chip
) -> Report:
    """The report with what the compiler and its program tell."""
    stated, program = compiled.memory_analysis(), roof.Program(compiled.as_text())
    arguments = sum(report.memory.values())
    weights = {_signature(x) for x in jax.tree.leaves(kinds["transformer"])}
    kept = min(program.kept(config.dit.num_layers, weights), stated.temp_size_in_bytes)
    kept = kept if report.program == "train" else 0
    memory = report.memory | {
        "padding of these": stated.argument_size_in_bytes - arguments,
        "activations kept": kept,
        "temporaries": stated.temp_size_in_bytes - kept,
        "outputs": stated.output_size_in_bytes - stated.alias_size_in_bytes,
        "program": stated.generated_code_size_in_bytes,
    }
    cost = program.cost()
    sent = sum(cost.collectives.values())
    roofs = {
        "compute": (cost.operations + cost.kernels) / chip.operations,
        "HBM": cost.hbm_bytes / chip.hbm_bytes,
        "interconnect": sent / chip.link_bytes,
    }
    report = dataclasses.replace(report, memory=memory)
    fits = report.total <= report.hbm
    return dataclasses.replace(
        report,
        fits=fits,
        statement="" if fits else _excess(report),
        host=stated.host_temp_size_in_bytes + stated.host_argument_size_in_bytes,
        operations=cost.operations,
        kernels=cost.kernels,
        hbm_bytes=cost.hbm_bytes,
        collective_bytes=sent,
        collectives=tuple((*what, size) for what, size in cost.collectives.most_common(5)),
        roofs=roofs,
        uncounted=dict(program.uncounted),
    )


def topology_devices(topology: str) -> list[jax.Device]:
    """The chips of a topology such as v5e:2x4, on a machine that has none of them."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing", fix="pip install 'ditmem_jax[tpu]', on Linux")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(
            f"no TPU topology {topology!r}",
            expected="generation and shape, such as v5e:2x4, v5p:2x2x1 or v6e:4x4; hosts have 4 chips",
            found=str(error).splitlines()[0],
        ) from error
    if devices[0].device_kind not in roof.CHIPS:
        raise UserError(f"unknown chip {devices[0].device_kind}", expected=nearest(topology, roof.CHIPS))
    return devices


def _bytes(tree: Any) -> int:
    """On one chip, without the compiler's padding."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _signature(x: jax.ShapeDtypeStruct) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape on one chip as compiled programs write them."""
    short = {"bfloat16": "bf16", "float32": "f32", "int8": "s8"}
    return short.get(x.dtype.name, x.dtype.name), x.sharding.shard_shape(x.shape)


def _excess(report: Report) -> str:
    """What a program that fits by itself does not fit beside."""
    used = f"{report.total / roof.GIB:.2f} of {report.hbm / roof.GIB:.2f} GiB with the program"
    return " and ".join([used, *report.beside])


def _statement(error: str) -> str:
    """What the compiler says of memory that is not there, in one line."""
    return error.splitlines()[0].partition(": ")[2]


# --- meshes to choose from --------------------------------------------------------------------------------------


def candidates(program: Program, config: Config, chips: int) -> Iterator[Config]:
    """The config on meshes of `fsdp` and `context`, each with remat policies from quick to small.

    `context` is every power of two that divides `chips`.
    """
    remats = ("attention", "blocks", "offload") if program == "train" else (config.run.remat,)
    for parts in (2**n for n in range(chips.bit_length())):
        if chips % parts == 0:
            mesh = MeshConfig(data=1, fsdp=chips // parts, context=parts)
            for remat in remats:
                run = dataclasses.replace(config.run, remat=remat)
                yield dataclasses.replace(config, mesh=mesh, run=run)


def sweep(program: Program, config: Config, topology: str, batch: int | None) -> list[Report]:
    """A report for each mesh, with the first of the remat policies that fits; best first.

    The best fits, and takes the least time for a sample at the roof. A mesh that cannot be is left out.
    """
    reports: dict[MeshConfig, Report] = {}
    chips = len(topology_devices(topology))
    tried = list(candidates(program, config, chips))
    console = Console(stderr=True)
    for candidate in track(tried, f"{program} on {topology}", console=console):
        if (known := reports.get(candidate.mesh)) and known.fits:
            continue
        try:
            candidate = with_batch(candidate, topology, batch)
            reports[candidate.mesh] = examine(program, candidate, topology)
        except UserError as error:
            console.print(f"left out: {error}")
    return sorted(reports.values(), key=lambda report: (not report.fits, report.roof[1] / report.batch))


def with_batch(config: Config, topology: str, batch: int | None) -> Config:
    """The config with a batch that divides over its mesh: `batch`, or the least of at least `data.batch_size`."""
    parts = batch_parts(make_mesh(config.mesh, topology_devices(topology)))
    size = math.ceil(config.data.batch_size / parts) * parts if batch is None else batch
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))


def parse_mesh(text: str, config: Config) -> Config:
    """The config with a mesh such as "fsdp=4,context=2"; axes that are not named are 1."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not re.fullmatch(r"-?\d+", size):
            raise UserError(
                f"--mesh cannot be {text!r}", expected=f"axes of {', '.join(AXES)}: fsdp=4,context=2"
            )
        sizes[axis] = int(size)
    return dataclasses.replace(config, mesh=MeshConfig(**sizes))


# --- as text ----------------------------------------------------------------------------------------------------


def as_table(report: Report) -> Table:
    """All of a report, in the width of a terminal."""
    name, seconds = report.roof
    table = Table(title=_title(report), title_justify="left", show_header=False, min_width=70)
    if not report.fits:
        table.add_row("does not fit", report.statement or f"{report.hbm / roof.GIB:.2f} GiB of HBM")
        table.add_row("compile time", f"{report.compile_seconds:.0f} s")
        return table
    table.add_row(
        "fits", f"{report.total / roof.GIB:.2f} of {report.hbm / roof.GIB:.2f} GiB of each chip's HBM"
    )
    for kind, size in report.memory.items():
        table.add_row(f"  {kind}", f"{size / roof.GIB:.2f} GiB")
    for kind, size in report.beside.items():
        table.add_row(f"  {kind}, beside", f"{size / roof.GIB:.2f} GiB")
    if report.host:
        table.add_row("  on the host, per chip", f"{report.host / roof.GIB:.2f} GiB")
    table.add_section()
    table.add_row("a step of each chip", f"{(report.operations + report.kernels) / 1e12:.1f} T operations")
    table.add_row(
        "  in Pallas kernels", f"{report.kernels / 1e12:.1f} T, by formula: XLA does not count them"
    )
    table.add_row("  HBM", f"{report.hbm_bytes / 1e9:.1f} GB read and written")
    table.add_row("  interconnect", f"{report.collective_bytes / 1e9:.2f} GB sent, most of it in")
    for kind, shape, size in report.collectives:
        table.add_row(f"    {kind}", f"{size / 1e9:.2f} GB, {shape}")
    if report.uncounted:
        table.add_row("  not counted", ", ".join(report.uncounted))
    table.add_section()
    table.add_row("at best", f"{seconds:.3f} s a step, by {name}")
    table.add_row("  by each", ", ".join(f"{name} {seconds:.3f} s" for name, seconds in report.roofs.items()))
    table.add_row("compile time", f"{report.compile_seconds:.0f} s")
    return table


def as_rows(reports: list[Report]) -> Table:
    """A line for each mesh, the recommended one first."""
    table = Table(title=f"{reports[0].program} on {reports[0].topology}", title_justify="left")
    for column in ("mesh", "remat", "batch", "GiB", "at best, s/sample", "by"):
        table.add_column(column)
    for report in reports:
        size = f"{report.total / roof.GIB:.1f}" if report.fits else "does not fit"
        name, seconds = report.roof
        best = f"{seconds / report.batch:.3f}" if report.fits else ""
        table.add_row(_mesh(report), report.remat, str(report.batch), size, best, name)
    return table


def _title(report: Report) -> str:
    batch = f"batch {report.batch}, {report.tokens:,} tokens, weights {report.weights}"
    return f"{report.program} on {report.topology}, {_mesh(report)}: {batch}" + (
        f", remat {report.remat}" if report.remat else ""
    )


def _mesh(report: Report) -> str:
    return " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "one chip"


def as_json(report: Report) -> dict[str, Any]:
    name, seconds = report.roof
    best = {"limit": name, "seconds": seconds} if report.fits else None
    total = report.total if report.fits else None
    return dataclasses.asdict(report) | {"total_memory": total, "at_best": best}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # nothing runs, and a TPU that is here may be in use
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    config, program, topology = cli.load_config(CONFIG), PROGRAM.value, TOPOLOGY.value
    if MESH.value and SWEEP.value:
        raise UserError("--sweep tries meshes of its own", found=f"--mesh={MESH.value}", fix="one of the two")
    if MESH.value:
        config = parse_mesh(MESH.value, config)
    if SWEEP.value:
        reports = sweep(program, config, topology, BATCH.value)
        if not reports:
            raise UserError(f"no mesh of {topology} takes this config", fix="another --batch or topology")
    else:
        reports = [examine(program, with_batch(config, topology, BATCH.value), topology)]
    if JSON.value:
        print(json.dumps([as_json(report) for report in reports], indent=1))
        return
    console = Console()
    if SWEEP.value:
        console.print(as_rows(reports))
        fits = f"recommended: --mesh {_mesh(reports[0]).replace(' ', ',')}" + (
            f" --config.run.remat={reports[0].remat}" if reports[0].remat else ""
        )
        console.print(fits if reports[0].fits else "none fits: more chips, weights in int8, or smaller clips")
    else:
        console.print(as_table(reports[0]))


if __name__ == "__main__":
    CONFIG = cli.define_config()
    PROGRAM = flags.DEFINE_enum("program", "train", list(PROGRAMS), "What to compile.")
    TOPOLOGY = flags.DEFINE_string(
        "topology", None, "Chips, such as v5e:2x4, v5p:2x2x1, v6e:4x4.", required=True
    )
    MESH = flags.DEFINE_string(
        "mesh", None, "Axes and sizes, such as fsdp=4,context=2, instead of config.mesh."
    )
    BATCH = flags.DEFINE_integer(
        "batch", None, "Clips of a step; by default data.batch_size, or the next that divides over the mesh."
    )
    SWEEP = flags.DEFINE_bool("sweep", False, "Try meshes and remat policies, and recommend one.")
    JSON = flags.DEFINE_bool("json", False, "For programs: a list of reports, best first.")
    cli.run(main)
