"""Every kind of optimiser: that it descends, its rate over a run, what it clips and decays, how it accumulates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ditmem_jax.config import OptimConfig
from ditmem_jax.errors import UserError
from ditmem_jax.train.optimizer import (
    OPTIMIZERS,
    check_updates,
    make_optimizer,
    matrices,
    rate_of_step,
)

KINDS = list(OPTIMIZERS)
SHAPES = {"conv.kernel": (2, 1, 1, 4, 8), "conv.bias": (8,), "norm.scale": (8,)}


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}


def take(optimizer, params, gradients):
    """Parameters after a step for each of `gradients`, functions of them."""

    @jax.jit
    def step(gradient, state, params):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in gradients:
        params, state = step(gradient(params), state, params)
    return params


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_bring_every_array_nearer_to_the_least_of_a_quadratic(kind):
    goal, start = arrays(1), arrays(2)
    optimizer = make_optimizer(OptimConfig(kind, learning_rate=0.1, clip=0.0), 20)
    end = take(optimizer, start, 20 * [lambda params: jax.tree.map(jnp.subtract, params, goal)])
    for path in SHAPES:
        assert np.linalg.norm(end[path] - goal[path]) < 0.9 * np.linalg.norm(start[path] - goal[path]), path


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_alone_decay_by_rate_times_decay(kind):
    start = arrays(3)
    config = OptimConfig(kind, learning_rate=0.1, weight_decay=0.5)
    end = take(make_optimizer(config, 10), start, [lambda params: jax.tree.map(jnp.zeros_like, params)])
    for path, x in start.items():
        factor = 0.95 if path == "conv.kernel" else 1.0
        np.testing.assert_allclose(end[path], factor * x, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_make_one_update_with_their_mean(kind):
    start, first, second = arrays(4), arrays(5), arrays(6)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    options = dict(learning_rate=0.1, weight_decay=0.1)
    twice, once = (make_optimizer(OptimConfig(kind, accumulate=n, **options), 4) for n in (2, 1))
    for path, x in take(twice, start, [lambda _: first]).items():
        np.testing.assert_array_equal(x, start[path])
    got = take(twice, start, [lambda _: first, lambda _: second])
    want = take(once, start, [lambda _: mean])
    for path in SHAPES:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_adamw_is_that_of_optax_to_the_last_bit():
    start, gradients = arrays(7), [lambda _, seed=seed: arrays(seed) for seed in range(8, 12)]
    config = OptimConfig("adamw", learning_rate=0.01, weight_decay=0.1, b1=0.8, b2=0.95, clip=1.5)
    rule = optax.adamw(0.01, 0.8, 0.95, weight_decay=0.1, mask=matrices)
    want = take(optax.chain(optax.clip_by_global_norm(1.5), rule), start, gradients)
    for path, x in take(make_optimizer(config, 4), start, gradients).items():
        np.testing.assert_array_equal(x, want[path])


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(UserError, match=r"one of: adamw(.|\n)*'adam'"):
        make_optimizer(OptimConfig("adam"), 1)


def rates(steps, kind="adamw", **values):
    """The rate of every update of a run of `steps` steps, as a share of the highest, and the steps with one.

    Read off the sizes of updates under one gradient, against those at a constant rate.
    """
    options = dict(kind=kind, learning_rate=0.1, accumulate=values.pop("accumulate", 1))
    sizes = []
    for config in (OptimConfig(**options, **values), OptimConfig(**options)):
        optimizer, params, sizes_of_one = make_optimizer(config, steps), arrays(0), []
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for _ in range(steps):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = update(arrays(1), state, params)
            sizes_of_one.append(np.linalg.norm(updates["conv.kernel"]))
        sizes.append(np.array(sizes_of_one))
    updates = np.flatnonzero(sizes[1])
    return (sizes[0][updates] / sizes[1][updates]).tolist(), (updates + 1).tolist()


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon"])
def test_a_cosine_falls_to_zero_over_a_run(kind):
    found, _ = rates(8, kind, schedule="cosine")
    expected = [(1 + np.cos(np.pi * t / 8)) / 2 for t in range(8)]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert found[-1] < 0.05


def test_a_warmup_rises_evenly_and_a_cosine_begins_after_it():
    cosine = [(1 + np.cos(np.pi * t / 4)) / 2 for t in range(4)]
    np.testing.assert_allclose(
        rates(8, warmup=4, schedule="cosine")[0], [0, 1 / 4, 2 / 4, 3 / 4, *cosine], rtol=1e-3
    )
    np.testing.assert_allclose(rates(6, warmup=4)[0], [0, 1 / 4, 2 / 4, 3 / 4, 1, 1], rtol=1e-3)


def test_schedules_count_updates_where_gradients_are_accumulated():
    found, steps = rates(12, accumulate=3, warmup=2, schedule="cosine")
    assert steps == [3, 6, 9, 12]
    np.testing.assert_allclose(found, [0, 1 / 2, 1, 1 / 2], rtol=1e-3)


def test_gradients_are_clipped_to_a_norm_of_all_arrays_together():
    """After one of norm 1, one of norm 50 counts as one of norm 2 and one of norm 1 as itself; 0 clips nothing."""
    first = jax.tree.map(lambda x: x / optax.global_norm(arrays(8)), arrays(8))
    direction = jax.tree.map(lambda x: x / optax.global_norm(arrays(9)), arrays(9))

    def after(norm, clip):
        second = jax.tree.map(lambda x: norm * x, direction)
        optimizer = make_optimizer(OptimConfig(learning_rate=0.1, clip=clip), 2)
        return take(optimizer, arrays(3), [lambda _: first, lambda _: second])["conv.kernel"]

    np.testing.assert_allclose(after(50, 2.0), after(2, 2.0), rtol=1e-5)
    np.testing.assert_allclose(after(1, 2.0), after(1, 0.0), rtol=1e-5)
    assert np.abs(after(50, 0.0) - after(2, 0.0)).max() > 1e-3
    assert np.abs(after(50, 2.0) - after(50, 1.0)).max() > 1e-3


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


@pytest.mark.parametrize(
    ("options", "steps", "warned"),
    [
        (dict(), 1, ""),
        (dict(accumulate=3), 6, ""),
        (dict(accumulate=3), 7, "the last 1 of 7 steps make no update"),
        (dict(warmup=4), 5, ""),
        (dict(warmup=5), 5, "ends within its warm-up"),
        (dict(warmup=2, accumulate=3), 6, "ends within its warm-up"),
    ],
)
def test_a_run_whose_steps_do_not_fit_its_updates_is_warned_of(options, steps, warned, capsys):
    check_updates(OptimConfig(**options), steps)
    told = capsys.readouterr().err
    assert warned in told and bool(warned) == bool(told)


def test_a_run_without_an_update_is_refused():
    with pytest.raises(UserError, match="trains nothing"):
        check_updates(OptimConfig(accumulate=8), 7)


def test_the_rate_of_a_step_is_that_of_its_update():
    config = OptimConfig(learning_rate=0.5, warmup=2, accumulate=2)
    assert [rate_of_step(config, 8, step) for step in range(1, 7)] == [0, 0, 0.25, 0.25, 0.5, 0.5]


def test_a_state_has_one_form_whatever_may_change():
    """So that a run goes on with other rates, schedules, decays and clips."""
    options = (
        dict(),
        dict(
            schedule="cosine",
            warmup=1,
            learning_rate=0.1,
            weight_decay=0.1,
            clip=0.0,
            b1=0.5,
            b2=0.5,
            gate_rate=3.0,
        ),
    )
    for kind in OPTIMIZERS:
        one, other = (
            jax.eval_shape(make_optimizer(OptimConfig(kind, **x), 4).init, arrays(0)) for x in options
        )
        assert jax.tree.structure(one) == jax.tree.structure(other)
