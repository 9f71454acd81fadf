"""Folders of original weights to folders that the library loads."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from convert import folder as folders
from convert.folder import convert_folder, converted
from ditmem_jax.checkpoint import load_dit, load_umt5, load_vae
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import split
from tests.tiny import replace, tiny_config, write_original


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "original"
    write_original(folder, tiny_config(folder))
    return folder


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "original")


def test_every_network_loads_with_its_weights(original, tmp_path):
    config = replace(tiny_config(tmp_path), "weights", path=str(tmp_path / "converted"))
    convert_folder(original, config.weights.path)
    assert {path.name for path in (tmp_path / "converted").iterdir()} == {
        "config.json", "dit.safetensors", "vae.safetensors", "text.safetensors", "tokenizer.json",
    }  # fmt: skip
    dit = split(load_dit(config))[1]
    source = safetensors.numpy.load_file(original / "dit.safetensors")
    np.testing.assert_array_equal(
        dit["blocks.self_attention.q.kernel"][1], source["blocks.1.self_attn.q.weight"].T
    )
    vae = split(load_vae(config))[1]
    source = safetensors.numpy.load_file(original / "vae.safetensors")
    np.testing.assert_array_equal(vae["encoder.layers.0.bias"], source["encoder.conv1.bias"])
    text, tokenizer = load_umt5(config)
    source = safetensors.numpy.load_file(original / "text.safetensors")
    np.testing.assert_array_equal(
        split(text)[1]["token_embedding.embedding"], source["token_embedding.weight"]
    )
    assert tokenizer(["A ball"])[1].sum() == 3


def test_converted_is_made_once_and_again_when_weights_change(copy, monkeypatch, tmp_path):
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    first = converted("original")
    monkeypatch.setattr(folders, "convert_folder", lambda *_: pytest.fail("converted again"))
    assert converted("original") == first
    monkeypatch.undo()
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    path = copy / "dit.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["head.head.bias"] += 1
    safetensors.numpy.save_file(tensors, path)
    assert converted("original") != first


def test_sharded_transformer(copy, tmp_path):
    tensors = safetensors.numpy.load_file(copy / "dit.safetensors")
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        shard = copy / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, shard)
    (copy / "dit.safetensors").unlink()
    convert_folder(copy, tmp_path / "converted")


def damage_truncate(folder):
    path = folder / "vae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_missing(folder):
    (folder / "tokenizer.json").unlink()


def damage_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dim": 64}))


def damage_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "i2v"}))


def damage_values(folder):
    tensors = safetensors.numpy.load_file(folder / "text.safetensors")
    tensors["norm.weight"][0] = np.nan
    safetensors.numpy.save_file(tensors, folder / "text.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "vae.safetensors"),
        (damage_missing, "lacks tokenizer"),
        (damage_width, "do not fit the module"),
        (damage_kind, "model_type t2v"),
        (damage_values, "norm.weight holds values that are not finite"),
    ],
)
def test_bad_originals_leave_nothing_behind(copy, tmp_path, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        convert_folder(copy, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_an_existing_target_is_not_touched(original, tmp_path):
    with pytest.raises(UserError, match="exists"):
        convert_folder(original, tmp_path)
