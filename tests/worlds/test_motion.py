"""Motions against numbers worked out by hand, conserved quantities and brute-force integration."""

import numpy as np
import pytest

from ditmem_jax.worlds.motion import collision, fall, pendulum, pendulum_period, slide, spring, throw


def at(*times: float) -> np.ndarray:
    return np.array(times, float)


def test_fall_and_bounces():
    # From 3 m to 1 m at 4 m/s^2: lands after 1 s at 4 m/s, leaves at 2 m/s, is back 1 s later.
    path = fall(at(0, 0.5, 1, 1.5, 2, 2.25, 2.5, 60), x=1.5, y=3.0, rest=1.0, gravity=4.0, bounciness=0.5)[
        :, 0
    ]
    np.testing.assert_allclose(path[:, 1], [3, 2.5, 1, 1.5, 1, 1.125, 1, 1], atol=1e-12)
    np.testing.assert_array_equal(path[:, 0], 1.5)


@pytest.mark.parametrize("bounciness", [0.3, 0.6, 0.95])
def test_bounce_height_is_bounciness_squared(bounciness):
    path = fall(np.linspace(0, 3, 30_001), x=0.0, y=2.0, rest=0.0, gravity=9.0, bounciness=bounciness)[
        :, 0, 1
    ]
    landing = np.sqrt(2 * 2 / 9)
    first_bounce = path[(np.linspace(0, 3, 30_001) > landing)]
    assert first_bounce.max() / 2 == pytest.approx(bounciness**2, rel=1e-5)


def test_throw_matches_integration_and_stays_where_it_lands():
    known = {"x": 0.7, "y": 2.0, "rest": 0.8, "vx": 2.0, "vy": 1.7, "gravity": 5.0, "drag": 0.8}
    step, state, trail = 1e-4, np.array([0.7, 2.0, 2.0, 1.7]), []
    for _ in range(15_000):  # midpoint rule
        trail.append(state.copy())
        if state[1] < 0.8:
            break
        half = state + step / 2 * np.array([state[2], state[3], -0.8 * state[2], -5 - 0.8 * state[3]])
        state = state + step * np.array([half[2], half[3], -0.8 * half[2], -5 - 0.8 * half[3]])
    trail = np.array(trail)
    path = throw(np.arange(len(trail)) * step, **known)[:, 0]
    np.testing.assert_allclose(path, trail[:, :2], atol=1e-3)
    np.testing.assert_allclose(path[:-1], trail[:-1, :2], atol=1e-7)
    rest = throw(at(2.0, 9.0), **known)[:, 0]
    np.testing.assert_allclose(rest[0], rest[1])
    assert rest[0, 1] == pytest.approx(0.8)


def test_throw_with_little_drag_is_a_parabola():
    path = throw(at(0, 0.2, 0.4), x=0.0, y=1.0, rest=0.0, vx=2.0, vy=1.0, gravity=10.0, drag=1e-4)[:, 0]
    np.testing.assert_allclose(path, [[0, 1], [0.4, 1.0], [0.8, 0.6]], atol=1e-4)


def test_pendulum_small_swing_has_the_textbook_period():
    assert pendulum_period(0.01, 2.0, 8.0) == pytest.approx(2 * np.pi * np.sqrt(2 / 8), rel=1e-4)
    path = pendulum(at(0, np.pi / 2, np.pi), angle=0.01, length=2.0, gravity=8.0, pivot=(0.0, 0.0))[:, 0, 0]
    np.testing.assert_allclose(path, [0.02, -0.02, 0.02], atol=1e-5)


def test_pendulum_wide_swing_keeps_energy_and_length():
    times = np.linspace(0, 3, 3001)
    path = pendulum(times, angle=2.0, length=1.3, gravity=7.0, pivot=(2.0, 3.6))[:, 0]
    speed = np.gradient(path, times, axis=0)
    energy = 0.5 * (speed**2).sum(1) + 7.0 * path[:, 1]
    np.testing.assert_allclose(energy[2:-2], energy[2], rtol=1e-4)
    np.testing.assert_allclose(np.hypot(*(path - [2.0, 3.6]).T), 1.3)
    period = pendulum_period(2.0, 1.3, 7.0)
    assert period > 1.2 * 2 * np.pi * np.sqrt(1.3 / 7)  # wide swings take longer
    np.testing.assert_allclose(
        pendulum(at(period), angle=2.0, length=1.3, gravity=7.0),
        pendulum(at(0), angle=2.0, length=1.3, gravity=7.0),
    )


def test_spring_period():
    # 4 pi^2 / s^2: one second per swing.
    path = spring(at(0, 0.25, 0.5, 1), x=2.0, y=1.0, stretch=-0.5, stiffness=4 * np.pi**2)[:, 0]
    np.testing.assert_allclose(path, [[1.5, 1], [2, 1], [2.5, 1], [1.5, 1]], atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_slide_stops_after_speed_squared_over_twice_the_friction(sign):
    path = slide(at(0, 0.5, 1, 5), x=2.0, y=0.5, vx=2.0 * sign, friction=2.0)[:, 0, 0]
    np.testing.assert_allclose(path, 2 + sign * np.array([0, 0.75, 1, 1]))


def test_collision_keeps_momentum_and_returns_part_of_the_closing_speed():
    known = {
        "left": 1.0,
        "right": 3.0,
        "y": 2.0,
        "v_left": 2.0,
        "v_right": -1.0,
        "radius": 0.25,
        "bounciness": 0.6,
    }
    path = collision(at(0, 0.5, 1, 2), **known)[..., 0]  # they meet at 0.5 s
    np.testing.assert_allclose(path[1], [2.0, 2.5])
    before, after = path[1] / 0.5 - path[0] / 0.5, path[3] - path[2]
    assert before.sum() == pytest.approx(after.sum())
    assert after[1] - after[0] == pytest.approx(0.6 * (before[0] - before[1]))
