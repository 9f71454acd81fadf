"""The kernels of attention against all scores at once: outputs, gradients, memory, and tokens on a ring of devices."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.config import MeshConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.attention import kernels
from ditmem_jax.models.attention import with_memory as attention_module
from ditmem_jax.models.attention.with_memory import _at_once, attention
from ditmem_jax.parallel.mesh import make_mesh

B, N, K = 2, 2, 8
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU and JAX_PLATFORMS=cuda")
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
BIASES = {
    "learned": [[0.3, -1.0, 2.0], [1.0, 0.0, -3.0]],
    "padded": [[0.0, -jnp.inf, 1.0], [-jnp.inf, -jnp.inf, 0.5]],
    "absent": [[-jnp.inf] * 3] * 2,
    "no rows": [[], []],
    "none": None,
}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(attention_module, "SMALL", 0)
    monkeypatch.setattr(kernels, "QUERIES", 4)
    interpreted = partial(kernels.splash.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(kernels.splash, "make_splash_mha_single_device", interpreted)


def rows(tokens, keys, bias, dtype="float32", batch=B):
    """Query, key, value, rows of a memory (or None), and a gradient of the output."""
    shapes = [(tokens, N, K), (keys, N, K), (keys, N, K), (tokens, N, K)]
    count = 0 if bias is None else len(bias[0])
    shapes += [(count, N, K)] * 2
    seeds = jax.random.split(jax.random.key(0), len(shapes))
    query, key, value, grad, *memory = (
        (2 * jax.random.normal(seed, (batch, *shape))).astype(dtype)
        for seed, shape in zip(seeds, shapes, strict=True)
    )
    memory = None if bias is None else (*memory, jnp.resize(jnp.array(bias, jnp.float32), (batch, count)))
    return query, key, value, memory, grad


def run(query, key, value, memory, **options):
    return attention(query, key, value, *(memory or ()), **options)


@partial(jax.jit, static_argnums=0)
def with_gradients(run, query, key, value, memory, grad):
    """The output, and the gradients of query, key, value and memory."""
    out, pull = jax.vjp(run, query, key, value, memory)
    return out, *pull(grad)


def expected(query, key, value, memory, grad):
    """In float32, all scores at once."""
    if memory is not None and memory[0].shape[1] == 0:
        _, *rest = expected(query, key, value, None, grad)
        return expected(query, key, value, None, grad)[0], *rest[:3], memory
    full = jax.tree.map(lambda x: x.astype(jnp.float32), (query, key, value, memory, grad))
    return with_gradients(_at_once, *full)


def assert_close(found, wanted, dtype="float32"):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = max(1.0, float(jnp.abs(y).max(initial=0)))
        np.testing.assert_allclose(x.astype(jnp.float32) / scale, y / scale, atol=TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    "backend, dtype, tokens, keys",
    [
        *itertools.product(["xla", "splash"], TOLERANCE, [9], [6]),
        pytest.param("cudnn", "bfloat16", 9, 6, marks=on_gpu),
        pytest.param("cudnn", "bfloat16", 520, 300, marks=on_gpu),
    ],
)
def test_outputs_and_gradients(backend, dtype, tokens, keys, bias):
    inputs = rows(tokens, keys, BIASES[bias], dtype)
    found = with_gradients(partial(run, backend=backend), *inputs)
    assert found[0].dtype == jnp.dtype(dtype)
    assert_close(found, expected(*inputs), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, mesh, batch",
    [
        ("xla", dict(data=1, context=4, tensor=2), 2),
        ("xla", dict(data=2, fsdp=2, context=2), 4),
        ("xla", dict(data=4, tensor=2), 3),
        ("splash", dict(data=2, context=4), 2),
    ],
)
@pytest.mark.parametrize("ring", [True, False], ids=["ring", "whole keys"])
def test_a_mesh_changes_nothing(backend, mesh, batch, ring):
    inputs = rows(8, 8 if ring else 5, BIASES["padded"], batch=batch)
    mesh = make_mesh(MeshConfig(**mesh))
    with jax.set_mesh(mesh):
        found = with_gradients(partial(run, backend=backend, ring=ring), *inputs)
    assert_close(found, expected(*inputs))


def test_tokens_that_no_ring_divides():
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=8))), pytest.raises(UserError, match="9 tokens"):
        run(*rows(9, 9, None)[:4], ring=True)


@pytest.mark.parametrize(
    "policy", [None, jax.checkpoint_policies.dots_saveable], ids=["plain", "products kept"]
)
def test_scores_never_exist_in_full(policy):
    inputs = jax.eval_shape(lambda: rows(512, 512, BIASES["learned"]))
    step = run if policy is None else jax.checkpoint(run, policy=policy)
    memory = jax.jit(partial(with_gradients, step)).lower(*inputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < B * N * 512 * 512 * 4 / 4


def test_cudnn_is_given_the_union(monkeypatch):
    """Lowered for GPUs: the backward kernel takes log-sum-exp and output of the union, and nothing is a bias."""
    monkeypatch.setattr(kernels.cudnn, "check_cudnn_version", lambda: 91000)
    inputs = rows(8, 8, BIASES["learned"], "bfloat16")
    step = jax.jit(partial(with_gradients, partial(run, backend="cudnn")))
    text = step.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    forward, backward = (line for line in text.splitlines() if "@__cudnn" in line and "custom_call" in line)
    assert "fmhaSoftmax(" in forward
    assert "fmhaSoftmaxBackward(" in backward


@pytest.mark.parametrize(
    "choice, platform, dtype, backend",
    [
        ("auto", "cpu", "bfloat16", "xla"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "gpu", "float32", "xla"),
        ("auto", "tpu", "float32", "splash"),
        ("xla", "tpu", "float32", "xla"),
    ],
)
def test_the_backend_of_a_device(choice, platform, dtype, backend):
    assert kernels.resolve(choice, platform, dtype, head_dim=128) == backend


@pytest.mark.parametrize("choice, platform", [("splash", "gpu"), ("cudnn", "cpu"), ("cudnn", "gpu")])
def test_backends_that_a_device_has_not(choice, platform):
    with pytest.raises(UserError, match=choice):
        kernels.resolve(choice, platform, "float32", head_dim=128)


def test_tiles_waste_little():
    for tokens in (32_760, 32_760 // 8, 75_600, 75_600 // 16):
        assert -(-tokens // kernels.tile(tokens)) * kernels.tile(tokens) < 1.1 * tokens
    assert kernels.tile(512) == 512
