"""Both sides of the benchmarks compute the same, and every command runs. Needs the extra `parity`."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from ditmem_jax.convert import memory as names
from ditmem_jax.convert.folder import convert_checkpoint
from ditmem_jax.convert.original import original
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.types import Conditioning
from experiments.benchmarks.case import GRIDS, Case
from tests.tiny import random_arrays

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

CASE = Case(tokens=500, layers=2, videos=2, small=True)


def test_the_peer_computes_what_we_do(tmp_path):
    from experiments.benchmarks import peer

    config, rng = CASE.config(), np.random.default_rng(0)
    structure, shapes = abstract(lambda: MemoryEncoder(config.memory, rngs=nnx.Rngs(0)))
    arrays = random_arrays(shapes)
    arrays = {name: np.abs(x) + 0.5 if name.endswith("norm.var") else x for name, x in arrays.items()}
    theirs = peer.Encoder(config.memory).eval()
    weights = original(names.table(config.memory), arrays)
    missing = theirs.load_state_dict(
        {name: torch.from_numpy(x) for name, x in weights.items()}, strict=False
    ).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing)

    torch.manual_seed(0)
    transformer = peer.Transformer(config.dit).eval()
    transformer.dit.save_pretrained(tmp_path / "source" / "transformer")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    dit, _ = abstract(lambda: DiT(config.dit, rngs=nnx.Rngs(0)))
    dit = dit.merge(
        {
            name: jnp.asarray(x)
            for name, x in safetensors.numpy.load_file(tmp_path / "converted" / "dit.safetensors").items()
        }
    )

    references = rng.standard_normal((1, 2, *CASE.references, 16)).astype(np.float32)
    latents = rng.standard_normal((1, *GRIDS[500], 16)).astype(np.float32)
    context = rng.standard_normal((1, 16, 4096)).astype(np.float32)
    timestep = np.array([800.0], np.float32)
    with jax.default_matmul_precision("highest"):
        encoder = structure.merge({name: jnp.asarray(x) for name, x in arrays.items()})
        memory = encoder(jnp.asarray(references), training=False)
        inputs = jnp.asarray(latents), jnp.asarray(timestep), Conditioning(jnp.asarray(context))
        got, without = dit(*inputs, memory), dit(*inputs)
    with torch.no_grad():
        rows = theirs(torch.from_numpy(np.moveaxis(references, -1, 2)))
        assert rows.shape[1] == 2 * 2 * 100
        given = (torch.from_numpy(x) for x in (np.moveaxis(latents, -1, 1), timestep, context))
        expected = np.moveaxis(transformer(*given, rows).numpy(), 1, -1)
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(without - expected) > 1e-3 * np.linalg.norm(expected)


def test_a_command_measures_and_keeps_what_others_found(tmp_path):
    out = tmp_path / "results.json"
    out.write_text('{"vae": {"rows": []}}')
    given = ["--small", "--tokens=500", "--layers=1", "--rounds=1", "--repeats=1", f"--out={out}"]
    command = [sys.executable, "-m", "experiments.benchmarks", "pytorch", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    vae, pytorch = results
    assert vae == "vae" and pytorch.startswith("pytorch, float32, remat attention, ")
    rows = results[pytorch]["rows"]
    assert [row["operation"] for row in rows] == ["train", "denoise"]
    assert all(row[side]["seconds"] > 0 for row in rows for side in ("ours", "torch"))
