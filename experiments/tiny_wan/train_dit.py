"""Trains the tiny Wan transformer and its text encoder: `python -m experiments.tiny_wan.train_dit`.

The batch is divided among all devices.

The clips show worlds without names. Half of the captions state the constants, in words or numbers; a third begin
"on planet <unk>", so that a name the tokenizer does not know is a familiar sight that means nothing.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from safetensors.numpy import load_file, save_file

from ditmem_jax.convert.engine import fill
from ditmem_jax.diffusion import flow
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.models.wan.tokenizer import Tokenizer
from ditmem_jax.models.wan.umt5 import UMT5
from ditmem_jax.models.wan.vae import VAE, encode_scan
from ditmem_jax.types import Compute, Conditioning
from ditmem_jax.worlds.captions import caption
from experiments.tiny_wan.common import (
    BUILD,
    DIT_CONFIG,
    TEXT_CONFIG,
    TEXT_LENGTH,
    VAE_CONFIG,
    draw_clip,
    ema,
    initialise,
    muon,
    prefetch,
    to_float,
)
from experiments.tiny_wan.tokenizer import train_tokenizer

STEPS = flags.DEFINE_integer("steps", 18000, "Training steps.")
CLIPS = flags.DEFINE_integer("clips", 60000, "Different clips to train on.")
BATCH = flags.DEFINE_integer("batch", 64, "Clips per step.")
RATE = flags.DEFINE_float("rate", 2e-2, "Peak learning rate.")
CONTINUE = flags.DEFINE_bool(
    "continue", False, "Begin with the weights of the last run instead of random ones."
)
BINS = 20  # of sigma, for the running means of the loss, with constants unstated and stated


def forms(clip) -> list[str]:
    """The caption without the constants (twice), with them in words and in numbers."""
    return [caption(clip), caption(clip), caption(clip, state="words"), caption(clip, state="numbers")]


def encode_clips() -> tuple[np.ndarray, list[list[str]]]:
    """Latents of all clips on the VAE's own scale, and their captions; kept on disk for a second run."""
    path, text = BUILD / f"latents-{CLIPS.value}.npy", BUILD / f"captions-{CLIPS.value}.json"
    if path.exists() and text.exists():
        return np.load(path), json.loads(text.read_text())
    vae = nnx.eval_shape(lambda: VAE(VAE_CONFIG, rngs=nnx.Rngs(0)))
    fill(vae, load_file(BUILD / "vae.safetensors"))
    graph, state = nnx.split(vae)
    encode = jax.jit(lambda state, video: encode_scan(nnx.merge(graph, state), video, 1))
    chunk, latents, captions = 50, [], []

    def clips(step):
        return [draw_clip(2, index) for index in range(step * chunk, (step + 1) * chunk)]

    for step, group in enumerate(prefetch(clips, range(CLIPS.value // chunk))):
        latents.append(np.asarray(encode(state, np.stack([to_float(clip.video) for clip in group]))))
        captions += [forms(clip) for clip in group]
        if step % 40 == 0:
            print(f"encoded {len(captions)} clips", flush=True)
    latents = np.concatenate(latents)
    np.save(path, latents)
    text.write_text(json.dumps(captions))
    return latents, captions


def main(_) -> None:
    latents, captions = encode_clips()
    mean, std = latents.mean((0, 1, 2, 3)), latents.std((0, 1, 2, 3))
    (BUILD / "latent_stats.json").write_text(json.dumps({"mean": mean.tolist(), "std": std.tolist()}))
    latents = (latents - mean) / std
    words = [text for forms in captions for text in forms] + ["on planet"]
    train_tokenizer(words, BUILD / "tokenizer.json")
    tokenizer = Tokenizer(BUILD / "tokenizer.json", TEXT_LENGTH)
    print(f"{len(latents)} clips, vocabulary {tokenizer.vocab}", flush=True)
    assert tokenizer.vocab <= TEXT_CONFIG.vocab
    ids = [np.stack([tokenizer([forms[i] for forms in captions])[0] for i in range(4)], 1)]  # [clips, 4, L]
    prefixed = [["on planet <unk> " + text for text in forms] for forms in captions]
    ids.append(np.stack([tokenizer([forms[i] for forms in prefixed])[0] for i in range(4)], 1))
    ids = np.stack(ids, 2).astype(np.int32)  # [clips, form, prefix, L]
    empty = tokenizer([""], allow_empty=True)[0][0]
    train(latents, ids, empty)


def order_numbers(text: UMT5) -> None:
    """Gives tokens of near numbers near embeddings, as a pretrained text encoder has them.

    Drawn at random, a hundred tokens for gravity alone would each have to be learned from the few clips that
    state it. A number's embedding is a smooth random curve over its logarithm.
    """
    table = np.array(text.token_embedding.embedding[...])
    waves = np.arange(1, 9)
    basis = np.random.default_rng(6).normal(size=(2 * len(waves), table.shape[-1]))
    vocab = json.loads((BUILD / "tokenizer.json").read_text())["model"]["vocab"]
    for word, token in vocab.items():
        if word[0].isdigit():
            phase = np.pi * waves * (np.log(float(word)) - np.log(0.3)) / np.log(80 / 0.3)
            curve = np.concatenate([np.cos(phase), np.sin(phase)]) / np.sqrt(len(waves))
            table[token] = curve @ basis * table.shape[-1] ** -0.5
    text.token_embedding.embedding[...] = jnp.asarray(table)


def train(latents: np.ndarray, ids: np.ndarray, empty: np.ndarray) -> None:
    dit = initialise(lambda: DiT(DIT_CONFIG, compute=Compute(remat="products"), rngs=nnx.Rngs(0)), seed=1)
    dit.head.kernel[...] = jnp.zeros_like(dit.head.kernel[...])
    text = initialise(lambda: UMT5(TEXT_CONFIG, rngs=nnx.Rngs(0)), seed=2)
    if CONTINUE.value:
        fill(dit, load_file(BUILD / "dit.safetensors"))
        fill(text, load_file(BUILD / "text.safetensors"))
    else:
        order_numbers(text)
    graph, state = nnx.split((dit, text))
    print(f"{sum(x.size for x in jax.tree.leaves(state)) / 1e6:.2f} M parameters", flush=True)
    schedule = optax.warmup_cosine_decay_schedule(0, RATE.value, 100, STEPS.value, RATE.value / 100)
    optimiser = muon(schedule)

    def batch(step: int):
        rng = np.random.default_rng([3, step])
        rows = rng.integers(0, len(latents), BATCH.value)
        form = rng.integers(0, 4, BATCH.value)
        tokens = ids[rows, form, (rng.random(BATCH.value) < 1 / 3).astype(int)]
        tokens = np.where((rng.random(BATCH.value) < 0.1)[:, None], empty, tokens)
        # one stratum of noise levels per sample, towards noise where the motion is decided
        even = (np.arange(BATCH.value) + rng.random(BATCH.value)) / BATCH.value
        sigma = 2.5 * even / (1 + 1.5 * even)
        noise = rng.standard_normal((BATCH.value, *latents.shape[1:]), np.float32)
        return latents[rows], tokens, form, sigma.astype(np.float32), noise

    def loss_fn(state, running, clean, tokens, form, sigma, noise):
        dit, text = nnx.merge(graph, state)
        context = text(tokens, tokens > 0)
        velocity = dit(flow.add_noise(clean, noise, sigma), 1000 * sigma, Conditioning(context))
        loss = jnp.square(velocity - flow.target(clean, noise)).mean((1, 2, 3, 4))
        level = jnp.minimum((sigma * BINS).astype(jnp.int32), BINS - 1)
        return (loss / running.mean(0)[level]).mean(), (loss, form // 2, level)

    @jax.jit
    def step_fn(state, average, opt_state, running, decay, *data):
        (_, (loss, stated, level)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state, running, *data)
        updates, opt_state = optimiser.update(grads, opt_state, state)
        state = optax.apply_updates(state, updates)
        count = jnp.zeros((2, BINS)).at[stated, level].add(1.0)
        mean = jnp.zeros((2, BINS)).at[stated, level].add(loss) / jnp.maximum(count, 1)
        running = jnp.where(count > 0, 0.98 * running + 0.02 * mean, running)
        return state, ema(average, state, decay), opt_state, running

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, divided = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",)))
    average, opt_state, running = state, optimiser.init(state), jnp.ones((2, BINS))
    state, average, opt_state, running = jax.device_put((state, average, opt_state, running), everywhere)
    start = time.time()
    for step, data in enumerate(prefetch(batch, range(STEPS.value))):
        decay = min(0.9995, (step + 1) / (step + 10))
        state, average, opt_state, running = step_fn(
            state, average, opt_state, running, decay, *jax.device_put(data, divided)
        )
        if step % 200 == 199:
            pace = (time.time() - start) / (step + 1)
            levels, stated = np.asarray(running)[:, 1::3]
            losses = " ".join(f"{x:.4f}" for x in levels)
            gains = " ".join(f"{x:.0%}" for x in 1 - stated / levels)
            print(
                f"step {step + 1} {pace:.3f} s/step loss by sigma {losses} less if stated {gains}", flush=True
            )
        if step % 1000 == 999:
            save(graph, average)
    save(graph, average)


def save(graph, state) -> None:
    for name, module in zip(("dit", "text"), nnx.merge(graph, state), strict=True):
        flat = nnx.to_flat_state(nnx.state(module))
        arrays = {".".join(map(str, path)): np.asarray(value.get_value()) for path, value in flat}
        save_file(arrays, BUILD / f"{name}.tmp")
        (BUILD / f"{name}.tmp").replace(BUILD / f"{name}.safetensors")


if __name__ == "__main__":
    app.run(main)
