"""Training on random tiny networks: exactness, resuming, what is differentiated and what it costs."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ditmem_jax import runs
from ditmem_jax.checkpoint import TrainingCheckpoints, load_dit, load_encoder
from ditmem_jax.config import MemoryConfig, MeshConfig, ObjectiveConfig, to_dict
from ditmem_jax.errors import UserError
from ditmem_jax.models.ditmem import Networks, errors
from ditmem_jax.models.state import abstract, split
from ditmem_jax.sharding import batch_sharding, make_mesh, replicated, tree_shardings
from ditmem_jax.train import init_state, load_networks, make_encoder, make_optimizer, make_train_step, train
from tests.tiny import make_tiny, replace

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Runs that compute the same share one compilation."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


# --- one step ---------------------------------------------------------------------------------------------------


def some_batch(config, size=8, seed=0):
    rng = np.random.default_rng(seed)
    grid = (*config.memory.latent_grid, config.vae.z_dim)
    return {
        "latents": rng.standard_normal((size, *grid)).astype(np.float32),
        "context": rng.standard_normal((size, config.dit.text_len, config.dit.text_dim)).astype(np.float32),
        "references": rng.standard_normal((size, config.data.references, *grid)).astype(np.float32),
        "present": rng.random((size, config.data.references)) < 0.8,
    }


def run_steps(config, devices, mesh=MeshConfig(), steps=3):
    """Metrics of a few steps, and the state and the frozen weights after them."""
    mesh = make_mesh(mesh, devices)
    networks, backbone = load_networks(config, mesh)
    optimizer = make_optimizer(config.optim, steps)
    shardings = tree_shardings(jax.eval_shape(lambda: init_state(config, optimizer)), mesh)
    state = jax.jit(lambda: init_state(config, optimizer), out_shardings=shardings)()
    step = jax.jit(
        make_train_step(config, networks, optimizer), donate_argnums=0, out_shardings=(shardings, replicated(mesh))
    )
    metrics = []
    for seed in range(steps):
        state, found = step(state, backbone, jax.device_put(some_batch(config, seed=seed), batch_sharding(mesh)))
        metrics.append(jax.device_get(found))
    return metrics, state, backbone


BATCH_NORM = MemoryConfig(
    dim=48, in_dim=4, stages=((16, 3, 1, 1), (16, 3, 1, 2)), latent_grid=(3, 4, 4), tokens=10, num_heads=4
)


@pytest.mark.parametrize("memory", [None, BATCH_NORM], ids=["group norm", "batch norm"])
def test_eight_devices_compute_what_one_does(config, memory):
    config = config if memory is None else replace(config, "memory", **vars(memory))
    one, *_ = run_steps(config, jax.devices()[:1])
    eight, state, _ = run_steps(config, jax.devices(), MeshConfig(data=4, fsdp=2))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        np.testing.assert_allclose(b["objective"], a["objective"], rtol=1e-5)
    kernel = state.params["self_attention.q.kernel"]
    assert kernel.addressable_shards[0].data.shape == (24, 48)  # divided over fsdp


def test_only_the_encoder_changes_and_all_of_it(config):
    before = split(load_dit(config))[1]
    start = init_state(config, make_optimizer(config.optim, 3))
    metrics, state, backbone = run_steps(config, jax.devices()[:1])
    for name, x in backbone.items():
        np.testing.assert_array_equal(x, before[name])
    assert {x.dtype for x in state.params.values()} == {np.dtype(np.float32)}
    # a bias of all keys changes no softmax
    still = [name for name in state.params if np.array_equal(state.params[name], start.params[name])]
    assert still in ([], ["self_attention.k.bias"])
    assert all(np.isfinite(list(found.values())).all() for found in metrics)


@pytest.mark.parametrize("kind", ["released", "relative"])
def test_objectives_with_every_option(config, kind):
    """The published objective in bfloat16, recomputed blocks, accumulated gradients, a cosine with warmup."""
    config = replace(config, "memory", **vars(BATCH_NORM))
    config = replace(config, "weights", dtype="bfloat16")
    config = replace(config, "objective", kind=kind, density="shifted")
    config = replace(config, "optim", accumulate=2, schedule="cosine", warmup=1, weight_decay=0.1)
    config = replace(config, "run", remat="blocks")
    start = init_state(config, make_optimizer(config.optim, 3))
    metrics, state, _ = run_steps(config, jax.devices()[:1], steps=4)
    assert all(np.isfinite(list(found.values())).all() for found in metrics)
    moved = [not np.array_equal(state.params[name], start.params[name]) for name in start.params]
    assert np.mean(moved) > 0.9
    assert not np.array_equal(state.rest["high.stages.0.norm.mean"], start.rest["high.stages.0.norm.mean"])
    np.testing.assert_array_equal(
        state.rest["high.stages.0.filter.complex_weight"], start.rest["high.stages.0.filter.complex_weight"]
    )


def test_a_step_costs_at_most_twice_the_forward_pass(config):
    """By XLA's count, blocks laid out, nothing recomputed: no gradient of a frozen weight is ever computed."""
    dit = {"dim": 96, "ffn_dim": 384, "num_layers": 3, "num_heads": 2}
    config = replace(config, "dit", **dit) if config.memory.dim == 96 else _wider(config, dit)
    config = replace(config, "objective", kind="released", memory_dropout=0.1)
    networks, backbone, state, optimizer = _abstract_run(config)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), some_batch(config))

    def forward(params, rest, backbone, batch, sigma, noise):
        from ditmem_jax.models.ditmem import encode

        memory = encode(networks.encoder.merge(params | rest), batch)
        return errors(networks.dit.merge(backbone), memory, batch, sigma, noise, unroll=True).mean()

    step = make_train_step(config, networks, optimizer, unroll=True)
    inputs = jax.ShapeDtypeStruct((8,), jnp.float32), batch["latents"]
    forward = _flops(forward, state.params, state.rest, backbone, batch, *inputs)
    assert _flops(step, state, backbone, batch) <= 2.2 * forward


def _wider(config, dit):
    import dataclasses

    return dataclasses.replace(
        config, dit=dataclasses.replace(config.dit, **dit), memory=dataclasses.replace(config.memory, dim=dit["dim"])
    )


def _abstract_run(config):
    from flax import nnx

    from ditmem_jax.models.dit import DiT

    dit, backbone = abstract(lambda: DiT(config.dit, rngs=nnx.Rngs(0)))
    encoder, _ = abstract(lambda: make_encoder(config))
    optimizer = make_optimizer(config.optim, 10)
    return Networks(dit, encoder), backbone, jax.eval_shape(lambda: init_state(config, optimizer)), optimizer


def _flops(function, *inputs):
    return jax.jit(function).lower(*inputs).compile().cost_analysis()["flops"]
