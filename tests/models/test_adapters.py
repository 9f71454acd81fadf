"""Low-rank adapters: exact at the start, merged as applied, differentiated alone, divided over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.config import AdapterConfig, MeshConfig
from ditmem_jax.config.presets import DIT_PRESETS
from ditmem_jax.errors import UserError
from ditmem_jax.models import adapters as lora
from ditmem_jax.models.layers import FeedForward, Linear
from ditmem_jax.models.placement import sharding_for
from ditmem_jax.models.quantised import Int8Linear, from_int8, to_int8
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.parallel.mesh import make_mesh
from tests.tiny import random_arrays

KINDS = ["float32", "bfloat16", "int8"]
ADAPTER = AdapterConfig(
    rank=4, alpha=6.0, targets=("up", "down")
)  # a factor of 1.5, so that leaving it out shows

X = np.random.default_rng(0).standard_normal((2, 5, 48)).astype(np.float32)


class Stack(nnx.Module):
    """Stacked and scanned feed-forward blocks: compiles much faster than a transformer."""

    def __init__(self, kind):
        options = dict(linear=Int8Linear if kind == "int8" else Linear, dtype=dtype_of(kind))
        self.blocks = nnx.vmap(lambda rngs: FeedForward(48, 64, 48, rngs=rngs, **options))(
            nnx.Rngs(0).split(3)
        )

    def __call__(self, x, remat=False):
        graph, layers = nnx.split(self.blocks)

        def block(x, layer):
            return x + nnx.merge(graph, layer)(x).astype(x.dtype), None

        return jax.lax.scan(jax.checkpoint(block) if remat else block, x, layers)[0]


def dtype_of(kind):
    return jnp.float32 if kind == "float32" else jnp.bfloat16


@functools.cache
def base(kind):
    """Structure and random arrays of a network whose weights are held in this way."""
    structure, shapes = abstract(lambda: Stack(kind))
    arrays = {}
    for path, x in shapes.items():
        if x.dtype == jnp.int8:
            kernel = random_arrays({path: jax.ShapeDtypeStruct(x.shape, jnp.float32)})[path]
            arrays[path], arrays[path.replace("kernel", "scale")] = to_int8(kernel)
        elif path not in arrays:
            arrays[path] = random_arrays({path: x})[path]
    return structure, {path: jnp.asarray(x, shapes[path].dtype) for path, x in arrays.items()}


@functools.cache
def adapted(kind):
    """Structure with places for adapters, the frozen arrays, and adapters at their start."""
    structure, arrays = base(kind)
    structure, shapes = lora.attach(structure, ADAPTER)
    return structure, arrays, lora.init(shapes, jax.random.key(0))


def trained(adapters):
    """Adapters that are no longer at their start."""
    return {path: 0.5 * jnp.asarray(x) for path, x in random_arrays(adapters, seed=1).items()}


def compiled(function):
    """As written: XLA may else leave out roundings to bfloat16 between two operations, other ones in each program."""
    return jax.jit(function, compiler_options={"xla_allow_excess_precision": False})


def run(structure, arrays):
    return compiled(lambda arrays: structure.merge(arrays)(X))(arrays)


def distance(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def full(arrays, layer):
    """The matrices of a layer in float32, however they are held."""
    kernel = arrays[f"{layer}.kernel"]
    if kernel.dtype == jnp.int8:
        kernel = from_int8(jnp.asarray(kernel), jnp.asarray(arrays[f"{layer}.scale"]))
    return np.asarray(kernel, np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_to_the_last_bit(kind):
    structure, arrays, adapters = adapted(kind)
    np.testing.assert_array_equal(run(structure, arrays | adapters), run(base(kind)[0], arrays))
    merged = lora.merge(arrays, adapters, ADAPTER)
    assert merged.keys() == arrays.keys()
    for path, x in arrays.items():
        assert merged[path].dtype == x.dtype
        assert np.asarray(merged[path]).tobytes() == np.asarray(x).tobytes(), path


def test_a_is_drawn_as_in_peft_and_b_is_zero():
    _, _, adapters = adapted("float32")
    a = np.asarray(adapters["blocks.up.lora.a"])
    assert a.shape == (3, 48, 4) and len(np.unique(a)) > 0.99 * a.size
    assert 0.9 * 48**-0.5 < np.abs(a).max() <= 48**-0.5
    assert np.std(a) == pytest.approx((3 * 48) ** -0.5, rel=0.1)
    assert not np.asarray(adapters["blocks.up.lora.b"]).any()


def test_merging_nothing_keeps_the_sign_of_zero():
    adapters = {"q.lora.a": np.ones((2, 1), np.float32), "q.lora.b": np.zeros((1, 2), np.float32)}
    kernel = np.array([[-0.0, 0.0], [1.0, -2.0]], np.float32)
    merged = lora.merge({"q.kernel": kernel}, adapters, AdapterConfig(rank=1))
    assert merged["q.kernel"].tobytes() == kernel.tobytes()


def test_a_merged_matrix_by_hand():
    adapters = {
        "q.lora.a": np.array([[1.0, 1.0], [2.0, 0.0]], np.float32),
        "q.lora.b": np.array([[10.0, 20.0, 30.0], [2.0, 2.0, 2.0]], np.float32),
    }
    merged = lora.merge({"q.kernel": np.ones((2, 3), np.float32)}, adapters, AdapterConfig(rank=2, alpha=1.0))
    np.testing.assert_array_equal(merged["q.kernel"], [[7, 12, 17], [11, 21, 31]])  # 1 + A B / 2


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_applied(kind):
    """To float32's rounding; in fewer bits each merged weight is the nearest that its dtype has to W + A B."""
    structure, arrays, adapters = adapted(kind)
    adapters = trained(adapters)
    merged = lora.merge(arrays, adapters, ADAPTER)
    for layer in lora.adapted_layers(adapters):
        a, b = (np.asarray(adapters[f"{layer}.lora.{part}"], np.float64) for part in "ab")
        wanted, found = full(arrays, layer) + 1.5 * a @ b, full(merged, layer)
        rounding = {"float32": 2**-23, "bfloat16": 2**-8}.get(kind, 0) * np.abs(wanted)
        if kind == "int8":  # half a step of the grid, which a group of inputs has by its largest weight
            groups = np.abs(wanted).reshape(3, arrays[f"{layer}.scale"].shape[1], -1, wanted.shape[-1])
            rounding = np.broadcast_to(groups.max(2, keepdims=True), groups.shape).reshape(wanted.shape)
            rounding = rounding / 127 * 0.503
        assert (np.abs(found - wanted) <= rounding + 1e-7).all()
    applied = run(structure, arrays | adapters)
    tolerance = {"float32": 1e-6, "bfloat16": 0.01, "int8": 0.02}[kind]
    assert distance(run(base(kind)[0], merged), applied) <= tolerance
    assert distance(run(base(kind)[0], arrays), applied) > 0.1


@pytest.mark.parametrize(("kind", "remat"), [("float32", False), ("bfloat16", True), ("int8", True)])
def test_gradients_reach_a_and_b_as_they_would_through_the_merged_matrix(kind, remat):
    """dA = s G B^T and dB = s A^T G, where G is the gradient of the merged W in float32, without adapters."""
    structure, arrays, adapters = adapted(kind)
    adapters = trained(adapters)

    def gradient(structure, arrays, frozen, remat=False):
        def loss(arrays):
            return jnp.square(structure.merge(frozen | arrays)(X, remat)).mean()

        return compiled(jax.grad(loss))(arrays)

    found = gradient(structure, adapters, arrays, remat)
    assert found.keys() == adapters.keys()

    layers = lora.adapted_layers(adapters)
    wide = {path: x.astype(jnp.float32) for path, x in arrays.items() if not path.endswith("scale")}
    wide |= {f"{layer}.kernel": full(arrays, layer) for layer in layers}
    merged = lora.merge(wide, adapters, ADAPTER)
    through = gradient(base("float32")[0], merged, {})
    for layer in layers:
        a, b = (np.asarray(adapters[f"{layer}.lora.{part}"]) for part in "ab")
        g = 1.5 * np.asarray(through[f"{layer}.kernel"])
        for part, wanted in (("a", g @ b.swapaxes(1, 2)), ("b", a.swapaxes(1, 2) @ g)):
            assert found[f"{layer}.lora.{part}"].dtype == jnp.float32
            assert distance(found[f"{layer}.lora.{part}"], wanted) < (1e-5 if kind == "float32" else 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_rules_divide_a_and_b_over_a_mesh(kind):
    structure, arrays, adapters = adapted(kind)
    adapters, mesh = trained(adapters), make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    placed = {
        path: jax.device_put(x, sharding_for(f"dit.{path}", x.shape, mesh))
        for path, x in (arrays | adapters).items()
    }
    with jax.set_mesh(mesh):
        found = run(structure, placed)
    assert distance(found, run(structure, arrays | adapters)) <= (1e-6 if kind == "float32" else 0.01)
    merged = lora.merge({path: placed[path] for path in arrays}, adapters, ADAPTER)
    assert all(x.sharding == placed[path].sharding for path, x in merged.items())


@pytest.mark.parametrize(
    ("layer", "a", "b"),
    [
        ("self_attention.q", (12, 4), (4, 24)),
        ("cross_attention.o", (24, 4), (4, 12)),
        ("feed_forward.up", (12, 4), (4, 24)),
        ("feed_forward.down", (24, 4), (4, 12)),
    ],
)
def test_a_is_divided_like_inputs_and_b_like_outputs(layer, a, b):
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    for part, shape, wanted in (("a", (3, 48, 4), a), ("b", (3, 4, 48), b)):
        for prefix in ("dit.", "optimizer.0.mu.dit."):  # its moments lie where it does
            sharding = sharding_for(f"{prefix}blocks.{layer}.lora.{part}", shape, mesh)
            assert sharding.shard_shape(shape) == (3, *wanted)


def test_the_transformer_is_adapted_in_the_projections_of_both_attentions():
    structure, shapes = abstract(lambda: DiT(DIT_PRESETS["wan2.1-t2v-1.3b"], rngs=nnx.Rngs(0)))
    structure, adapters = lora.attach(structure, AdapterConfig())
    assert lora.adapted_layers(adapters) == [
        f"blocks.{part}_attention.{name}" for part in ("cross", "self") for name in "koqv"
    ]
    assert {x.shape for path, x in adapters.items() if path.endswith("a")} == {(30, 1536, 16)}
    assert abstract(lambda: structure.merge(shapes | adapters))[1] == shapes | adapters


def test_what_does_not_fit_is_named():
    structure, arrays = base("float32")
    _, _, adapters = adapted("float32")
    with pytest.raises(UserError, match=r"'self_attn.q'(.|\n)*blocks.down, blocks.up"):
        lora.attach(structure, AdapterConfig(targets=("up", "self_attn.q")))
    with pytest.raises(UserError, match=r"rank 8(.|\n)*A \[3, 64, 4\]"):
        lora.merge(arrays, adapters, AdapterConfig(rank=8))
    with pytest.raises(UserError, match=r"blocks.ups.kernel(.|\n)*blocks.up.kernel"):
        lora.merge(arrays, {path.replace("up", "ups"): x for path, x in adapters.items()}, ADAPTER)
    with pytest.raises(UserError, match=r"adapter.rank"):
        AdapterConfig(rank=0)
    with pytest.raises(UserError, match=r"adapter.targets(.|\n)*up\["):
        AdapterConfig(targets=("up[",))
