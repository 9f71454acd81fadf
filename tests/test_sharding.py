"""Meshes and what is divided over them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from ditmem_jax.config import MeshConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.dit import DiT
from ditmem_jax.models.state import abstract
from ditmem_jax.presets import DIT_PRESETS
from ditmem_jax.sharding import array_sharding, batch_sharding, check_batch_size, make_mesh, tree_shardings


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
        MeshConfig(data=-1, fsdp=-1),
        MeshConfig(data=0),
        MeshConfig(data=4),
    ],
)
def test_impossible_meshes_show_their_arithmetic(config):
    with pytest.raises(UserError, match=rf"data {config.data} x fsdp {config.fsdp} x context 1 x tensor 1"):
        make_mesh(config)


def test_batch_is_divided_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    assert batch_sharding(mesh).shard_shape((16, 3)) == (2, 3)
    check_batch_size(mesh, 16)
    with pytest.raises(UserError, match=r"data 4 x fsdp 2 = 8"):
        check_batch_size(mesh, 12)


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
    assert array_sharding(path, shape, mesh).spec == spec


def test_nearly_all_of_a_large_transformer_is_divided():
    _, shapes = abstract(lambda: DiT(DIT_PRESETS["wan2.1-t2v-14b"], rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    shardings = tree_shardings(shapes, mesh)
    total = sum(x.size for x in shapes.values())
    per_device = sum(
        jnp.prod(jnp.array(shardings[k].shard_shape(x.shape), jnp.float32)) for k, x in shapes.items()
    )
    assert per_device < 1.02 * total / 8
