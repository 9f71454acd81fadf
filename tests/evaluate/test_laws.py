"""Law errors: of clips that follow their law, of clips that show none, and of a guess."""

import numpy as np
import pytest

from ditmem_jax.evaluate.laws import guess, law_error, told
from ditmem_jax.worlds.laws import PHENOMENA, World
from ditmem_jax.worlds.simulate import sample_clip

WORLD = World("zorvex", gravity=5.0, bounciness=0.6, drag=1.2, friction=2.0, stiffness=30.0)


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_a_clip_tells_the_constants_of_its_world_and_of_no_other(phenomenon):
    clip = sample_clip(np.random.default_rng(0), WORLD, phenomenon)
    found = told(clip.video, phenomenon)
    assert found.keys() == set(PHENOMENA[phenomenon])
    for constant, value in found.items():
        true = getattr(WORLD, constant)
        assert law_error(value, true) < 0.05 < law_error(value, 2 * true)


def test_a_clip_without_a_body_tells_nothing():
    assert told(np.full((25, 32, 32, 3), 128, np.uint8), "fall") == {}


def test_errors_are_relative_and_alike_in_both_directions():
    errors = law_error(np.array([2.0, 0.5, 1.0, np.nan]), np.ones(4))
    np.testing.assert_allclose(errors, [np.log(2), np.log(2), 0, np.nan])


def test_a_guess_is_the_middle_of_what_worlds_are_drawn_from():
    assert guess("gravity") == pytest.approx(np.sqrt(2.0 * 12.0))  # drawn in the logarithm
    assert guess("bounciness") == pytest.approx((0.3 + 0.95) / 2)
