"""Trains the tiny Wan VAE on clips of worlds: `python -m experiments.tiny_wan.train_vae`.

As Wan's own: first on single frames, which is cheap, then on crops of clips, then on whole ones.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from safetensors.numpy import load_file, save_file

from ditmem_jax.convert.engine import fill, targets
from ditmem_jax.models.wan.vae import VAE, Chunk
from experiments.tiny_wan.common import (
    BUILD,
    VAE_CONFIG,
    draw_clip,
    ema,
    initialise,
    muon,
    prefetch,
    to_float,
)

IMAGE_STEPS = flags.DEFINE_integer("image_steps", 900, "Training steps on single frames.")
STEPS = flags.DEFINE_integer("steps", 600, "Training steps on crops of clips.")
WHOLE_STEPS = flags.DEFINE_integer("whole_steps", 500, "Training steps on whole clips.")
DECODER_STEPS = flags.DEFINE_integer("decoder_steps", 1000, "Training steps of the decoder alone.")
NAME = flags.DEFINE_string("name", "vae.safetensors", "File of the result.")
CONTINUE = flags.DEFINE_string("from", None, "Begin with these weights instead of random ones.")
IMAGES, CROPS, CLIPS = 32, 8, 4  # per step
RATE = flags.DEFINE_float("rate", 2e-2, "Peak learning rate.")
FRAMES = 9  # a crop of each clip: two chunks are enough for the caches to be used
KL = 1e-5


def images(step: int) -> np.ndarray:
    frames = []
    for index in range(step * IMAGES // 4, (step + 1) * IMAGES // 4):
        video = draw_clip(4, index).video
        frames += list(video[np.random.default_rng(index).integers(0, len(video), 4)])
    return to_float(np.stack(frames))[:, None]


def crops(step: int) -> np.ndarray:
    clips = []
    for index in range(step * CROPS, (step + 1) * CROPS):
        video = draw_clip(1, index).video
        # a third of the crops begin with the clip; causal caches make every position alike
        start = 0 if index % 3 == 0 else np.random.default_rng(index).integers(0, len(video) - FRAMES + 1)
        clips.append(to_float(video[start : start + FRAMES]))
    return np.stack(clips)


def whole(step: int) -> np.ndarray:
    return np.stack(
        [to_float(draw_clip(5, index).video) for index in range(step * CLIPS, (step + 1) * CLIPS)]
    )


def more(step: int) -> np.ndarray:
    return whole(step + 100_000)


def in_two_chunks(step: Chunk, x: jax.Array) -> jax.Array:
    """`step` over the first frame and then over all others: a loop over chunks is ten times slower on a CPU."""
    cache, first = step(None, x[:, :1])
    if x.shape[1] == 1:
        return first
    return jnp.concatenate([first, step(cache, x[:, 1:])[1]], axis=1)


def main(_) -> None:
    vae = initialise(lambda: VAE(VAE_CONFIG, rngs=nnx.Rngs(0)), seed=0)
    graph, state = nnx.split(vae)
    # the past does not count at first: each frame is a picture of its own
    state = jax.tree.map(lambda x: x.at[:-1].set(0) if x.ndim == 5 and x.shape[0] == 3 else x, state)
    if CONTINUE.value:
        fill(vae, load_file(CONTINUE.value))
        state = nnx.state(vae)
    state = train(graph, state, images, IMAGE_STEPS.value, seed=0)
    state = train(graph, state, crops, STEPS.value, seed=1)
    state = train(graph, state, whole, WHOLE_STEPS.value, seed=2)
    encoder = {
        path: variable for path, variable in nnx.to_flat_state(state) if path[0] in ("encoder", "quant")
    }
    state = train(graph, state, more, DECODER_STEPS.value, seed=3, freeze_encoder=True)
    # averaging equal weights rounds, and latents that were made before must stay as they are
    state = nnx.from_flat_state(
        [(path, encoder.get(path, variable)) for path, variable in nnx.to_flat_state(state)]
    )
    save(graph, state)


def train(
    graph: nnx.GraphDef, state: nnx.State, data: Callable, steps: int, seed: int, freeze_encoder: bool = False
) -> nnx.State:
    """The average of the weights after `steps` steps on `data(step)`."""
    if steps == 0:
        return state
    schedule = optax.warmup_cosine_decay_schedule(0, RATE.value, 20, steps, RATE.value / 50)
    optimiser = muon(schedule)

    def loss_fn(state, video, key):
        vae = nnx.merge(graph, state)
        mean, log_variance = jnp.split(in_two_chunks(vae.posterior_chunk, video), 2, axis=-1)
        log_variance = jnp.clip(
            log_variance, -20, -4
        )  # nearly an autoencoder: with more noise it is slow to start
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        if freeze_encoder:  # Muon makes a whole step of any gradient, however small: there must be none
            mean, log_variance = jax.lax.stop_gradient((mean, log_variance))
            latents = mean
        error = in_two_chunks(vae.decode_chunk, latents) - video
        squared = jnp.square(error).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
        return squared + 0.1 * jnp.abs(error).mean() + KL * kl, squared

    @jax.jit
    def step_fn(state, average, opt_state, video, key):
        (_, squared), grads = jax.value_and_grad(loss_fn, has_aux=True)(state, video, key)
        updates, opt_state = optimiser.update(grads, opt_state, state)
        state = optax.apply_updates(state, updates)
        return state, ema(average, state, 0.99), opt_state, squared

    average, opt_state, key = state, optimiser.init(state), jax.random.key(seed)
    start = time.time()
    for step, video in enumerate(prefetch(data, range(steps))):
        state, average, opt_state, squared = step_fn(
            state, average, opt_state, video, jax.random.fold_in(key, step)
        )
        if step % 50 == 49:
            psnr = 10 * np.log10(4 / float(squared))
            print(
                f"step {step + 1} psnr {psnr:.2f} dB {(time.time() - start) / (step + 1):.3f} s/step",
                flush=True,
            )
            save(graph, average)
    return average


def save(graph, state) -> None:
    vae = nnx.merge(graph, state)
    arrays = {
        ".".join(map(str, path)): np.asarray(value.get_value())
        for path, value in nnx.to_flat_state(nnx.state(vae))
    }
    assert arrays.keys() == targets(vae).keys()
    BUILD.mkdir(parents=True, exist_ok=True)
    save_file(arrays, BUILD / (NAME.value + ".tmp"))
    (BUILD / (NAME.value + ".tmp")).replace(BUILD / NAME.value)


if __name__ == "__main__":
    app.run(main)
