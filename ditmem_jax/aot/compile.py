"""Compiles the real programs of training and sampling for TPUs that are not there, and tells whether they fit.

The TPU compiler (extra `tpu`) runs on any x86-64 Linux. Nothing is loaded: shapes, dtypes and shardings stand for all
arrays. Memory is the compiler's own statement about one chip; operations, bytes and collectives are read from the
compiled program (see `roof`).
"""

import dataclasses
import importlib.util
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.console import Console

from ditmem_jax.aot import roof
from ditmem_jax.conditions.kinds import condition_layout
from ditmem_jax.config import Config, MeshConfig
from ditmem_jax.errors import UserError, nearest
from ditmem_jax.models.ditmem import compute_for
from ditmem_jax.models.encoders import per_video
from ditmem_jax.models.placement import tree_shardings
from ditmem_jax.models.state import Arrays, abstract
from ditmem_jax.models.wan.umt5 import UMT5
from ditmem_jax.models.wan.vae import VAE, decode_program, encode_program
from ditmem_jax.parallel.mesh import (
    AXES,
    batch_parts,
    batch_sharding,
    check_mesh,
    make_mesh,
    replicated,
    with_shardings,
)
from ditmem_jax.progress import track
from ditmem_jax.sample.sampler import initial, make_step, schedule
from ditmem_jax.storage.weights import DTYPES, new_dit
from ditmem_jax.train.optimizer import make_optimizer
from ditmem_jax.train.setup import batch_layout
from ditmem_jax.train.step import jit_train_step, make_encoder, make_networks, state_layout
from ditmem_jax.types import Conditioning

# libtpu looks for the machine that it is on, complains where that is none of its own, and lets one process at a time
# have its chips, of which none is wanted here.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
Program = Literal["train", "text", "encode", "memory", "sample", "decode"]
Kinds = dict[str, Any]
"""The contents of memory by kind, each a pytree of shapes with shardings."""


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
    dit, backbone = _network(
        lambda: new_dit(config, config.experts.trains, compute_for(config, mesh, training=True)), "dit", mesh
    )
    state = state_layout(config, optimizer, mesh)
    batch = batch_layout(config, mesh, jnp.dtype(config.weights.computed_in))
    step = jit_train_step(config, make_networks(config, dit), optimizer, mesh)
    kinds = {
        "transformer": backbone,
        "encoder": (state.params, state.rest),
        "optimiser": state.optimizer,
        "batch": (batch, state.step, state.baseline),
    }
    return step, (state, backbone, batch), kinds, {}


def sampling(config: Config, mesh: Mesh) -> tuple[Callable, tuple, Kinds, Kinds]:
    """As `training`, for a step of denoising with guidance and memory.

    Of two experts it is that of the first step, with one encoder for both. The text encoder is gone by then.
    """
    structure, arrays = _network(lambda: new_dit(config, "high", compute_for(config, mesh)), "dit", mesh)
    encoder, encoder_arrays = _network(lambda: make_encoder(config), "encoder", mesh)
    vae = nnx.state(_vae(config, mesh))

    size = config.data.batch_size
    references = (size, config.data.references, *config.latent_shape)
    memory = jax.eval_shape(
        lambda arrays, *given: encoder.merge(arrays)(*given, training=False),
        encoder_arrays,
        jax.ShapeDtypeStruct(references, jnp.float32),
        jax.ShapeDtypeStruct(references[:2], bool),
        jax.ShapeDtypeStruct((size,), jnp.int32),
    )
    each, every = batch_sharding(mesh), replicated(mesh)
    noise = jax.ShapeDtypeStruct((size, *config.latent_shape), jnp.float32, sharding=each)
    text = jax.ShapeDtypeStruct((size, config.dit.text_len, config.dit.text_dim), jnp.float32, sharding=every)
    memory = with_shardings(memory, jax.tree.map(lambda _: each, memory))
    carry = jax.eval_shape(lambda x: initial(config, x), noise)
    carry = with_shardings(carry, jax.tree.map(lambda _: each, carry))
    coefficients, scale = schedule(config)[0]
    row = jax.ShapeDtypeStruct(coefficients.shape[1:], jnp.float32, sharding=every)
    told = {
        name: jax.ShapeDtypeStruct((size, *shape), jnp.float32, sharding=each)
        for name, shape in condition_layout(config).items()
    }
    inputs = carry, row, Conditioning(text, **told), Conditioning(text, **told), memory

    graph, weights = nnx.split(structure.merge(arrays))
    step = make_step(config, graph, scale)
    program = jax.jit(step, out_shardings=each)
    beside = {"memory encoder": encoder_arrays, "VAE": vae}
    if config.experts.boundary is not None:
        beside["other expert"] = weights
    return program, (weights, *inputs), {"transformer": weights, "batch": inputs}, beside


def text_encoding(config: Config, mesh: Mesh) -> tuple[Callable, tuple, Kinds, Kinds]:
    """As `training`, for the embedding of prompts, which is the first thing in sampling."""
    graph, weights = _text_encoder(config, mesh)
    sizes, every = (config.data.batch_size, config.dit.text_len), replicated(mesh)
    inputs = tuple(jax.ShapeDtypeStruct(sizes, dtype, sharding=every) for dtype in (jnp.int32, bool))
    program = jax.jit(lambda weights, *inputs: nnx.merge(graph, weights)(*inputs), keep_unused=True)
    return program, (weights, *inputs), {"text encoder": weights, "batch": inputs}, {}


def video_encoding(config: Config, mesh: Mesh) -> tuple[Callable, tuple, Kinds, Kinds]:
    """As `training`, for the frames of one latent, with the cache of those before; `ditmem encode` holds the text encoder too."""
    graph, weights = nnx.split(_vae(config, mesh))
    video, every = config.video, replicated(mesh)

    def frames(count: int) -> jax.ShapeDtypeStruct:
        shape = (config.data.batch_size, count, video.height, video.width, 3)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=every)

    cache, _ = jax.eval_shape(encode_program, graph, weights, None, frames(1))
    inputs = with_shardings(cache, jax.tree.map(lambda _: every, cache)), frames(config.vae.temporal_stride)
    kinds = {"VAE": weights, "cache": inputs[0], "batch": inputs[1]}
    beside = {"text encoder": _text_encoder(config, mesh)[1], "video": frames(video.frames)}
    return _with_all_weights(encode_program), (graph, weights, *inputs), kinds, beside


def memory_encoding(config: Config, mesh: Mesh) -> tuple[Callable, tuple, Kinds, Kinds]:
    """As `training`, for the memory rows of one reference video, beside the networks that sampling holds."""
    structure, arrays = _network(lambda: make_encoder(config), "encoder", mesh)
    latents = jax.ShapeDtypeStruct((1, *config.latent_shape), jnp.float32, sharding=replicated(mesh))

    def program(arrays: Arrays, latents: jax.Array) -> jax.Array:
        return per_video(structure.merge(arrays)).video_rows(latents, training=False)

    beside = {"transformer": _transformer(config, mesh), "VAE": nnx.state(_vae(config, mesh))}
    return (
        jax.jit(program, keep_unused=True),
        (arrays, latents),
        {"memory encoder": arrays, "batch": latents},
        beside,
    )


def decoding(config: Config, mesh: Mesh) -> tuple[Callable, tuple, Kinds, Kinds]:
    """As `training`, for the frames of one latent, with the cache of those before, beside the networks that sampling holds."""
    graph, weights = nnx.split(_vae(config, mesh))
    size, video, every = config.data.batch_size, config.video, replicated(mesh)
    shape = (size, 1, *config.latent_shape[1:])
    latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=every)
    cache, _ = jax.eval_shape(decode_program, graph, weights, None, latents)
    cache = with_shardings(cache, jax.tree.map(lambda _: every, cache))
    clips = (size, video.frames, video.height, video.width, 3)
    beside = {
        "transformer": _transformer(config, mesh),
        "memory encoder": _network(lambda: make_encoder(config), "encoder", mesh)[1],
        "clips": jax.ShapeDtypeStruct(clips, jnp.float32, sharding=every),
    }
    kinds = {"VAE": weights, "cache": cache, "batch": latents}
    return _with_all_weights(decode_program), (graph, weights, cache, latents), kinds, beside


PROGRAMS: dict[Program, Callable] = {
    "train": training,
    "text": text_encoding,
    "encode": video_encoding,
    "memory": memory_encoding,
    "sample": sampling,
    "decode": decoding,
}


def _with_all_weights(program: Any) -> Any:
    """A program of a part of the VAE with all weights as its arguments: those of the other part are in memory as well."""
    return jax.jit(program.__wrapped__, static_argnums=0, donate_argnums=2, keep_unused=True)


def _transformer(config: Config, mesh: Mesh) -> Arrays:
    return _network(lambda: new_dit(config, "both", compute_for(config, mesh)), "dit", mesh)[1]


def _text_encoder(config: Config, mesh: Mesh) -> tuple[Any, Any]:
    """Structure and weights."""
    dtype = DTYPES[config.weights.computed_in]
    structure, arrays = _network(lambda: UMT5(config.text, rngs=nnx.Rngs(0), dtype=dtype), "text", mesh)
    return nnx.split(structure.merge(arrays))


def _vae(config: Config, mesh: Mesh) -> VAE:
    structure, arrays = _network(lambda: VAE(config.vae, rngs=nnx.Rngs(0)), "vae", mesh)
    return structure.merge(arrays)


def _network(create: Callable[[], nnx.Module], prefix: str, mesh: Mesh) -> tuple[Any, Arrays]:
    structure, shapes = abstract(create)
    named = {f"{prefix}.{path}": x for path, x in shapes.items()}
    placed = with_shardings(named, tree_shardings(named, mesh))
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
    report = Report(
        program=program,
        topology=topology,
        mesh={axis: mesh.shape[axis] for axis in AXES},
        batch=config.data.batch_size,
        tokens=math.prod(config.token_grid),
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
    weights = {_signature(x) for x in jax.tree.leaves(kinds.get("transformer", ()))}
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
    sent = sum(cost.collectives.values(), 0.0)
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
    alone = re.fullmatch(r"\w+:1(x1)+", topology)  # a host has four chips, unless told that it has one
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if alone else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(
            f"no TPU topology {topology!r}",
            expected="generation and shape, such as v5e:1x1, v5e:2x4, v5p:2x2x1 or v6e:4x4",
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
    """The memory with the program, and the arrays beside it, where both together do not fit, in words."""
    used = f"{report.total / roof.GIB:.2f} of {report.hbm / roof.GIB:.2f} GiB with the program"
    return " and ".join([used, *report.beside])


def _statement(error: str) -> str:
    """The compiler's statement on memory that is not there, in one line."""
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
