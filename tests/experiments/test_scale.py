"""How the distance of weights in 8 bits is measured."""

import pytest

from ditmem_jax.config import DiTConfig
from experiments.scale.int8 import SIGMAS, distances, random_weights


@pytest.mark.slow
def test_distances_of_a_small_network():
    config = DiTConfig(
        dim=64,
        ffn_dim=96,
        num_heads=2,
        num_layers=2,
        in_dim=4,
        out_dim=4,
        text_dim=8,
        text_len=6,
        freq_dim=16,
    )
    found = list(distances(config, random_weights(config), (2, 4, 4)))
    assert [len(distance) for distance in found] == [len(SIGMAS)] * 3
    assert all(1e-4 < x < 0.02 for distance in found for x in distance)
