"""Strict numerics and eight fake devices for every test."""

import os
import tempfile

os.environ["XDG_CACHE_HOME"] = f"{tempfile.gettempdir()}/ditmem_jax_tests_{os.getuid()}"  # not the user's
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile hundreds of programs and run each a few times: without LLVM's optimisations that takes half the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
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
