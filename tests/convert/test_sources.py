"""Sources that are damaged: refused in one message with every finding, or converted exactly as they are."""

import numpy as np
import pytest
import safetensors.numpy

from ditmem_jax.config import UMT5Config
from ditmem_jax.convert.engine import convert
from ditmem_jax.convert.folder import convert_checkpoint
from ditmem_jax.convert.plan import FILES, plan
from ditmem_jax.convert.sources import open_source
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import abstract
from tests.tiny import random_arrays

CONFIG = UMT5Config(dim=8, dim_attn=8, dim_ffn=16, num_heads=2, num_layers=2, vocab=24)


def random_text(dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """A text encoder in original names."""
    from flax import nnx

    from ditmem_jax.convert import umt5
    from ditmem_jax.convert.original import original
    from ditmem_jax.models.wan.umt5 import UMT5

    arrays = random_arrays(abstract(lambda: UMT5(CONFIG, rngs=nnx.Rngs(0)))[1], seed)
    return {name: x.astype(dtype) for name, x in original(umt5.table(), arrays).items()}


def harm(content: bytes, rng: np.random.Generator) -> bytes:
    """The content cut off, or with one to four bytes changed, half of the time in the header."""
    if rng.random() < 0.2:
        return content[: rng.integers(len(content))]
    content = bytearray(content)
    end = 8 + int.from_bytes(content[:8], "little") if rng.random() < 0.5 else len(content)
    for place in rng.integers(end, size=rng.integers(1, 5)):
        content[place] = rng.integers(256) if rng.random() < 0.5 else content[place] ^ (1 << rng.integers(8))
    return bytes(content)


def converts_exactly_or_not_at_all(content: bytes, folder) -> bool:
    """Return True if a file with this content is converted, which must then be exact."""
    source, target = folder / "text.safetensors", folder / "converted"
    source.write_bytes(content)
    try:
        convert_checkpoint(source, target)
    except UserError as error:
        assert not list(folder.glob("*converted*")), error
        return False
    tensors = safetensors.numpy.load_file(source)
    network = plan(open_source(source))[0]
    expected = convert(network.table, tensors, network.wanted)
    written = safetensors.numpy.load_file(target / FILES["text"])
    assert written.keys() == expected.keys()
    for name in expected:
        assert written[name].tobytes() == expected[name].tobytes(), name
    return True


@pytest.mark.parametrize("seed", range(60))
def test_a_harmed_file_is_refused_or_converted_exactly(tmp_path, seed):
    rng = np.random.default_rng(seed)
    content = safetensors.numpy.save(random_text())
    converts_exactly_or_not_at_all(harm(content, rng), tmp_path)
