"""Exports come back bit for bit, under exactly the names that other programs expect."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from ditmem_jax.config import DiTConfig, MemoryConfig, to_dict
from ditmem_jax.config.presets import DIT_PRESETS
from ditmem_jax.convert.export import _model_type, export_encoder, export_folder
from ditmem_jax.convert.folder import convert_checkpoint
from ditmem_jax.convert.kinds import KINDS
from ditmem_jax.convert.original import original as original_tensors
from ditmem_jax.errors import UserError
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.state import abstract
from ditmem_jax.storage.encoders import load_encoder, save_encoder
from ditmem_jax.storage.weights import read_networks
from tests.tiny import random_arrays, tiny_config, write_original

MANIFEST = Path(__file__).parents[1] / "manifests" / "dit_mem_1.3b.json"
RELEASED = MemoryConfig(
    dim=16, in_dim=4, stages=((8, 7, 4, 2), (8, 3, 1, 2)), latent_grid=(21, 20, 24), tokens=100
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "original"
    write_original(folder, tiny_config(folder))
    tensors = safetensors.numpy.load_file(folder / "dit.safetensors")
    half = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    safetensors.numpy.save_file(half, folder / "dit.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_networks_come_back_bit_for_bit(original, tmp_path, naming):
    convert_checkpoint(original, tmp_path / "first")
    export_folder(tmp_path / "first", tmp_path / "exported", naming)
    convert_checkpoint(tmp_path / "exported", tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    indices = [json.loads(files.pop("config.json")) for files in (first, second)]
    assert first == second
    assert indices[0]["networks"] == indices[1]["networks"]
    assert indices[1]["provenance"]["dit"]["names"] == naming


FILES_OF_NETWORKS = {
    ("image", "original"): ["diffusion_pytorch_model"],
    ("image", "diffusers"): ["transformer/diffusion_pytorch_model"],
    ("two images", "original"): ["diffusion_pytorch_model"],
    ("two images", "diffusers"): ["transformer/diffusion_pytorch_model"],
    ("experts", "original"): [
        "high_noise_model/diffusion_pytorch_model", "low_noise_model/diffusion_pytorch_model",
    ],
    ("experts", "diffusers"): [
        "transformer/diffusion_pytorch_model", "transformer_2/diffusion_pytorch_model",
    ],
    ("nested", "original"): ["Wan2.2_VAE"],
    ("nested", "diffusers"): ["vae/diffusion_pytorch_model"],
}  # fmt: skip
KINDS_OF_NETWORKS = {
    "image": ("dit", dict(clean_frames=False, in_dim=6, image_dim=24)),
    "two images": ("dit", dict(clean_frames=False, in_dim=6, image_dim=24, image_positions=10)),
    "experts": ("dit", {}),
    "nested": ("vae", dict(patch_size=2, decoder_dim=16, shortcuts=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("name", KINDS_OF_NETWORKS)
def test_other_kinds_come_back_bit_for_bit(tmp_path, name, naming):
    kind, change = KINDS_OF_NETWORKS[name]
    network = KINDS[kind]
    config = dataclasses.replace(getattr(tiny_config(tmp_path), kind), **change)
    shapes = abstract(lambda: network.module(config, rngs=nnx.Rngs(0)))[1]
    folders = ("high_noise_model", "low_noise_model") if name == "experts" else ("",)
    for seed, folder in enumerate(folders):
        path = tmp_path / "source" / folder
        path.mkdir(parents=True)
        tensors = original_tensors(network.table(config), random_arrays(shapes, seed))
        safetensors.numpy.save_file(tensors, path / "model.safetensors")
        described = to_dict(config) if kind == "dit" else {kind: to_dict(config)}
        (path / "config.json").write_text(json.dumps(described))
    convert_checkpoint(tmp_path / "source", tmp_path / "first")
    export_folder(tmp_path / "first", tmp_path / "exported", naming)
    exported = (tmp_path / "exported").rglob("*.safetensors")
    assert (
        sorted(str(path.relative_to(tmp_path / "exported").with_suffix("")) for path in exported)
        == (FILES_OF_NETWORKS[name, naming])
    )
    convert_checkpoint(tmp_path / "exported", tmp_path / "second")
    for path in (tmp_path / "first").glob("*.safetensors"):
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()
    first, second = (read_networks(tmp_path / name) for name in ("first", "second"))
    assert first == second
    assert first.keys() == ({"dit", "dit_high"} if name == "experts" else {kind})


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (DIT_PRESETS["wan2.1-t2v-14b"], "t2v"),
        (DIT_PRESETS["wan2.1-i2v-14b"], "i2v"),
        (DIT_PRESETS["wan2.2-i2v-a14b"], "i2v"),
        (DIT_PRESETS["wan2.2-ti2v-5b"], "ti2v"),
        (DiTConfig(dim=48, ffn_dim=96, num_heads=4, num_layers=2, in_dim=48, out_dim=48), "t2v"),
    ],
)
def test_the_word_for_a_kind_of_transformer(config, word):
    assert _model_type(config) == word


def test_original_tensors_are_the_source(original, tmp_path):
    convert_checkpoint(original, tmp_path / "converted")
    export_folder(tmp_path / "converted", tmp_path / "exported", "original")
    for name, file in (("dit", "diffusion_pytorch_model"), ("text", "models_t5_umt5-xxl-enc-bf16")):
        source = safetensors.numpy.load_file(original / f"{name}.safetensors")
        found = safetensors.numpy.load_file(tmp_path / "exported" / f"{file}.safetensors")
        assert found.keys() == source.keys()
        for tensor in source:
            assert found[tensor].dtype == source[tensor].dtype
            np.testing.assert_array_equal(found[tensor], source[tensor])
    gammas = safetensors.numpy.load_file(tmp_path / "exported" / "Wan2.1_VAE.safetensors")
    assert gammas["encoder.middle.1.norm.gamma"].ndim == 3
    assert gammas["encoder.middle.0.residual.0.gamma"].ndim == 4


def test_a_damaged_folder_is_not_exported(original, tmp_path):
    convert_checkpoint(original, tmp_path / "converted")
    path = tmp_path / "converted" / "vae.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged(.|\n)*has checksum"):
        export_folder(tmp_path / "converted", tmp_path / "exported", "original")
    assert not (tmp_path / "exported").exists()


# --- memory encoders --------------------------------------------------------------------------------------------


def released_tensors() -> dict[str, np.ndarray]:
    """Random values under every released name, small, with both sets of aliases."""
    rng = np.random.default_rng(0)
    wanted = abstract(lambda: MemoryEncoder(RELEASED, rngs=nnx.Rngs(0)))[1]
    sizes = {512: 8, 768: 8, 1536: 16, 13824: wanted["high.projection.kernel"].shape[0]}
    tensors = {}
    for name, shape in json.loads(MANIFEST.read_text())["tensors"].items():
        shape = tuple(sizes.get(n, n) for n in shape)
        if name.endswith(("conv_block1.conv.weight", "cnn.0.conv.weight")):
            shape = (8, 4, 7, 7, 7)
        if name.endswith("complex_weight"):
            stage = 0 if "block1" in name or "cnn.0" in name else 1
            shape = wanted[f"high.stages.{stage}.filter.complex_weight"].shape
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(7)
        else:
            tensors[name] = rng.standard_normal(shape).astype(np.float32)
    for name in list(tensors):
        if ".cnn." in name:
            block = name.replace(".cnn.0.", ".conv_block1.").replace(".cnn.1.", ".conv_block2.")
            tensors[name] = tensors[block]
    return tensors


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_an_encoder_has_no_place_among_other_names(original, tmp_path, naming):
    safetensors.numpy.save_file(released_tensors(), tmp_path / "DiT-Mem.safetensors")
    convert_checkpoint(tmp_path / "DiT-Mem.safetensors", tmp_path / "converted")
    with pytest.raises(UserError, match=rf"holds no network that has {naming} names(.|\n)*--export dit-mem"):
        export_folder(tmp_path / "converted", tmp_path / "exported", naming)
    assert not (tmp_path / "exported").exists()
    convert_checkpoint(original / "text.safetensors", tmp_path / "converted")
    assert export_folder(tmp_path / "converted", tmp_path / "exported", naming).keys() == {"memory"}


@pytest.mark.parametrize("prefix", ["", "dit_mem.", "pipe.dit_mem."])
@pytest.mark.parametrize("left_out", [None, ".cnn.", ".conv_block"])
def test_a_released_encoder_in_and_out(tmp_path, prefix, left_out):
    tensors = released_tensors()
    given = {prefix + name: x for name, x in tensors.items() if left_out is None or left_out not in name}
    safetensors.numpy.save_file(given, tmp_path / "DiT-Mem.safetensors")
    convert_checkpoint(tmp_path / "DiT-Mem.safetensors", tmp_path / "converted")
    assert load_encoder(tmp_path / "converted" / "encoder.safetensors").config == RELEASED
    export_encoder(tmp_path / "converted", tmp_path / "out.safetensors", prefix=prefix)
    found = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert found.keys() == {prefix + name for name in tensors}
    for name, x in tensors.items():
        assert found[prefix + name].dtype == x.dtype
        np.testing.assert_array_equal(found[prefix + name], x)


def test_a_trained_encoder_has_every_released_name(tmp_path):
    arrays = random_arrays(abstract(lambda: MemoryEncoder(RELEASED, rngs=nnx.Rngs(0)))[1])
    save_encoder(tmp_path / "encoder.safetensors", arrays, RELEASED, {"step": 3})
    export_encoder(tmp_path / "encoder.safetensors", tmp_path / "out.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert found.keys() == json.loads(MANIFEST.read_text())["tensors"].keys()
    assert found["low_pass_module.cnn.1.bn.num_batches_tracked"].dtype == np.int64
    assert found["low_pass_module.cnn.1.bn.num_batches_tracked"].shape == ()
    convert_checkpoint(tmp_path / "out.safetensors", tmp_path / "again")
    again = safetensors.numpy.load_file(tmp_path / "again" / "encoder.safetensors")
    assert all(again[name].tobytes() == arrays[name].tobytes() for name in arrays)


@pytest.mark.parametrize(
    "change", [{"filter": "radial"}, {"norm": "group"}, {"strength": 0.05}, {"tokens": (1, 1, 1)}]
)
def test_encoders_that_the_released_program_cannot_hold(tmp_path, change):
    config = dataclasses.replace(RELEASED, **change)
    arrays = random_arrays(abstract(lambda: MemoryEncoder(config, rngs=nnx.Rngs(0)))[1])
    save_encoder(tmp_path / "encoder.safetensors", arrays, config, {})
    with pytest.raises(UserError, match=f"memory.{next(iter(change))} = "):
        export_encoder(tmp_path / "encoder.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["low_pass_module.conv_block1.bn.num_batches_tracked", "low_pass_module.cnn.1.conv.bias"]
)
def test_dtypes_that_no_weights_have(tmp_path, name):
    tensors = released_tensors()
    tensors[name] = tensors[name].astype(np.uint32)
    safetensors.numpy.save_file(tensors, tmp_path / "DiT-Mem.safetensors")
    with pytest.raises(UserError, match=f"{name} has dtype U32"):
        convert_checkpoint(tmp_path / "DiT-Mem.safetensors", tmp_path / "converted")


def test_aliases_that_differ_are_refused(tmp_path):
    tensors = released_tensors()
    tensors["high_pass_module.cnn.0.conv.bias"] = tensors["high_pass_module.cnn.0.conv.bias"] + 1
    safetensors.numpy.save_file(tensors, tmp_path / "DiT-Mem.safetensors")
    with pytest.raises(UserError, match=r"high_pass_module\.conv_block1\.conv\.bias are names of one tensor"):
        convert_checkpoint(tmp_path / "DiT-Mem.safetensors", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    arrays = random_arrays(abstract(lambda: MemoryEncoder(RELEASED, rngs=nnx.Rngs(0)))[1])
    save_encoder(tmp_path / "encoder.safetensors", arrays, RELEASED, {})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*out\.safetensors(.|\n)*No space left"):
        export_encoder(tmp_path / "encoder.safetensors", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]
