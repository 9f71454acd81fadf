"""The training step: its arithmetic by hand on fake networks; meshes, costs and what is trained on tiny real ones."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ditmem_jax.config import ExpertsConfig, MemoryConfig, MeshConfig, ObjectiveConfig
from ditmem_jax.diffusion import objective
from ditmem_jax.diffusion.objective import BINS, Baseline
from ditmem_jax.models.backbone import Experts
from ditmem_jax.models.ditmem import Networks, encode, per_sample_mse
from ditmem_jax.models.placement import tree_shardings
from ditmem_jax.models.state import abstract, split
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.parallel.mesh import batch_sharding, make_mesh, with_shardings
from ditmem_jax.storage.weights import load_dit
from ditmem_jax.train.optimizer import make_optimizer
from ditmem_jax.train.setup import batch_layout, load_networks
from ditmem_jax.train.step import (
    TrainState,
    init_state,
    jit_train_step,
    make_encoder,
    make_train_step,
    state_layout,
)
from ditmem_jax.types import Batch, Compute, Conditioning
from tests.fakes import FakeDiT, FakeEncoder, Seen, batch, networks
from tests.tiny import make_tiny, random_arrays, replace, tiny_config

NONE = np.nan
RATE = 0.1


# --- by hand ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Taken:
    """A step that was taken on fake networks."""

    seen: Seen
    state: TrainState
    metrics: dict

    @property
    def sigma(self):
        return np.asarray(self.seen.sigma, np.float64)

    @property
    def kept(self):
        return np.isfinite(np.asarray(self.seen.memory.bias)).any(1)


def take(samples, *, step=0, seed=0, baseline=None, experts=None, dit=None, **goal):
    """One step of gradient descent on `samples`, not compiled; noise levels are uniform by default."""
    goal = dict(kind="released", density="uniform", sigma_range=(0.3, 0.9), memory_dropout=0.0) | goal
    config = replace(tiny_config("nowhere", objective=ObjectiveConfig(**goal)), "run", seed=seed)
    config = dataclasses.replace(config, experts=experts or ExpertsConfig())
    seen, optimizer = Seen(), optax.sgd(RATE)
    structures, backbone, encoder = networks(dit or FakeDiT(seen=seen), FakeEncoder(seen))
    params, rest = {"factor": encoder["factor"]}, {"calls": encoder["calls"]}
    state = TrainState(jnp.int32(step), params, rest, optimizer.init(params), baseline or Baseline.empty())
    return Taken(seen, *make_train_step(config, structures, optimizer)(state, backbone, samples))


NUMBERS = np.array([2.0, 4.0, 3.0, 5.0])
VIDEOS = [[1.0, NONE], [NONE, 2.0], [NONE, NONE], [1.0, 0.5]]
HEARD = np.nansum(VIDEOS, axis=1)


@pytest.mark.parametrize("kind", ["released", "relative", "running"])
def test_a_step_by_hand(kind):
    """Errors, what is minimised, its gradient and the update, the gain of each bin, and what the baseline has seen."""
    filled = Baseline(jnp.full(BINS, 6.0), jnp.full(BINS, 2.0))
    dropout = 0.3 if kind == "running" else 0.0
    taken = take(batch(NUMBERS, VIDEOS), kind=kind, memory_dropout=dropout, baseline=filled)
    sigma, kept = taken.sigma, taken.kept
    assert kept.sum() >= 2 and not kept[2]  # the third has no video
    off = sigma * NUMBERS - HEARD * kept
    error, alone = off**2, (sigma * NUMBERS) ** 2
    expected = alone if kind == "relative" else (6 + 4 * error) / (2 + 4)
    weight = 1 / expected
    if kind == "released":
        weight = np.asarray(objective.released_weight(taken.seen.sigma, 5.0))
    slope = (weight * 2 * off * -HEARD * kept).mean()
    bins = (sigma * BINS).astype(int)
    gains = [
        1 - error[here].sum() / expected[here].sum()
        for here in (kept & (bins == each) for each in range(BINS))
        if here.any()
    ]
    assert {name: float(x) for name, x in taken.metrics.items()} == pytest.approx(
        {
            "objective": (weight * error).mean(),
            "loss": error.mean(),
            "gain": np.mean(gains),
            "gradient_norm": abs(slope),
            "parameter_norm": 1 - RATE * slope,
        },
        rel=1e-4,
    )
    assert float(taken.state.params["factor"]) == pytest.approx(1 - RATE * slope, rel=1e-4)
    assert (int(taken.state.step), float(taken.state.rest["calls"])) == (1, 1)
    watched, number = (alone, np.ones(4)) if kind == "relative" else (error, ~kept)
    total, count = np.full(BINS, 6.0), np.full(BINS, 2.0)
    np.add.at(total, bins, watched * number)
    np.add.at(count, bins, number)
    np.testing.assert_allclose(taken.state.baseline.total, total, rtol=1e-4)
    np.testing.assert_array_equal(taken.state.baseline.count, count)


def test_the_gain_of_training_is_a_ratio_of_means_in_each_bin():
    """Errors 1 and 9 with memory, 4 and 16 without, of two samples at one noise level, and 2 and 1 at another."""
    samples = batch([2.0, 4.0], [[1.0], [1.0]])
    one = take(samples, kind="relative", sigma_range=(0.9999, 1.0))
    assert float(one.metrics["gain"]) == pytest.approx(1 - 10 / 20, rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_memory_is_dropped_as_often_as_configured(dropout):
    samples = batch(np.ones(400), np.tile([[1.0, NONE], [NONE, NONE]], (200, 1)))
    first, second = (take(samples, memory_dropout=dropout, step=step) for step in (0, 1))
    assert not first.kept[1::2].any()
    assert first.kept[::2].mean() == pytest.approx(1 - dropout, abs=0.08 if dropout else 0)
    assert (first.kept != second.kept).any() == (dropout > 0)
    # the samples without memory show what is expected without
    assert int(first.state.baseline.count.sum()) == (~first.kept).sum()


def test_references_are_shuffled_for_each_sample_and_not_otherwise():
    videos = np.tile([[1.0, 2.0, 3.0, NONE]], (60, 1))
    shuffled, next_step = (take(batch(np.ones(60), videos), step=step).seen for step in (0, 1))
    means = np.where(shuffled.present, shuffled.references.mean((2, 3, 4, 5)), NONE)
    np.testing.assert_allclose(np.sort(means, axis=1), videos, rtol=1e-6)
    assert len(np.unique(means, axis=0)) > 10
    assert (shuffled.present != next_step.present).any()
    as_given = take(batch(np.ones(60), videos), shuffle_references=False).seen
    np.testing.assert_array_equal(as_given.present, ~np.isnan(videos))


def test_noise_and_dropout_depend_on_nothing_but_seed_step_and_sample():
    """The bits that draw a level draw no noise: normal and uniform numbers of one key would be in the same order."""
    samples = batch(np.ones(64), np.ones((64, 1)))
    first = take(samples, density="uniform", sigma_range=(0.1, 1.0))
    noise = np.asarray(first.seen.noise, np.float64)
    assert (noise.mean(), noise.std()) == pytest.approx((0, 1), abs=0.1)
    values = noise.reshape(64, -1)
    for numbers in (*values.T, values.reshape(-1)[:64]):
        assert abs(np.corrcoef(np.argsort(np.argsort(numbers)), first.sigma)[0, 1]) < 0.5
    again, later, other = (
        take(samples, sigma_range=(0.1, 1.0), **changed) for changed in ({}, {"step": 1}, {"seed": 1})
    )
    np.testing.assert_array_equal(again.seen.noise, first.seen.noise)
    np.testing.assert_array_equal(again.seen.dropout, first.seen.dropout)
    for taken in (later, other):
        assert (taken.seen.dropout != first.seen.dropout).any()
        assert abs(np.corrcoef(np.asarray(taken.seen.noise).reshape(-1), noise.reshape(-1))[0, 1]) < 0.2
        assert abs(np.corrcoef(taken.sigma, first.sigma)[0, 1]) < 0.5


def test_a_step_is_made_by_the_expert_of_its_noise_levels():
    """The experts err by 3 and by 5; the bins of the baseline tell the levels that were drawn."""
    dit, samples, seen = (
        Experts(FakeDiT(offset=3.0), FakeDiT(offset=5.0)),
        batch([0.0] * 4, [[NONE]] * 4),
        set(),
    )
    for step in range(8):
        taken = take(samples, dit=dit, step=step, experts=ExpertsConfig(0.6, "both"))
        high = np.flatnonzero(taken.state.baseline.count).min() >= 0.6 * BINS
        assert float(taken.metrics["loss"]) == pytest.approx(9 if high else 25, rel=1e-4)
        seen.add(high)
    assert seen == {True, False}


# --- tiny real networks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_step_gives_first_frames_as_often_as_it_should(config):
    """At 1 the loss is that of clean first frames, whatever the frozen weights; at 0 nothing changes."""
    plain, held = (run_steps(replace(config, "objective", first_frame=p), steps=1)[0][0] for p in (0.0, 1.0))
    assert abs(held["loss"] - plain["loss"]) > 1e-4
    assert np.isfinite(list(held.values())).all()
    np.testing.assert_array_equal(plain["loss"], run_steps(config, steps=3)[0][0]["loss"])
