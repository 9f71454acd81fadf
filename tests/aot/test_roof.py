"""Costs read from compiled programs, against XLA's count of the same program laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ditmem_jax.aot.roof import Program

SIZE, LAYERS = 64, 5


def product(x, weight):
    return jnp.tanh(x @ weight)


def convolution(x, weight):
    """With padding and strides, whose missing taps count as nothing."""
    y = x.reshape(1, SIZE // 8, 8, SIZE)
    kernel = weight[:36].reshape(3, 3, 4, SIZE)
    y = jax.lax.conv_general_dilated(
        y[..., :4], kernel, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.concatenate([y, y], axis=1).reshape(SIZE, SIZE)


@pytest.mark.parametrize("layer", [product, convolution])
def test_loops_count_as_often_as_they_run(layer):
    def program(x, weights, unroll):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights, unroll=unroll)[0]

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((SIZE, SIZE), (LAYERS, SIZE, SIZE)))
    x, weights = shapes
    looped, with_shardings = (
        jax.jit(program, static_argnums=2).lower(x, weights, unroll).compile() for unroll in (1, LAYERS)
    )
    cost = Program(looped.as_text()).cost()
    assert cost.operations == pytest.approx(with_shardings.cost_analysis()["flops"], rel=0.05)
    assert 1 <= cost.hbm_bytes / (4 * SIZE * SIZE * 3 * LAYERS) < 4


def test_collectives_of_a_loop_are_found_and_measured():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    whole, divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "fsdp")))

    def program(x, weights):
        gathered = lambda w: jax.lax.with_sharding_constraint(w, whole)  # noqa: E731
        return jax.lax.scan(lambda x, w: (x @ gathered(w), None), x, weights)[0]

    x = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32, sharding=whole)
    weights = jax.ShapeDtypeStruct((LAYERS, SIZE, SIZE), jnp.float32, sharding=divided)
    cost = Program(jax.jit(program).lower(x, weights).compile().as_text()).cost()
    sent = LAYERS * 4 * SIZE * SIZE * 7 / 8
    (kind, _), size = cost.collectives.most_common(1)[0]
    assert kind == "all-gather" and size == pytest.approx(sent)


def test_the_dearest_branch_counts():
    def program(high, x):
        return jax.lax.cond(high, lambda: x @ x, lambda: x @ (x @ x))

    x = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    compiled = jax.jit(program).lower(jax.ShapeDtypeStruct((), bool), x).compile()
    assert Program(compiled.as_text()).cost().operations == 2 * 2 * SIZE**3


def test_a_kernel_is_counted_by_its_shapes():
    text = """ENTRY %main (q: bf16[2,4096,128]) -> bf16[2,4096,128] {
  %q = bf16[2,4096,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,512,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %splash_mha_fwd_no_residuals.1 = bf16[2,4096,128]{2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={x={
  }}
  %other.1 = bf16[2,4096,128]{2,1,0} custom-call(%q), custom_call_target="tpu_custom_call"
}"""
    program = Program(text)
    cost = program.cost()
    assert cost.kernels == 4 * 2 * 4096 * 512 * 128
    rows, keys = (2 * 2 * n * 128 for n in (4096, 512))
    assert cost.hbm_bytes == (2 * rows + 2 * keys + 3 * 2 * keys) + 2 * rows
    assert list(program.uncounted) == ["other.1"]
    assert np.isfinite(cost.hbm_bytes)


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        # What starts names its operands and its results, of as many arrays as it combines.
        ("((f32[8], f32[2]), (f32[32], f32[8])) all-gather-start(%a, %b)", 4 * 40 * 3 / 4),
        ("(f32[8], f32[8], u32[], u32[]) collective-permute-start(%a)", 4 * (8 + 2)),
        ("(f32[8], f32[2]) all-reduce-start(%a, %b)", 4 * 10 * 2 * 3 / 4),
        ("(f32[8], f32[2]) all-reduce(%a, %b)", 4 * 10 * 2 * 3 / 4),
        ("f32[2] reduce-scatter(%a)", 4 * 2 * 3),
    ],
)
def test_what_a_chip_sends(line, sent):
    lines = ["  %a = f32[8] parameter(0)", "  %b = f32[2] parameter(1)"]
    lines.append(f"  ROOT %c = {line}, replica_groups={{{{0,1,2,3}}}}")
    text = "\n".join(["ENTRY %main (a: f32[8], b: f32[2]) -> f32[] {", *lines, "}"])
    assert Program(text).cost().collectives.total() == pytest.approx(sent)


# Of a stacked array a fusion reads one slice of 4 numbers, or writes one in its place; %p2 is added to it.
FUSIONS = """%read (p0: f32[5,4], p1: s32[], p2: f32[4]) -> f32[4] {
  %p0 = f32[5,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[4]{0} parameter(2)
  %c = s32[] constant(0)
  %s = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %c), dynamic_slice_sizes={1,4}
  %b = f32[4]{0} bitcast(%s)
  ROOT %a = f32[4]{0} add(%b, %p2)
}
%write (q0: f32[5,4], q1: s32[], q2: f32[1,4]) -> f32[5,4] {
  %q0 = f32[5,4]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[1,4]{1,0} parameter(2)
  %d = s32[] constant(0)
  ROOT %u = f32[5,4]{1,0} dynamic-update-slice(%q0, %q2, %q1, %d)
}
%whole (r0: f32[5,4], r1: bf16[5,4]) -> f32[5,4] {
  %r0 = f32[5,4]{1,0} parameter(0)
  %r1 = bf16[5,4]{1,0} parameter(1)
  %r2 = f32[5,4]{1,0} convert(%r1)
  ROOT %r3 = f32[5,4]{1,0} add(%r0, %r2)
}
ENTRY %main (x: f32[5,4]) -> f32[5,4] {
  %x = f32[5,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[4]{0} parameter(2)
  %z = f32[1,4]{1,0} parameter(3)
  %h = bf16[5,4]{1,0} parameter(4)
  %near = f32[5,4]{1,0:S(1)} parameter(5)
  ROOT %out = RESULT
}"""


@pytest.mark.parametrize(
    ("result", "moved"),
    [
        ("f32[4]{0} fusion(%x, %i, %y), kind=kLoop, calls=%read", 16 + 4 + 16 + 16),
        ("f32[5,4]{1,0} fusion(%x, %i, %z), kind=kLoop, calls=%write", 16 + 4 + 16),
        ("f32[5,4]{1,0} fusion(%x, %h), kind=kLoop, calls=%whole", 80 + 40 + 80),
        ("f32[5,4]{1,0:S(1)} fusion(%near, %h), kind=kLoop, calls=%whole", 40),  # the others are not in HBM
        ("f32[5,4]{1,0} add(%x, %near)", 80 + 80),
        ("f32[1,4]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,4}", 2 * 16),
        ("f32[5,4]{1,0} dynamic-update-slice(%x, %z, %i, %i)", 2 * 16),
        ("f32[5,4]{1,0} bitcast(%x)", 0),
    ],
)
def test_bytes_by_hand(result, moved):
    assert Program(FUSIONS.replace("RESULT", result)).cost().hbm_bytes == moved


def test_a_loop_by_hand():
    """Seven trips of a product of [2,3] and [3,3]: 2 x 2 x 3 x 3 operations, two inputs and an output of 4 bytes."""
    text = """%body (t: (s32[], f32[2,3], f32[3,3])) -> (s32[], f32[2,3], f32[3,3]) {
  %t = (s32[], f32[2,3], f32[3,3]) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %a = f32[2,3]{1,0} get-tuple-element(%t), index=1
  %w = f32[3,3]{1,0} get-tuple-element(%t), index=2
  %p = f32[2,3]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = (s32[], f32[2,3], f32[3,3]) tuple(%n, %p, %w)
}
%condition (c: (s32[], f32[2,3], f32[3,3])) -> pred[] {
  %c = (s32[], f32[2,3], f32[3,3]) parameter(0)
  %k = s32[] get-tuple-element(%c), index=0
  %seven = s32[] constant(7)
  ROOT %less = pred[] compare(%k, %seven), direction=LT
}
ENTRY %main (s: (s32[], f32[2,3], f32[3,3])) -> (s32[], f32[2,3], f32[3,3]) {
  %s = (s32[], f32[2,3], f32[3,3]) parameter(0)
  ROOT %l = (s32[], f32[2,3], f32[3,3]) while(%s), condition=%condition, body=%body
}"""
    cost = Program(text).cost()
    assert (cost.operations, cost.hbm_bytes) == (7 * 36, 7 * (24 + 36 + 24))
