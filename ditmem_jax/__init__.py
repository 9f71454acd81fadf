"""Plug-and-play memory for frozen video diffusion transformers.

    import ditmem_jax as dm

    config = dm.load_config("tiny", {"data.bank": "bank"})
    found = dm.Bank.open("bank").search(["a ball falls on planet Zorvex"], k=3)
    sampler = dm.Sampler.load(config, "runs/tiny/encoder.safetensors")
    clips = sampler.generate(["a ball falls on planet Zorvex"], seeds=[0], references=found)

The names of `__all__` are the public ones; everything else is found in the module of its part. Each is imported when
it is first used: importing the library takes no time, defines no flag, starts no device and writes nothing.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditmem_jax.bank.search import Bank as Bank
    from ditmem_jax.config.files import load_config as load_config
    from ditmem_jax.config.schema import Config as Config
    from ditmem_jax.convert.folder import convert_checkpoint as convert_checkpoint
    from ditmem_jax.encode.dataset import encode_videos as encode_videos
    from ditmem_jax.models.memory_encoder import MemoryEncoder as MemoryEncoder
    from ditmem_jax.sample.sampler import Sampler as Sampler
    from ditmem_jax.train.loop import train_memory as train_memory
    from ditmem_jax.types import Memory as Memory

    __version__: str

_HOMES = {
    "Bank": "bank.search",
    "Config": "config.schema",
    "Memory": "types",
    "MemoryEncoder": "models.memory_encoder",
    "Sampler": "sample.sampler",
    "convert_checkpoint": "convert.folder",
    "encode_videos": "encode.dataset",
    "load_config": "config.files",
    "train_memory": "train.loop",
}
"""The module of each public name."""

__all__ = (
    "Bank",
    "Config",
    "Memory",
    "MemoryEncoder",
    "Sampler",
    "__version__",
    "convert_checkpoint",
    "encode_videos",
    "load_config",
    "train_memory",
)


def __getattr__(name: str) -> Any:
    """Return a public name, imported on first use (PEP 562)."""
    if name == "__version__":
        value = importlib.import_module("importlib.metadata").version(__name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
        )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
