"""Programs compiled for TPUs that are not there; needs libtpu (`make peers`)."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ditmem_jax.aot import compile as aot
from ditmem_jax.aot import roof
from ditmem_jax.config import ExpertsConfig, MeshConfig
from ditmem_jax.errors import UserError
from ditmem_jax.parallel.mesh import AXES, make_mesh
from tests.tiny import replace, tiny_config, write_config

with_compiler = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
TOPOLOGY = "v5e:2x2"
BESIDE = {
    "train": set(),
    "text": set(),
    "encode": {"text encoder", "video"},
    "memory": {"transformer", "VAE"},
    "sample": {"memory encoder", "VAE"},
    "decode": {"transformer", "memory encoder", "clips"},
}
"""What stays on the device and is no argument of a program."""


@pytest.fixture(scope="module", autouse=True)
def quiet():
    os.environ.update({name: os.environ.get(name, value) for name, value in aot.ENVIRONMENT.items()})


def small(folder="nowhere"):
    """The tiny networks with heads as wide as the TPU's kernels want them."""
    config = tiny_config(folder, mesh=MeshConfig(data=1, fsdp=4))
    dit = dataclasses.replace(config.dit, dim=256, num_heads=2, num_layers=2)
    memory = dataclasses.replace(config.memory, dim=256)
    vae = dataclasses.replace(config.vae, num_res_blocks=1)  # every convolution takes the compiler a second
    config = dataclasses.replace(config, dit=dit, memory=memory, vae=vae)
    config = replace(config, "weights", dtype="bfloat16")
    return replace(config, "run", remat="blocks")


@with_compiler
@pytest.mark.parametrize(
    ("topology", "mesh"), [("v6e:4x4", "fsdp=8,context=2"), ("v5p:2x4x4", "data=2,fsdp=8,context=2")]
)
def test_meshes_may_split_an_axis_of_the_torus(topology, mesh):
    devices = aot.topology_devices(topology)
    assert make_mesh(aot.parse_mesh(mesh, small()).mesh, devices).size == len(devices)


@with_compiler
@pytest.mark.parametrize("program", aot.PROGRAMS)
def test_memory_is_what_the_compiler_states(program, monkeypatch):
    """And every kind of argument is its arrays' share of one chip."""
    seen = []
    measured = aot._measured

    def note(report, compiled, *rest):
        seen.append(compiled)
        return measured(report, compiled, *rest)

    monkeypatch.setattr(aot, "_measured", note)
    report = aot.examine(program, small(), TOPOLOGY)
    stated = seen[0].memory_analysis()
    whole = stated.argument_size_in_bytes + stated.temp_size_in_bytes + stated.generated_code_size_in_bytes
    whole += stated.output_size_in_bytes - stated.alias_size_in_bytes
    assert report.fits and sum(report.memory.values()) == whole
    assert min(report.memory.values()) >= 0
    assert report.operations > 0 and not report.uncounted
    assert (report.kernels > 0) == (program in ("train", "sample"))
    if program in ("train", "sample"):
        assert any(kind == "all-gather" for kind, *_ in report.collectives)
    if program == "train":
        assert report.memory["optimiser"] == pytest.approx(2 * report.memory["encoder"], rel=0.05)
    assert set(report.beside) == BESIDE[program] and all(size > 0 for size in report.beside.values())


@with_compiler
def test_one_chip_is_a_topology():
    assert len(aot.topology_devices("v5e:1x1")) == len(aot.topology_devices("v6e:1x1")) == 1


@with_compiler
def test_what_does_not_fit_is_told_with_the_numbers(monkeypatch):
    config = small()
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, ffn_dim=2**21, num_layers=40))
    report = aot.examine("sample", config, TOPOLOGY)
    assert not report.fits and "15.75G" in report.statement


@with_compiler
def test_what_fits_alone_may_not_fit_beside_the_rest(monkeypatch):
    config = dataclasses.replace(small(), experts=ExpertsConfig(boundary=0.875))
    report = aot.examine("sample", config, TOPOLOGY)
    assert report.fits and set(report.beside) == {"memory encoder", "VAE", "other expert"}
    chip = roof.CHIPS["TPU v5 lite"]
    monkeypatch.setitem(roof.CHIPS, "TPU v5 lite", dataclasses.replace(chip, hbm=report.total - 1))
    report = aot.examine("sample", config, TOPOLOGY)
    assert not report.fits and "with the program and memory encoder and VAE" in report.statement


@with_compiler
def test_topologies_and_meshes_that_cannot_be_are_named():
    with pytest.raises(UserError, match=r"no TPU topology 'v9:2x2'(.|\n)*v5p:2x2x1"):
        aot.examine("train", small(), "v9:2x2")
    with pytest.raises(UserError, match=r"mesh does not fit"):
        aot.examine("train", dataclasses.replace(small(), mesh=MeshConfig(data=1, fsdp=8)), TOPOLOGY)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"TPU compiler is missing(.|\n)*ditmem_jax\[tpu\]"):
        aot.topology_devices(TOPOLOGY)


def test_a_mesh_is_read():
    assert aot.parse_mesh("fsdp=4,context=2", small()).mesh == MeshConfig(1, 4, 2, 1)
    for text in ("fsdp", "rows=2", "fsdp=x"):
        with pytest.raises(UserError, match="--mesh cannot be"):
            aot.parse_mesh(text, small())


def test_a_sweep_takes_the_quickest_policy_that_fits_and_the_quickest_mesh(monkeypatch):
    """With a compiler for which "attention" never fits, and context is twice as quick."""

    def examine(program, config, topology):
        return aot.Report(
            program=program, topology=topology, mesh={axis: getattr(config.mesh, axis) for axis in AXES}, batch=config.data.batch_size, tokens=1,
            remat=config.run.remat, weights="int8", hbm=1, memory={}, beside={}, fits=config.run.remat != "attention",
            roofs={"compute": config.data.batch_size / config.mesh.context},
        )  # fmt: skip

    monkeypatch.setattr(aot, "examine", examine)
    monkeypatch.setattr(aot, "topology_devices", lambda topology: jax.devices()[:4])
    reports = aot.sweep("train", replace(small(), "data", batch_size=1), TOPOLOGY, None)
    assert [(r.mesh["context"], r.batch, r.remat) for r in reports] == [
        (4, 1, "blocks"), (2, 2, "blocks"), (1, 4, "blocks"),
    ]  # fmt: skip


@with_compiler
def test_the_command_prints_a_table_or_json(tmp_path):
    file = write_config(tmp_path / "small.py", small())

    def run(*flags):
        command = [
            sys.executable,
            "-m",
            "ditmem_jax.aot",
            f"--config={file}",
            f"--topology={TOPOLOGY}",
            *flags,
        ]
        environment = {
            name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", *aot.ENVIRONMENT)
        }
        done = subprocess.run(
            command,
            cwd=Path(__file__).parents[2],
            env=environment,
            text=True,
            capture_output=True,
            timeout=600,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    printed = run("--mesh=fsdp=2,context=2", "--batch=2")
    assert "fits" in printed and "at best" in printed and max(map(len, printed.splitlines())) <= 80
    (report,) = json.loads(run("--mesh=fsdp=4", "--program=sample", "--json"))
    assert report["total_memory"] == sum((report["memory"] | report["beside"]).values())
    assert report["at_best"]["seconds"] > 0
    assert roof.CHIPS["TPU v5 lite"].hbm == report["hbm"]
