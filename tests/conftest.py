"""Strict numerics and eight fake devices for every test."""

import os
import tempfile

from tests import FAST_COMPILATION

os.environ["XDG_CACHE_HOME"] = f"{tempfile.gettempdir()}/ditmem_jax_tests_{os.getuid()}"  # not the user's
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {FAST_COMPILATION}"
)

from jaxtyping import install_import_hook

install_import_hook("ditmem_jax", "beartype.beartype")  # shapes in signatures are checked under test only

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def compilations():
    """An entry for every program that is compiled from here on, or read from the compile cache."""
    found = []

    def listener(event: str, seconds: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield found
    jax.monitoring.unregister_event_duration_listener(listener)
