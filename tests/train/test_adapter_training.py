"""Adapters in the training step: they and what is to train change, the transformer and the rest do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.config import AdapterConfig, ExpertsConfig, MeshConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.adapters import adapted_layers
from ditmem_jax.models.placement import place_on, tree_shardings
from ditmem_jax.models.quantised import to_int8
from ditmem_jax.models.state import abstract
from ditmem_jax.parallel.mesh import batch_sharding, make_mesh
from ditmem_jax.storage.weights import new_dit
from ditmem_jax.train.optimizer import make_optimizer
from ditmem_jax.train.setup import check
from ditmem_jax.train.step import describe, init_state, jit_train_step, make_networks
from ditmem_jax.types import Batch, Compute, Conditioning
from tests.tiny import random_arrays, replace, tiny_config

ONE = MeshConfig()
EIGHT = MeshConfig(fsdp=2, context=2, tensor=2)


def some_config(trains, dtype):
    config = replace(tiny_config("nowhere"), "objective", trains=trains, kind="relative")
    config = replace(config, "optim", learning_rate=1e-2, weight_decay=0.1)
    config = replace(config, "weights", dtype=dtype)
    return dataclasses.replace(config, adapter=AdapterConfig(rank=4, alpha=8.0))


def frozen(config, compute):
    """Structure and random weights of a transformer."""
    structure, shapes = abstract(lambda: new_dit(config, compute=compute))
    arrays = random_arrays(shapes)
    for path in [path for path, x in shapes.items() if x.dtype == jnp.int8]:
        kernel = random_arrays({path: jax.ShapeDtypeStruct(shapes[path].shape, jnp.float32)})[path]
        arrays[path], arrays[path.replace("kernel", "scale")] = to_int8(kernel)
    return structure, {path: np.asarray(jnp.asarray(x, shapes[path].dtype)) for path, x in arrays.items()}


def some_batch(config, size=8):
    rng = np.random.default_rng(0)
    grid = (*config.memory.latent_grid, config.vae.z_dim)
    return Batch(
        rng.standard_normal((size, *grid), np.float32),
        Conditioning(rng.standard_normal((size, config.dit.text_len, config.dit.text_dim), np.float32)),
        rng.standard_normal((size, config.data.references, *grid), np.float32),
        np.ones((size, config.data.references), bool),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trains", "dtype", "remat", "mesh"),
    [("adapter", "float32", "none", ONE), ("both", "int8", "attention", EIGHT)],
    ids=["adapter", "both, 8 bits, on a mesh"],
)
def test_what_is_to_train_changes_and_nothing_else(trains, dtype, remat, mesh):
    config, steps = some_config(trains, dtype), 12 if trains == "adapter" else 3
    mesh = make_mesh(mesh, jax.devices() if mesh == EIGHT else jax.devices()[:1])
    structure, weights = frozen(config, Compute(remat=remat))
    networks, optimizer = make_networks(config, structure), make_optimizer(config.optim, steps)
    start = jax.device_get(jax.jit(lambda: init_state(config, optimizer))())
    layers = [f"dit.blocks.{part}_attention.{name}" for part in ("cross", "self") for name in "koqv"]
    lora = {path for path in start.params if path.startswith("dit.")}
    assert adapted_layers(lora) == layers
    assert (start.params.keys() == lora) == (trains == "adapter")

    with jax.set_mesh(mesh):
        state = jax.device_put(start, tree_shardings(start, mesh))
        backbone = {path: place_on(mesh, "dit")(path, x) for path, x in weights.items()}
        batch = jax.device_put(some_batch(config), batch_sharding(mesh))
        step, gains = jit_train_step(config, networks, optimizer, mesh), []
        for _ in range(steps):
            state, metrics = step(state, backbone, batch)
            assert np.isfinite(list(map(float, metrics.values()))).all()
            gains.append(float(metrics["gain"]))
    for path, x in backbone.items():
        assert np.asarray(x).tobytes() == weights[path].tobytes(), path
    still = [path for path, x in state.params.items() if np.array_equal(x, start.params[path])]
    assert still in ([], ["self_attention.k.bias"])  # a bias of all keys changes no softmax
    if trains == "adapter":
        assert gains[0] == 0 and gains[-1] > 0.05, gains  # against the transformer without adapters
    if mesh.size > 1:
        a = state.params["dit.blocks.self_attention.q.lora.a"]
        assert (a.addressable_shards[0].data.shape, a.dtype) == ((2, 12, 4), jnp.float32)


def test_a_run_says_what_trains():
    config = some_config("adapter", "float32")
    _, weights = frozen(config, Compute())
    state = jax.eval_shape(lambda: init_state(config, make_optimizer(config.optim, 1)))
    size = sum(x.size for x in weights.values())
    assert f"trained {2 * 8 * 2 * 48 * 4:,}" in describe(weights, state)
    assert f"frozen {size:,}" in describe(weights, state)


def test_a_run_refuses_to_train_an_adapter():
    with pytest.raises(UserError, match=r"objective.trains 'memory'"):
        check(some_config("both", "float32"), make_mesh(MeshConfig()), [])


def test_an_adapter_is_of_one_expert():
    config = some_config("adapter", "float32")
    with pytest.raises(UserError, match="adapter is of one transformer"):
        dataclasses.replace(config, experts=ExpertsConfig(boundary=0.875))
    dataclasses.replace(config, experts=ExpertsConfig(boundary=0.875, trains="high"))
