import pytest

from ditmem_jax.evaluate import laws
from tests.evaluate.subjects import FakeSampler


@pytest.fixture
def sampler(monkeypatch):
    """The law error's sampler."""
    fake = FakeSampler()
    monkeypatch.setattr(laws, "make_sampler", lambda subject: fake)
    return fake
