"""Every kind of optimiser: that it descends, what it decays and how it accumulates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ditmem_jax.config import OptimConfig
from ditmem_jax.errors import UserError
from ditmem_jax.train.optimizer import OPTIMIZERS, make_optimizer, matrices

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
