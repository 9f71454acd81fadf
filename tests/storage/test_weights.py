"""Files of weights and encoders: whole, or an error that names them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.config import MemoryConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.quantised import to_int8
from ditmem_jax.models.state import abstract, split
from ditmem_jax.storage.encoders import encoder_metadata, load_encoder, save_encoder
from ditmem_jax.storage.tensors import open_tensors, write_safetensors
from ditmem_jax.storage.weights import check_weights, load_dit, load_umt5, load_vae, read_index
from ditmem_jax.types import Conditioning
from tests.tiny import make_tiny, random_arrays, replace


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


# --- encoders ---------------------------------------------------------------------------------------------------

RELEASED = MemoryConfig(
    dim=16, in_dim=4, stages=((8, 3, 1, 1), (8, 3, 1, 2)), latent_grid=(3, 4, 4), tokens=10
)


@pytest.fixture(scope="module")
def arrays():
    return random_arrays(abstract(lambda: MemoryEncoder(RELEASED, rngs=nnx.Rngs(0)))[1])


@pytest.fixture
def file(tmp_path, arrays):
    save_encoder(tmp_path / "encoder.safetensors", arrays, RELEASED, {"step": 7})
    return tmp_path / "encoder.safetensors"


def test_an_encoder_comes_back_with_its_configuration(file, arrays):
    encoder = load_encoder(file)
    assert encoder.config == RELEASED
    assert encoder_metadata(file) == (RELEASED, {"step": 7})
    loaded = split(encoder)[1]
    assert loaded.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(loaded[name], arrays[name])


def flipped(content, place):
    """The bytes with one bit of one of them turned over."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_cut_or_altered_encoder_is_named(file):
    content = file.read_bytes()
    for broken in (content[:-10], content[:5], flipped(content, -40)):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"encoder.safetensors"):
            load_encoder(file)


@pytest.mark.slow
def test_an_altered_header_of_an_encoder_is_refused(file):
    content = file.read_bytes()
    start, stop = content.index(b"__metadata__"), content.index(b"data_offsets")
    for place in range(start, stop, 7):
        file.write_bytes(flipped(content, place))
        with pytest.raises(UserError, match=r"encoder.safetensors"):
            load_encoder(file)


def test_encoders_of_earlier_versions_have_no_seal(file, arrays):
    metadata = open_tensors(file)[1]
    del metadata["sha256"]
    older = file.with_name("older.safetensors")
    write_safetensors(older, tensors_of(arrays), sorted(arrays.items()), metadata)
    assert load_encoder(older).config == RELEASED


def tensors_of(arrays):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in sorted(arrays.items())}


def test_other_files_are_no_encoders(config):
    with pytest.raises(UserError, match="is no memory encoder"):
        load_encoder(f"{config.weights.path}/dit.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        load_encoder("absent.safetensors")


# --- converted weights ------------------------------------------------------------------------------------------


def test_weights_of_another_width_are_named_before_anything_is_read(config):
    wider = replace(config, "text", dim_ffn=64)
    with pytest.raises(UserError, match=r"text.dim_ffn = 64(.|\n)*text.dim_ffn = 32"):
        load_umt5(wider)


def test_a_missing_folder_tells_how_to_convert(config, tmp_path):
    with pytest.raises(UserError, match="ditmem convert SOURCE"):
        load_dit(replace(config, "weights", path=str(tmp_path / "absent")))


def test_a_network_that_is_missing_is_named(config):
    with pytest.raises(UserError, match=r"holds no network dit_high\n.*dit, text, vae"):
        check_weights(config, "dit", "dit_high")


def test_settings_that_the_weights_do_not_mention_have_their_defaults(config, tmp_path):
    folder = shutil.copytree(config.weights.path, tmp_path / "weights")
    index = json.loads((folder / "config.json").read_text())
    del index["networks"]["dit"]["image_dim"], index["networks"]["dit"]["eps"], index["sha256"]
    (folder / "config.json").write_text(json.dumps(index))
    older = replace(config, "weights", path=str(folder))
    load_dit(older)
    with pytest.raises(UserError, match=r"dit.eps = 0.001(.|\n)*dit.eps = 1e-06"):
        load_dit(replace(older, "dit", eps=1e-3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, load", [("dit", load_dit), ("vae", load_vae), ("text", load_umt5), ("tokenizer", load_umt5)]
)
def test_altered_weights_are_refused(config, tmp_path, name, load):
    folder = shutil.copytree(config.weights.path, tmp_path / "weights")
    altered = replace(config, "weights", path=str(folder))
    path = next(folder.glob(f"{name}.*"))
    content = path.read_bytes()
    place = content.index(b"vocab") if name == "tokenizer" else len(content) * 2 // 3
    path.write_bytes(flipped(content, place))
    with pytest.raises(UserError, match=rf"{name}\.\w+ was altered"):
        load(altered)
    if name != "tokenizer":
        load(replace(altered, "weights", verify=False))


def test_an_altered_index_of_weights_is_refused(config, tmp_path):
    folder = shutil.copytree(config.weights.path, tmp_path / "weights")
    content = (folder / "config.json").read_bytes()
    for place in range(0, len(content), len(content) // 40):
        (folder / "config.json").write_bytes(flipped(content, place))
        if content[place : place + 1].strip():
            with pytest.raises(UserError, match=r"config\.json"):
                read_index(folder)


def test_weights_take_the_dtype_of_the_config(config):
    dit = load_dit(replace(config, "weights", dtype="bfloat16"))
    assert {x.dtype for x in split(dit)[1].values()} == {np.dtype(jnp.bfloat16)}


@pytest.mark.slow
def test_matrices_in_eight_bits(config):
    """Half the memory of bfloat16, the velocity of two blocks to a hundredth, and gradients through it."""
    half, eight = (split(load_dit(replace(config, "weights", dtype=dtype))) for dtype in ("bfloat16", "int8"))
    _, arrays = eight
    rounded = {name for name, x in arrays.items() if x.dtype == jnp.int8}
    assert rounded == {name for name in half[1] if name.startswith("blocks") and name.endswith("kernel")}
    for name in rounded:  # a factor of two bytes stands for 32, 16 for widths that 32 does not divide
        held = arrays[name].nbytes + arrays[name.replace("kernel", "scale")].nbytes
        assert held <= half[1][name].nbytes * (1 + 2 / 16) / 2
    assert all(arrays[name].dtype == half[1][name].dtype for name in half[1].keys() - rounded)

    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((2, 3, 4, 4, 4)), jnp.float32)
    text = jnp.asarray(rng.standard_normal((2, 16, 16)), jnp.float32)

    def velocity(network, latents):
        structure, arrays = network
        return structure.merge(arrays)(latents, jnp.array([300.0, 900.0]), Conditioning(text))

    def gradient(network):
        return jax.grad(lambda latents: jnp.square(velocity(network, latents)).mean())(latents)

    for function, bound in ((lambda network: velocity(network, latents), 1e-2), (gradient, 3e-2)):
        expected, found = map(function, (half, eight))
        assert jnp.linalg.norm(found - expected) < bound * jnp.linalg.norm(expected)


@pytest.mark.parametrize("inputs, groups", [(96, 3), (32, 1), (48, 3), (6, 3)])
def test_eight_bits_round_to_the_nearest(inputs, groups):
    kernel = np.random.default_rng(0).standard_normal((2, inputs, 8)).astype(np.float32)
    kernel[1, :, 3] = 0
    rounded, scale = to_int8(kernel)
    assert (rounded.dtype, scale.dtype, scale.shape) == (np.int8, jnp.bfloat16, (2, groups, 8))
    rounded, kernel = (x.reshape(2, groups, -1, 8) for x in (rounded, kernel))
    scale = scale.astype(np.float32)
    assert (np.abs(rounded).max(2) == np.where(np.abs(kernel).max(2) > 0, 127, 0)).all()
    assert (np.abs(rounded * scale[:, :, None] - kernel).max(2) <= 0.5001 * scale).all()
