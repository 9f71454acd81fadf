"""The operations of `case.OPERATIONS` in this library."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ditmem_jax.config import MeshConfig
from ditmem_jax.diffusion.guidance import guided
from ditmem_jax.diffusion.solvers import SOLVERS, Carry
from ditmem_jax.models.ditmem import Networks, compute_for
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan import vae as vae_module
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.models.wan.vae import VAE
from ditmem_jax.parallel.mesh import make_mesh
from ditmem_jax.storage.weights import DTYPES
from ditmem_jax.types import Batch, Conditioning, Memory
from experiments.benchmarks.case import Case


def prepare(operation: str, case: Case) -> Callable[[], None]:
    """Everything made and compiled but for the first call; each call runs the operation once, to its end."""
    name, _, without = operation.partition(" without ")
    makers = {
        "train": _train,
        "denoise": _denoise,
        "encoder": _encoder,
        "vae encode": _vae,
        "vae decode": _vae,
        "matmul": _matmul,
    }
    return makers[name](case, without or operation)


def _random(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _weights(create: Callable[[], nnx.Module]):
    """A structure and random arrays for it."""
    structure, shapes = abstract(create)
    rng, arrays = np.random.default_rng(0), {}
    for name, x in shapes.items():
        values = rng.standard_normal(x.shape, np.float32)
        values *= x.shape[-1] ** -0.5  # in place: these are large, and the most memory ever taken is measured
        arrays[name] = jnp.asarray(values, x.dtype)
    return structure, arrays


def _transformer(case: Case, *, training: bool = False):
    config, mesh = case.config(), make_mesh(MeshConfig(), jax.devices()[:1])
    compute = compute_for(config, mesh, training=training)  # as in training and sampling on one such device
    return _weights(lambda: DiT(config.dit, compute=compute, rngs=nnx.Rngs(0), dtype=DTYPES[case.dtype]))


def _references(case: Case) -> jax.Array:
    return _random(3, 1, case.videos, *case.references, case.config().memory.in_dim)


def _train(case: Case, _: str) -> Callable[[], None]:
    # Here, since it brings what reads data, and the other operations are not to be charged with its memory.
    from ditmem_jax.train.optimizer import make_optimizer
    from ditmem_jax.train.step import init_state, make_encoder, make_train_step

    config = case.config()
    structure, backbone = _transformer(case, training=True)
    encoder, _ = abstract(lambda: make_encoder(config))
    optimizer = make_optimizer(config.optim, 1)
    train_step = make_train_step(config, Networks(structure, encoder), optimizer)
    step = jax.jit(train_step, donate_argnums=0)
    state = jax.jit(lambda: init_state(config, optimizer))()
    text = _random(2, 1, config.dit.text_len, config.dit.text_dim, dtype=DTYPES[case.dtype])
    batch = Batch(
        _random(1, 1, *case.grid, config.vae.z_dim),
        Conditioning(text),
        _references(case),
        jnp.ones((1, case.videos), bool),
    )

    def run():
        nonlocal state
        state, metrics = step(state, backbone, batch)
        jax.block_until_ready((state, metrics))

    return run


def _denoise(case: Case, without: str) -> Callable[[], None]:
    config = case.config()
    memory = None if without == "memory" else _encoder(case, "")()
    structure, backbone = _transformer(case)
    dtype = DTYPES[case.dtype]
    texts = [
        Conditioning(_random(i, 1, config.dit.text_len, config.dit.text_dim, dtype=dtype)) for i in (1, 2)
    ]

    @jax.jit
    def step(backbone, noise, texts, memory):
        velocity = guided(structure.merge(backbone), *texts, memory, config.sample.guidance)
        return SOLVERS["euler"].step(velocity, Carry(noise), np.float32([0.8, -0.02])).latents

    noise = _random(3, 1, *case.grid, config.vae.z_dim)
    return lambda: jax.block_until_ready(step(backbone, noise, texts, memory))


def _encoder(case: Case, _: str) -> Callable[[], Memory]:
    config, dtype = case.config(), DTYPES[case.dtype]
    structure, arrays = _weights(lambda: MemoryEncoder(config.memory, rngs=nnx.Rngs(0), dtype=dtype))
    arrays = {name: jnp.abs(x) if name.endswith("norm.var") else x for name, x in arrays.items()}
    encode = jax.jit(lambda arrays, x: structure.merge(arrays)(x, training=False))
    references = _references(case)
    return lambda: jax.block_until_ready(encode(arrays, references))


def _vae(case: Case, operation: str) -> Callable[[], None]:
    config = case.config()
    structure, arrays = _weights(lambda: VAE(config.vae, rngs=nnx.Rngs(0)))
    vae = structure.merge(arrays)
    if operation == "vae encode":
        video = config.video
        pixels = _random(1, 1, video.frames, video.height, video.width, 3)
        return lambda: jax.block_until_ready(vae_module.encode(vae, pixels))
    latents = _random(1, 1, *case.grid, config.vae.z_dim)
    return lambda: jax.block_until_ready(vae_module.decode(vae, latents))


def _matmul(case: Case, _: str) -> Callable[[], None]:
    a, b = (_random(i, case.matmul, case.matmul, dtype=DTYPES[case.dtype]) for i in range(2))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, b))
