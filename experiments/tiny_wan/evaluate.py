"""How good the tiny Wan is: `python -m experiments.tiny_wan.evaluate` writes results.json.

Reconstruction by the VAE, and the law's constants measured after mp4 and VAE; the transformer's own clips of
stated constants: tracking residual, and correlation of stated and measured; the knowledge spectrum: what stating
the constants is worth at each noise level.
"""

import io
import json
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ditmem_jax.config import Config, build
from ditmem_jax.config.networks import TRAIN_STEPS
from ditmem_jax.configs.tiny import get_config
from ditmem_jax.data.video import to_unit
from ditmem_jax.diffusion import flow
from ditmem_jax.models.wan.vae import decode, encode
from ditmem_jax.sample.sampler import Sampler
from ditmem_jax.storage.weights import load_dit, load_umt5, load_vae
from ditmem_jax.types import Conditioning
from ditmem_jax.worlds.captions import caption
from ditmem_jax.worlds.laws import PHENOMENA, RANGES, sample_world
from ditmem_jax.worlds.measure import measure
from ditmem_jax.worlds.simulate import sample_clip

CLIPS = flags.DEFINE_integer("clips", 40, "Clips per phenomenon.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance of the sampler instead of the config's.")
OUT = flags.DEFINE_string("out", str(Path(__file__).parent / "results.json"), "Where the numbers go.")
SIGMAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
HELD_OUT = 77  # seed: clips that no training saw


def held_out(phenomenon: str) -> list:
    rng = np.random.default_rng([HELD_OUT, list(PHENOMENA).index(phenomenon)])
    return [sample_clip(rng, sample_world(rng), phenomenon) for _ in range(CLIPS.value)]


def through_mp4(video: np.ndarray, fps: int = 16) -> np.ndarray:
    """The clip after H.264, in memory."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def pixels(video: jax.Array) -> np.ndarray:
    return np.rint((np.clip(np.asarray(video), -1, 1) + 1) * 127.5).astype(np.uint8)


def reconstruction(vae, clips: dict[str, list]) -> dict:
    """PSNR in dB, and the median relative error of each constant after mp4 and VAE."""
    psnr, errors = [], {}
    for phenomenon, group in clips.items():
        videos = np.stack([through_mp4(clip.video) for clip in group])
        decoded = pixels(decode(vae, encode(vae, to_unit(videos))))
        psnr += list(10 * np.log10(255**2 / np.square(decoded.astype(float) - videos).mean((1, 2, 3, 4))))
        for clip, video in zip(group, decoded, strict=True):
            found = measure(video, phenomenon)
            for name, value in clip.truth.items():
                error = abs(found.constants[name] / value - 1) if found.ok else np.inf
                errors.setdefault(f"{phenomenon} {name}", []).append(error)
    medians = {key: round(100 * float(np.median(value)), 2) for key, value in errors.items()}
    return {
        "psnr_mean_db": round(float(np.mean(psnr)), 2),
        "psnr_lowest_db": round(float(np.min(psnr)), 2),
        "median_error_percent": medians,
    }


def own_clips(sampler: Sampler, clips: dict[str, list]) -> dict:
    """Clips of the transformer with the constants stated: residual of the tracked motion, stated against measured."""
    result = {}
    for phenomenon, group in clips.items():
        prompts = [caption(clip, state="numbers") for clip in group]
        videos = sampler.generate(prompts, range(len(prompts)))
        found = [measure(video, phenomenon) for video in videos]
        good = [i for i, measurement in enumerate(found) if measurement.ok]
        row = {
            "measured": f"{len(good)} of {len(found)}",
            "residual_px_median": round(float(np.median([m.residual_px for m in found])), 3),
        }
        for name in PHENOMENA[phenomenon]:
            stated = [RANGES[name].fraction(group[i].truth[name]) for i in good]
            measured = [RANGES[name].fraction(max(found[i].constants[name], 1e-3)) for i in good]
            row[f"correlation_{name}"] = (
                round(float(np.corrcoef(stated, measured)[0, 1]), 3) if len(good) > 2 else None
            )
        result[phenomenon] = row
    return result


def spectrum(config: Config, vae, clips: dict[str, list]) -> dict:
    """Percent by which stating the constants lowers the loss, per phenomenon and noise level."""
    dit, (text, tokenizer) = load_dit(config), load_umt5(config)

    @jax.jit
    def losses(ids, clean, noise, sigma):
        levels = jnp.full(len(ids), sigma)
        noisy, given = flow.add_noise(clean, noise, levels), Conditioning(text(ids, ids > 0))
        velocity = dit(noisy, TRAIN_STEPS * levels, given)
        return jnp.square(velocity - flow.target(clean, noise)).mean((1, 2, 3, 4))

    result = {"sigma": list(SIGMAS)}
    for phenomenon, group in clips.items():
        clean = encode(vae, to_unit(np.stack([clip.video for clip in group])))
        forms = [jnp.asarray(tokenizer([caption(c, state=s) for c in group])[0]) for s in (None, "numbers")]
        gains, level = [], []
        for sigma in SIGMAS:
            pairs = []
            for draw in range(4):
                noise = jax.random.normal(jax.random.key(draw), clean.shape)
                pairs.append([losses(ids, clean, noise, sigma) for ids in forms])
            without, stated = np.mean(pairs, axis=(0, 2))
            gains.append(round(100 * float(1 - stated / without), 2))
            level.append(round(float(without), 5))
        result[phenomenon] = {"gain_percent": gains, "loss_unstated": level}
    return result


def finite(value):
    """The value with what JSON does not have, infinity and NaN, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main(_) -> None:
    values = get_config()
    if GUIDANCE.value is not None:
        values.sample.guidance = GUIDANCE.value
    config = build(Config, values)
    vae = load_vae(config)
    clips = {phenomenon: held_out(phenomenon) for phenomenon in PHENOMENA}
    results = {"clips_per_phenomenon": CLIPS.value, "guidance": config.sample.guidance}
    for name, part in (
        ("reconstruction", lambda: reconstruction(vae, clips)),
        ("own_clips", lambda: own_clips(Sampler(config, load_dit(config), vae, load_umt5(config)), clips)),
        ("spectrum", lambda: spectrum(config, vae, clips)),
    ):
        results[name] = finite(part())
        print(json.dumps({name: results[name]}, indent=1), flush=True)
    Path(OUT.value).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
