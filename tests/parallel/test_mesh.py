"""Meshes and what is divided over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from ditmem_jax.config import MeshConfig
from ditmem_jax.config.presets import DIT_PRESETS
from ditmem_jax.errors import UserError
from ditmem_jax.models.placement import sharding_for, tree_shardings
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.parallel.mesh import (
    _gather,
    all_gather_to_host,
    batch_sharding,
    check_mesh,
    constrain,
    make_mesh,
    shard,
)
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=4, fsdp=2), (4, 2, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1, 1)),
    ],
)
def test_mesh_takes_all_devices(config, shape):
    assert tuple(make_mesh(config).shape.values()) == shape


def test_one_device_is_a_mesh_like_any_other():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=-1, fsdp=3),
        MeshConfig(data=4),
    ],
)
def test_impossible_meshes_show_their_arithmetic(config):
    with pytest.raises(UserError, match=rf"data {config.data} x fsdp {config.fsdp} x context 1 x tensor 1"):
        make_mesh(config)


def test_batch_is_divided_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    assert batch_sharding(mesh).shard_shape((16, 3)) == (2, 3)


@pytest.mark.parametrize(
    ("mesh", "batch", "message"),
    [
        (MeshConfig(data=4, fsdp=2), 12, r"data 4 x fsdp 2 = 8(.|\n)*use 16"),
        (MeshConfig(data=1, context=8), 1, r"3 x 2 x 2 = 12(.|\n)*12 / 8 = 1.50(.|\n)*give context 1, 2, 4"),
        (MeshConfig(data=1, tensor=8), 1, r"a divisor of 4(.|\n)*4 / 8 = 0.50(.|\n)*give tensor 1, 2, 4"),
    ],
)
def test_what_does_not_divide_is_refused_with_its_arithmetic(mesh, batch, message):
    config, mesh = tiny_config("nowhere"), make_mesh(mesh)
    check_mesh(config, make_mesh(MeshConfig(data=2, context=2, tensor=2)), 16)
    with pytest.raises(UserError, match=message):
        check_mesh(config, mesh, batch)


def test_gathering_the_same_shapes_again_compiles_nothing(compilations):
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    tree = {"batch": np.arange(16.0).reshape(8, 2), "bias": np.arange(8.0)}
    sharded = {name: shard(mesh, x, "batch", *[None] * (x.ndim - 1)) for name, x in tree.items()}
    hosted = [all_gather_to_host(sharded, mesh) for _ in range(10)]
    assert not compilations  # all devices are of this process: nothing is gathered
    gathered = [
        _gather(make_mesh(MeshConfig(data=4, fsdp=2)))(sharded) for _ in range(10)
    ]  # as many processes do
    assert len(compilations) == 1
    for found in (*hosted, *gathered):
        jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert gathered[0]["batch"].is_fully_replicated


def test_constraints_are_those_of_the_mesh_around():
    x = jnp.zeros((4, 6, 3))
    assert constrain(x, "batch", "tokens", None) is x
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, context=2))):
        divided = jax.jit(lambda x: constrain(x, "batch", "tokens", None))(x)
        odd = jax.jit(lambda x: constrain(x, "batch", "tokens", None))(x[:2, :5])
    assert divided.sharding.shard_shape(x.shape) == (1, 3, 3)
    assert odd.sharding.shard_shape((2, 5, 3)) == (1, 5, 3)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("dit.blocks.self_attention.q.kernel", (2, 8, 4), P(None, "fsdp", "tensor")),
        ("dit.blocks.self_attention.o.kernel", (2, 8, 4), P(None, "tensor", "fsdp")),
        ("dit.blocks.feed_forward.up.bias", (2, 4), P(None, "tensor")),
        ("high.stages.0.conv.kernel", (3, 3, 3, 4, 16), P(None, None, None, None, "fsdp")),
        ("optimizer.1.mu.high.stages.0.conv.kernel", (3, 3, 3, 4, 16), P(None, None, None, None, "fsdp")),
        ("dit.blocks.self_attention.q.kernel", (2, 7, 4), P(None, None, "tensor")),
        ("step", (), P()),
    ],
)
def test_rules(path, shape, spec):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert sharding_for(path, shape, mesh).spec == spec


def test_devices_that_share_a_clip_share_the_weights():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    assert sharding_for("blocks.q.kernel", (2, 8, 4), mesh).shard_shape((2, 8, 4)) == (2, 2, 4)
    assert sharding_for("blocks.q.kernel", (2, 6, 4), mesh).shard_shape((2, 6, 4)) == (2, 3, 4)


def test_nearly_all_of_a_large_transformer_is_divided():
    _, shapes = abstract(lambda: DiT(DIT_PRESETS["wan2.1-t2v-14b"], rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    shardings = tree_shardings(shapes, mesh)
    total = sum(x.size for x in shapes.values())
    per_device = sum(
        jnp.prod(jnp.array(shardings[k].shard_shape(x.shape), jnp.float32)) for k, x in shapes.items()
    )
    assert per_device < 1.02 * total / 8
