"""Training on random tiny networks: exactness, resuming, what is differentiated and what it costs."""

import csv
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from ditmem_jax.bank import matches
from ditmem_jax.bank.matches import FILE, Matches
from ditmem_jax.config import (
    Config,
    ExpertsConfig,
    MemoryConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimConfig,
)
from ditmem_jax.data.records import RecordReader
from ditmem_jax.diffusion.objective import draw_sigma
from ditmem_jax.errors import UserError
from ditmem_jax.models.backbone import Experts
from ditmem_jax.models.ditmem import Networks, encode, per_sample_mse
from ditmem_jax.models.placement import tree_shardings
from ditmem_jax.models.state import abstract, split
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.parallel.mesh import batch_sharding, make_mesh, with_shardings
from ditmem_jax.storage.encoders import encoder_metadata, load_encoder
from ditmem_jax.storage.weights import load_dit
from ditmem_jax.train import folder as runs
from ditmem_jax.train.optimizer import make_optimizer
from ditmem_jax.train.setup import Setup, batch_layout, check, load_networks
from ditmem_jax.train.step import init_state, jit_train_step, make_encoder, make_train_step, state_layout
from ditmem_jax.types import Batch, Compute, Conditioning
from tests.tiny import make_bank, make_tiny, random_arrays, replace, tiny_config, with_experts, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


# --- one step ---------------------------------------------------------------------------------------------------


def some_batch(config, size=8, seed=0):
    rng = np.random.default_rng(seed)
    grid = (*config.memory.latent_grid, config.vae.z_dim)
    return Batch(
        rng.standard_normal((size, *grid)).astype(np.float32),
        Conditioning(
            rng.standard_normal((size, config.dit.text_len, config.dit.text_dim)).astype(np.float32)
        ),
        rng.standard_normal((size, config.data.references, *grid)).astype(np.float32),
        rng.random((size, config.data.references)) < 0.8,
    )


def first_state(config):
    """A random encoder before its first step, on the host."""
    shapes = jax.eval_shape(lambda: init_state(config, make_optimizer(config.optim, 3)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return zeros.replace(params=random_arrays(shapes.params), rest=random_arrays(shapes.rest))


@functools.lru_cache
def stepper(config, mesh_config=None):
    """The compiled step of state and batch, and the frozen weights; on one device without a mesh."""
    mesh = make_mesh(mesh_config or MeshConfig(), None if mesh_config else jax.devices()[:1])
    networks, backbone = load_networks(config, mesh)
    optimizer = make_optimizer(config.optim, 3)
    step = jit_train_step(config, networks, optimizer, mesh)
    shardings = tree_shardings(jax.eval_shape(lambda: init_state(config, optimizer)), mesh)

    def take(state, batch):
        with jax.set_mesh(mesh):
            batch = jax.device_put(batch, batch_sharding(mesh))
            return step(jax.device_put(state, shardings), backbone, batch)

    return take, backbone


@functools.lru_cache
def run_steps(config, mesh_config=None, steps=3):
    """Metrics of a few steps, and the state and the frozen weights after them."""
    step, backbone = stepper(config, mesh_config)
    state, metrics = first_state(config), []
    for seed in range(steps):
        state, found = step(state, some_batch(config, seed=seed))
        metrics.append(jax.device_get(found))
    return metrics, state, backbone


BATCH_NORM = MemoryConfig(
    dim=48, in_dim=4, stages=((16, 3, 1, 1), (16, 3, 1, 2)), latent_grid=(3, 4, 4), tokens=10, num_heads=4
)


def released(config):
    """The config with the released kind of encoder and objective."""
    config = replace(config, "memory", **vars(BATCH_NORM))
    return replace(config, "objective", kind="released", density="shifted")


@pytest.mark.parametrize(
    ("change", "mesh", "shard"),
    [
        (lambda config: config, MeshConfig(data=4, fsdp=2), (24, 48)),
        (released, MeshConfig(data=4, fsdp=2), (24, 48)),
        (lambda config: config, MeshConfig(fsdp=2, context=2, tensor=2), (12, 24)),
    ],
    ids=["group norm", "batch norm", "context and tensor"],
)
def test_eight_devices_compute_what_one_does(config, change, mesh, shard):
    one, *_ = run_steps(change(config))
    eight, state, _ = run_steps(change(config), mesh)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        np.testing.assert_allclose(b["objective"], a["objective"], rtol=1e-5)
        np.testing.assert_allclose(b["gradient_norm"], a["gradient_norm"], rtol=1e-3)
    kernel = state.params["self_attention.q.kernel"]
    assert kernel.addressable_shards[0].data.shape == shard


@pytest.mark.parametrize(
    ("int8", "remat", "mesh", "held", "kernels"),
    [
        (False, "none", MeshConfig(data=2, fsdp=2, context=2), "f32", {"48,48", "48,96", "96,48"}),
        (True, "attention", MeshConfig(fsdp=2, context=2, tensor=2), "s8", {"48,24", "24,48", "48,48"}),
    ],
    ids=["full", "8 bits"],
)
def test_weights_are_gathered_block_by_block(config, int8, remat, mesh, held, kernels):
    """Over `fsdp` and `context`, forward and backward, every gathered weight is that of one block, inside the loop."""
    config = replace(config, "dit", num_layers=5)
    mesh, optimizer = make_mesh(mesh), make_optimizer(config.optim, 3)
    compute = Compute(remat=remat)
    dit, shapes = abstract(lambda: DiT(config.dit, int8=int8, compute=compute, rngs=nnx.Rngs(0)))
    networks = Networks(dit, abstract(lambda: make_encoder(config))[0])
    backbone = with_shardings(shapes, tree_shardings(shapes, mesh))
    inputs = state_layout(config, optimizer, mesh), backbone, batch_layout(config, mesh, np.float32)
    with jax.set_mesh(mesh):
        text = jit_train_step(config, networks, optimizer, mesh).lower(*inputs).compile().as_text()
    gathers = re.findall(r"= (\w+)\[(?:1,)?([\d,]*)\].* all-gather\(.*op_name=\"([^\"]*)\"", text)
    for direction in ("/jvp(", "/transpose(jvp("):
        inside = {
            (kind, shape) for kind, shape, name in gathers if direction in name and "while/body" in name
        }
        assert {shape for kind, shape in inside if kind == held} >= kernels
        assert not {shape for kind, shape in inside if kind != held} & kernels
    assert not [shape for _, shape, _ in gathers if shape.startswith("5,")]


def test_only_the_encoder_changes_and_all_of_it(config):
    before, start = split(load_dit(config))[1], first_state(config)
    metrics, state, backbone = run_steps(config)
    for name, x in backbone.items():
        np.testing.assert_array_equal(x, before[name])
    assert {x.dtype for x in state.params.values()} == {np.dtype(np.float32)}
    # a bias of all keys changes no softmax
    still = [name for name in state.params if np.array_equal(state.params[name], start.params[name])]
    assert still in ([], ["self_attention.k.bias"])
    assert all(np.isfinite(list(found.values())).all() for found in metrics)


def test_each_step_of_two_experts_is_one_by_the_expert_of_its_noise_levels(config, tmp_path):
    both, *single = (with_experts(config, tmp_path / "weights", trains) for trains in ("both", "high", "low"))
    drawn = {}  # numbers of a step that draws noise levels of the high expert and of one that does not
    for number in range(40):
        key = jax.random.split(jax.random.fold_in(jax.random.key(config.run.seed), number), 5)[0]
        drawn.setdefault(bool(draw_sigma(config.objective, key, 8, both.experts)[1]), number)
    after = {}
    for high, expert in zip((True, False), single, strict=True):
        first = first_state(config).replace(step=np.int32(drawn[high]))
        (state, found), (wanted, expected) = (
            stepper(each)[0](first, some_batch(config)) for each in (both, expert)
        )
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        for name in first.params:
            ours, theirs = (np.asarray(x.params[name]) - first.params[name] for x in (state, wanted))
            # Adam makes whole steps of gradients that are hardly more than rounding
            assert np.linalg.norm(ours - theirs) <= 0.02 * np.linalg.norm(theirs), name
        after[high] = state
    moved = [not np.array_equal(after[True].params[name], after[False].params[name]) for name in first.params]
    assert np.mean(moved) > 0.9


def test_of_two_experts_only_the_one_that_trains_is_loaded_and_named_in_the_file(config, tmp_path):
    config, mesh = with_experts(config, tmp_path / "weights", "high"), make_mesh(MeshConfig())
    high = safetensors.numpy.load_file(tmp_path / "weights" / "dit_high.safetensors")
    _, backbone = load_networks(config, mesh)
    assert backbone.keys() == high.keys()
    np.testing.assert_array_equal(backbone["head.kernel"], high["head.kernel"])
    setup = types.SimpleNamespace(config=config, mesh=mesh, folder=tmp_path, fingerprint="abc")
    file = Setup.export(setup, "encoder.safetensors", first_state(config), 7, {})
    assert encoder_metadata(file)[1] == {"step": 7, "gains": {}, "backbone": "abc", "expert": "high"}


def test_every_option_at_once(config):
    """bfloat16, the error without memory as reference, recomputation, accumulated gradients, a cosine with warmup."""
    config = replace(released(config), "weights", dtype="bfloat16")
    config = replace(config, "objective", kind="relative")
    config = replace(config, "optim", accumulate=2, schedule="cosine", warmup=1, weight_decay=0.1)
    config = replace(config, "run", remat="products")
    start = first_state(config)
    metrics, state, _ = run_steps(config, steps=4)
    assert all(np.isfinite(list(found.values())).all() for found in metrics)
    moved = [not np.array_equal(state.params[name], start.params[name]) for name in start.params]
    assert np.mean(moved) > 0.9
    filter, mean = (f"high.stages.0.{name}" for name in ("filter.complex_weight", "norm.mean"))
    np.testing.assert_array_equal(state.rest[filter], start.rest[filter])
    assert not np.array_equal(state.rest[mean], start.rest[mean])


def test_a_step_costs_at_most_twice_the_forward_pass(config):
    """By XLA's count, blocks laid out, nothing recomputed: no gradient of a frozen weight is ever computed."""
    config = dataclasses.replace(
        config,
        dit=dataclasses.replace(config.dit, dim=96, ffn_dim=384, num_layers=3),
        memory=dataclasses.replace(config.memory, dim=96),
        objective=ObjectiveConfig(kind="released"),
    )
    dit, backbone = abstract(lambda: DiT(config.dit, compute=Compute(unroll=True), rngs=nnx.Rngs(0)))
    networks = Networks(dit, abstract(lambda: make_encoder(config))[0])
    optimizer = make_optimizer(config.optim, 10)
    state = jax.eval_shape(lambda: init_state(config, optimizer))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), some_batch(config))

    def forward(arrays, backbone, batch, sigma, noise):
        memory = encode(networks.encoder.merge(arrays), batch)
        return per_sample_mse(networks.dit.merge(backbone), memory, batch, sigma, noise)

    def operations(function, *inputs):
        return jax.jit(function).lower(*inputs).compile().cost_analysis()["flops"]

    step = operations(make_train_step(config, networks, optimizer), state, backbone, batch)
    sigma = jax.ShapeDtypeStruct((8,), jnp.float32)
    assert step <= 2.2 * operations(forward, state.params | state.rest, backbone, batch, sigma, batch.latents)


def test_a_step_of_two_experts_holds_no_copy_of_weights(tmp_path):
    config = tiny_config(tmp_path)
    optimizer = make_optimizer(config.optim, 10)
    encoder, _ = abstract(lambda: make_encoder(config))
    state = jax.eval_shape(lambda: init_state(config, optimizer))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), some_batch(config))

    def memory(config, create):
        dit, backbone = abstract(create)
        step = jax.jit(make_train_step(config, Networks(dit, encoder), optimizer))
        return step.lower(state, backbone, batch).compile().memory_analysis().temp_size_in_bytes

    def one():
        return DiT(config.dit, rngs=nnx.Rngs(0))

    two = dataclasses.replace(config, experts=ExpertsConfig(0.875))
    assert memory(two, lambda: Experts(one(), one())) <= 1.1 * memory(config, one)


def test_muon_turns_kernels_in_all_directions_alike():
    rng = np.random.default_rng(0)
    shapes = {"conv.kernel": (3, 1, 2, 4, 8), "conv.bias": (8,)}
    weights = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    optimizer = make_optimizer(OptimConfig(kind="muon", learning_rate=1.0, clip=0.0), 10)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(weights, optimizer.init(weights), weights)
    directions = np.linalg.svd(updates["conv.kernel"].reshape(24, 8), compute_uv=False)
    expected = 0.2 * np.sqrt(24)  # a matrix with orthonormal columns has an rms of 1 / sqrt(24)
    assert 0.6 * expected < directions.min() and directions.max() < 1.3 * expected
    first = updates["conv.bias"]  # Adam's first update has one size, whatever the gradient's
    np.testing.assert_allclose(first, -np.sign(weights["conv.bias"]) * np.abs(first[0]), rtol=1e-5)


# --- whole runs -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Runner:
    """Starts `python -m ditmem_jax.train` as a user would, on one device."""

    folder: Path
    config: Config

    def start(self, out, **values):
        config = replace(self.config, "run", out=str(self.folder / out), **values)
        file = write_config(self.folder / f"{out}.py", config)
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "ditmem_jax.train", f"--config={file}"]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def finish(self, out, **values):
        process = self.start(out, **values)
        printed, complaints = process.communicate(timeout=600)
        assert process.returncode == 0, complaints
        return printed

    def interrupt(self, out, after, number):
        """Sends a signal once the checkpoint of step `after` is complete."""
        process = self.start(out)
        checkpoint = self.folder / out / "checkpoints" / str(after)
        while not checkpoint.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=600)
        return process.returncode, printed


@pytest.fixture(scope="module")
def runner(config, tmp_path_factory):
    options = dict(steps=160, log_every=10, validate_every=80, save_every=10, keep=2)
    runner = Runner(tmp_path_factory.mktemp("runs"), replace(config, "run", **options))
    printed = runner.finish("whole")
    assert "trained 28,704" in printed and "frozen 80,416" in printed
    return runner


def rows(path):
    with open(path, newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "step_ms"} for row in csv.DictReader(file)
        ]


def test_a_run_that_is_terminated_and_killed_ends_bit_for_bit_the_same(runner):
    status, printed = runner.interrupt("broken", 30, signal.SIGTERM)
    assert (status, "the same command continues" in printed) == (128 + signal.SIGTERM, True)
    status, _ = runner.interrupt("broken", 70, signal.SIGKILL)
    assert status == -signal.SIGKILL
    runner.finish("broken")
    whole, broken = runner.folder / "whole", runner.folder / "broken"
    for name in ("encoder.safetensors", "encoder_best.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert rows(whole / "validation.csv") == rows(broken / "validation.csv")
    assert rows(whole / "metrics.csv")[-1] == rows(broken / "metrics.csv")[-1]


def test_a_run_leaves_curves_checkpoints_and_an_encoder(runner):
    folder = runner.folder / "whole"
    assert [row["step"] for row in rows(folder / "metrics.csv")] == [str(step) for step in range(10, 161, 10)]
    assert [row["step"] for row in rows(folder / "validation.csv")] == ["0", "80", "160"]
    assert {"gain", "gain_wrong", "gain_0.95"} <= rows(folder / "validation.csv")[0].keys()
    assert {"150", "160"} <= {path.name for path in (folder / "checkpoints").iterdir()}
    assert list((folder / "tensorboard").iterdir())
    config, notes = encoder_metadata(folder / "encoder.safetensors")
    assert (config, notes["step"]) == (runner.config.memory, 160)
    load_encoder(folder / "encoder.safetensors")


def test_a_damaged_checkpoint_stops_the_run_by_name(runner):
    folder = runner.folder / "whole" / "checkpoints" / "160"
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    process = runner.start("whole", steps=170)
    _, complaints = process.communicate(timeout=600)
    file.write_bytes(content)
    assert process.returncode == 1
    assert f"checkpoint {folder} is damaged" in complaints and "Traceback" not in complaints


def test_a_folder_belongs_to_one_run(config, tmp_path):
    config = replace(config, "run", out=str(tmp_path / "run"))
    with runs.claim(config, "abc") as folder:
        assert folder == tmp_path / "run"
    for same in (replace(config, "run", steps=99, log_every=1), replace(config, "mesh", fsdp=2)):
        runs.claim(same, "abc").__enter__()
    with pytest.raises(UserError, match=r"another run(.|\n)*optim.learning_rate = 0.5"):
        runs.claim(replace(config, "optim", learning_rate=0.5), "abc").__enter__()
    with pytest.raises(UserError, match=r"backbone = xyz"):
        runs.claim(config, "xyz").__enter__()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="holds something else"):
        runs.claim(replace(config, "run", out=str(tmp_path / "other")), "abc").__enter__()


def test_a_run_begun_before_a_key_existed_has_its_default(config, tmp_path):
    config = replace(config, "run", out=str(tmp_path))
    stored = runs.identity(config) | {"backbone": "abc"}
    for name in ("vae.patch_size", "optim.kind", "experts.trains", "objective.sigma_range"):
        del stored[name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    runs.claim(config, "abc").__enter__()
    with pytest.raises(UserError, match=r"optim.kind = muon(.|\n)*optim.kind = adamw"):
        runs.claim(replace(config, "optim", kind="muon"), "abc").__enter__()


def test_a_run_that_cannot_begin_leaves_nothing(config, tmp_path):
    config = replace(config, "run", out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="at least 50 references"):
        Setup(replace(config, "data", references=50))
    assert not (tmp_path / "run").exists()


def test_a_fingerprint_sees_one_bit():
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": jnp.ones(3, jnp.bfloat16)}
    first = runs.fingerprint(arrays)
    bits = arrays["a"].view(np.uint32).copy()
    bits[2, 1] ^= 1
    assert runs.fingerprint(arrays | {"a": bits.view(np.float32)}) != first
    assert runs.fingerprint(dict(reversed(arrays.items()))) == first


def test_a_run_goes_on_with_the_references_it_began_with(config, tmp_path, capsys):
    folder = shutil.copytree(config.data.records, tmp_path / "records")
    bank = make_bank(tmp_path / "bank", Path(config.data.bank).with_name("library"))
    config = replace(config, "data", records=str(folder), bank=bank.table.uri, validation="")
    config = replace(config, "run", out=str(tmp_path / "run"))

    def match():
        matches.find(RecordReader(folder), bank, 2).save(folder / FILE)

    match()
    first = next(Setup(config).data)
    began = Matches.load(tmp_path / "run" / FILE)
    bank.remove(began.table["matches"][0].as_py())
    match()
    assert "note" not in capsys.readouterr().out
    np.testing.assert_array_equal(next(Setup(config).data).references, first.references)
    assert "matched with version 1 of the bank" in capsys.readouterr().out
    other = Setup(replace(config, "run", out=str(tmp_path / "other")))
    assert (next(other.data).references != first.references).any()


def test_missing_and_unfit_matches_name_the_command(config, tmp_path):
    records = RecordReader(config.data.records)
    with pytest.raises(UserError, match=r"of these records and this bank(.|\n)*match .*--k 50"):
        matches.read(records, config.data.bank, 50)
    with pytest.raises(UserError, match="of these records and this bank"):
        matches.read(records, str(tmp_path), 2)
    shutil.copytree(records.folder, tmp_path / "records", ignore=shutil.ignore_patterns(FILE))
    with pytest.raises(UserError, match="have not been matched"):
        matches.read(RecordReader(tmp_path / "records"), config.data.bank, 2)


def test_numbers_that_are_not_finite_stop_the_run(tmp_path):
    with runs.Monitor(tmp_path, 0, 10) as monitor:
        monitor.add(4, {"loss": jnp.float32(1)}, np.array(["a", "b"]))
        monitor.add(5, {"loss": jnp.float32(jnp.nan)}, np.array(["c", "d"]))
        with pytest.raises(UserError, match=r"at step 5(.|\n)*loss nan(.|\n)*c, d"):
            monitor.flush()


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    curves = runs.Curves(tmp_path, 0)
    for step in (10, 20, 30):
        curves.write("metrics", step, {"loss": float(step)})
    curves.close()
    runs.Curves(tmp_path, 20).close()
    assert rows(tmp_path / "metrics.csv") == [{"step": "10", "loss": "10"}, {"step": "20", "loss": "20"}]


def test_records_and_meshes_that_do_not_fit_are_named(config):
    records = RecordReader(config.data.records)
    bank = [matches.read(records, config.data.bank, 2).references(2)[0]]
    mesh = make_mesh(MeshConfig())
    check(config, mesh, bank, records)
    with pytest.raises(UserError, match=r"batch_size does not divide"):
        check(replace(config, "data", batch_size=6), mesh, bank, records)
    with pytest.raises(UserError, match=r"records do not fill a batch"):
        check(replace(config, "data", batch_size=24), mesh, bank, records)
    with pytest.raises(UserError, match=r"library do not fit(.|\n)*latents \[5, 4, 4, 4\]"):
        check(replace(config, "video", frames=17), mesh, bank, records)
    with pytest.raises(UserError, match=r"mesh.context"):
        check(config, make_mesh(MeshConfig(data=1, context=8)), bank, records)
