"""The causal video VAE: chunks, causality, sizes, names. Parity with the released one is in test_parity."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.config import VAEConfig
from ditmem_jax.config.presets import VAE_PRESETS
from ditmem_jax.convert import engine
from ditmem_jax.convert.vae import table
from ditmem_jax.errors import UserError
from ditmem_jax.models.wan import vae as vae_module
from ditmem_jax.models.wan.vae import VAE, decode, decode_scan, encode, encode_scan, posterior

TINY = VAEConfig(
    dim=4,
    z_dim=2,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
    mean=(0.5, -1.0),
    std=(2.0, 0.5),
)
TWO_LEVELS = VAEConfig(
    dim=2,
    z_dim=2,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    mean=(0.0, 0.0),
    std=(1.0, 1.0),
)
SHORTCUTS = dataclasses.replace(TWO_LEVELS, patch_size=2, decoder_dim=4, shortcuts=True)


def build(config: VAEConfig) -> VAE:
    """All parameters random: freshly made, attention does nothing."""
    vae = nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    shapes = engine.targets(vae)
    engine.fill(
        vae, {path: 0.4 * rng.standard_normal(x.shape).astype("float32") for path, x in shapes.items()}
    )
    return vae


@pytest.fixture(scope="module")
def vae() -> VAE:
    return build(TINY)


def random(*shape: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), shape, minval=-1, maxval=1)


def close(got: jax.Array, want: jax.Array) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("preset", VAE_PRESETS)
def test_names_and_shapes_of_the_released_file(preset):
    config = VAE_PRESETS[preset]
    manifest = json.loads((Path(__file__).parents[2] / f"manifests/{preset}_vae.json").read_text())
    shapes = {name: tuple(shape) for name, shape in manifest["tensors"].items()}
    wanted = engine.targets(nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0))))
    assignments, _ = engine.assign(table(config), shapes, wanted)  # raises on any mismatch, both ways
    assert assignments.keys() == wanted.keys()
    used = [source for assignment in assignments.values() for source in assignment.sources]
    assert sorted(used) == sorted(shapes)
    assert sum(x.size for x in wanted.values()) == manifest["elements"]


@pytest.mark.slow
@pytest.mark.parametrize("config", [TWO_LEVELS, SHORTCUTS], ids=["plain", "shortcuts"])
def test_chunks_do_not_change_the_result(config):
    vae, video = build(config), random(1, 17, 8, 8, 3)
    latents = jax.jit(encode_scan)(vae, video)
    assert latents.shape == (1, 5, 8 // config.spatial_stride, 8 // config.spatial_stride, 2)
    close(encode(vae, video), latents)
    close(jax.jit(encode_scan, static_argnums=2)(vae, video, 2), latents)
    pixels = jax.jit(decode_scan)(vae, latents)
    assert pixels.shape == video.shape
    close(decode(vae, latents), pixels)
    close(jax.jit(decode_scan, static_argnums=2)(vae, latents, 2), pixels)


@pytest.mark.slow
def test_a_later_frame_changes_nothing_earlier(vae):
    video = random(1, 5, 8, 8, 3)
    before, after = encode(vae, video), encode(vae, video.at[:, 3].add(0.5))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.abs(before[:, 2] - after[:, 2]).max() > 1e-3
    before, after = decode(vae, before), decode(vae, before.at[:, 2].add(0.5))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.abs(before[:, 3:] - after[:, 3:]).max() > 1e-3


@pytest.mark.slow
def test_one_compile_for_any_length(vae, monkeypatch):
    traced = []
    for name in ("encode_chunk", "decode_chunk"):
        method = getattr(VAE, name)

        def counting(self, cache, x, method=method):
            traced.append(x.shape)
            return method(self, cache, x)

        monkeypatch.setattr(VAE, name, counting)
    for frames in (7, 1, 3):
        decode(vae, encode(vae, random(3, frames, 4, 4, 3)))
    assert traced == [(3, 1, 4, 4, 3), (3, 2, 4, 4, 3), (3, 1, 2, 2, 2), (3, 1, 2, 2, 2)]


def test_normalisation_uses_the_statistics(vae):
    raw, normalised = jnp.array([2.5, -0.5]).reshape(1, 1, 1, 1, 2), jnp.ones((1, 1, 1, 1, 2))
    np.testing.assert_array_equal(vae.normalise(raw), normalised)
    np.testing.assert_array_equal(vae.unnormalise(normalised), raw)


@pytest.mark.slow
def test_posterior_is_on_the_scale_of_the_network_and_differentiable(vae):
    def loss(state, video):
        vae = nnx.merge(graphdef, state)
        mean, log_variance = posterior(vae, video)
        error = jnp.mean((decode_scan(vae, vae.normalise(mean)) - video) ** 2)
        return error + jnp.mean(log_variance**2), (mean, log_variance)

    graphdef, state = nnx.split(vae)
    video = random(1, 3, 4, 4, 3)
    gradient, (mean, log_variance) = jax.jit(jax.grad(loss, has_aux=True))(state, video)
    assert mean.shape == log_variance.shape == (1, 2, 2, 2, 2)
    close(vae.normalise(mean), encode(vae, video))
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_computes_in_bfloat16_and_answers_in_float32():
    vae = nnx.eval_shape(lambda: VAE(TWO_LEVELS, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    video = jax.ShapeDtypeStruct((1, 5, 8, 8, 3), jnp.float32)
    cache, latents = jax.eval_shape(lambda vae, x: vae.encode_chunk(None, x), vae, video)
    assert latents.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(decode_scan, vae, latents).dtype == jnp.float32


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 4, 8, 8, 3), ["frames", "2n + 1", "4", "use 5 frames"]),
        ((1, 5, 9, 8, 3), ["height", "multiple of 2", "9", "use 8"]),
        ((1, 5, 8, 1, 3), ["width", "multiple of 2", "1", "use 2"]),
    ],
)
@pytest.mark.parametrize("function", [encode, encode_scan, posterior])
def test_clips_that_do_not_divide(vae, function, shape, words):
    with pytest.raises(UserError) as error:
        function(vae, jnp.zeros(shape))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("function", [decode, decode_scan])
@pytest.mark.parametrize("shape", [(1, 2, 4, 4, 3), (1, 0, 4, 4, 2)])
def test_latents_of_another_vae(vae, function, shape):
    with pytest.raises(UserError, match=r"\[batch, time, height, width, 2\]"):
        function(vae, jnp.zeros(shape))


def test_chunks_that_do_not_divide(vae):
    with pytest.raises(UserError, match="1 \\+ a multiple of 4 frames"):
        jax.eval_shape(lambda vae, x: encode_scan(vae, x, per_chunk=2), vae, jnp.zeros((1, 7, 4, 4, 3)))


KWARGS = dict(rngs=nnx.Rngs(0), dtype=jnp.float32)


def clip(*values: float) -> jax.Array:
    """One channel, one pixel: the values are the frames."""
    return jnp.array(values, jnp.float32).reshape(1, -1, 1, 1, 1)


def set_taps(conv: vae_module.CausalConv, *taps: list[float]) -> None:
    """One row of outputs per time tap, past first."""
    conv.kernel[...] = jnp.array(taps, jnp.float32).reshape(conv.kernel.shape)


def test_convolution_sees_two_frames_of_the_past():
    conv = vae_module.CausalConv(1, 1, (3, 1, 1), **KWARGS)
    set_taps(conv, [100], [10], [1])
    y, cache = conv(clip(1, 2, 3), None)
    np.testing.assert_array_equal(y, clip(1, 12, 123))
    np.testing.assert_array_equal(cache, clip(2, 3))
    y, cache = conv(clip(4), cache)
    np.testing.assert_array_equal(y, clip(234))
    np.testing.assert_array_equal(cache, clip(3, 4))


def test_convolution_pads_height_and_width_with_zeros():
    conv = vae_module.CausalConv(1, 1, **KWARGS)
    conv.kernel[...] = jnp.ones_like(conv.kernel[...])
    y, _ = conv(jnp.ones((1, 2, 2, 3, 1)), None)
    np.testing.assert_array_equal(y[0, :, :, :, 0], [[[4, 6, 4]] * 2, [[8, 12, 8]] * 2])


def test_norm_divides_by_the_root_mean_square():
    norm = vae_module.RMSNorm(2)
    norm.scale[...] = jnp.array([1.0, 10.0])
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]]).reshape(1, 1, 1, 2, 2)
    want = np.array([[3, 40], [0, 0]]).reshape(1, 1, 1, 2, 2) / np.sqrt(12.5)
    np.testing.assert_allclose(norm(x), want, rtol=1e-6)


def test_downsampling_spares_the_first_frame():
    down = vae_module.Downsample(1, True, **KWARGS)
    down.conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)  # of each 2 x 2 pixels the first
    set_taps(down.time_conv, [100], [10], [1])
    pixels = jnp.array([[1.0, 7.0], [7.0, 7.0]]).reshape(1, 1, 2, 2, 1)
    frames = [index * pixels for index in range(1, 6)]
    y, cache = down(frames[0], None)
    np.testing.assert_array_equal(y, clip(1))
    y, cache = down(jnp.concatenate(frames[1:], axis=1), cache)
    np.testing.assert_array_equal(y, clip(123, 345))
    np.testing.assert_array_equal(cache, clip(5))
    whole, _ = down(jnp.concatenate(frames, axis=1), None)
    np.testing.assert_array_equal(whole, clip(1, 123, 345))


@pytest.mark.slow
def test_upsampling_spares_and_forgets_the_first_frame():
    up = vae_module.Upsample(2, 1, True, **KWARGS)
    up.conv.kernel[...] = jnp.zeros((3, 3, 2, 1)).at[1, 1, 0].set(1.0)  # the first channel
    taps = np.zeros((3, 2, 4), np.float32)
    taps[:, 0, 0] = 100, 10, 1  # first channel of the first of two frames
    taps[:, 0, 2] = 200, 20, 2  # first channel of the second
    up.time_conv.kernel[...] = jnp.asarray(taps).reshape(3, 1, 1, 2, 4)

    def frames(*values):
        return jnp.tile(clip(*values), (1, 1, 1, 1, 2))

    y, cache = up(frames(9), None)
    np.testing.assert_array_equal(y, np.tile(clip(9), (1, 1, 2, 2, 1)))
    y, cache = up(frames(1), cache)
    np.testing.assert_array_equal(y[:, :, :1, :1], clip(1, 2))
    y, cache = up(frames(2, 3), cache)
    np.testing.assert_array_equal(y[:, :, :1, :1], clip(12, 24, 123, 246))
    whole, _ = up(frames(9, 1, 2, 3), None)
    np.testing.assert_array_equal(whole[:, :, 1:, 1:], clip(9, 1, 2, 12, 24, 123, 246))


def test_averages_of_cells_with_black_before_the_first_frame():
    x = jnp.arange(1.0, 13.0).reshape(1, 3, 2, 2, 1)  # frames 1 2 / 3 4, 5 6 / 7 8, 9 10 / 11 12
    shrink = vae_module.Average(outputs=1, time=2, space=2)
    np.testing.assert_array_equal(shrink(x, begins=True), clip((1 + 2 + 3 + 4) / 8, (5 + 12) / 2))
    np.testing.assert_array_equal(shrink(x[:, 1:], begins=False), clip((5 + 12) / 2))
    halves = vae_module.Average(outputs=2, time=2, space=2)(
        x, begins=True
    )  # one channel per time in the cell
    np.testing.assert_array_equal(halves[0, :, 0, 0], [[0, 2.5], [6.5, 10.5]])


def test_channels_are_repeated_into_cells_but_the_first_frame():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 1, 1, 2)  # two frames of two channels
    grow = vae_module.Duplicate(outputs=1, time=2, space=2)
    cells = [np.full((2, 2), value) for value in (1, 2, 3, 4)]
    np.testing.assert_array_equal(grow(x, begins=False)[0, ..., 0], cells)
    np.testing.assert_array_equal(grow(x, begins=True)[0, ..., 0], cells[1:])


def test_squares_of_pixels_are_channels_by_colour_column_and_row():
    x = jnp.arange(12.0).reshape(1, 1, 2, 2, 3)  # rows, columns, colours
    folded = vae_module._fold(x, 2)
    np.testing.assert_array_equal(folded.ravel(), [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11])
    np.testing.assert_array_equal(vae_module._unfold(folded, 2), x)
