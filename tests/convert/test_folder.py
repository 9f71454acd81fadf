"""Folders of original weights to folders that the library loads."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ditmem_jax.convert import folder as folders
from ditmem_jax.convert.folder import convert_checkpoint, converted, damage, deviations, write_folder
from ditmem_jax.convert.plan import Options, plan
from ditmem_jax.convert.sources import open_source
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import split
from ditmem_jax.storage.weights import load_dit, load_umt5, load_vae
from tests.tiny import replace, tiny_config, write_original

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "original"
    write_original(folder, tiny_config(folder))
    return folder


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "original")


@pytest.mark.slow
def test_every_network_loads_with_its_weights(original, tmp_path):
    config = replace(tiny_config(tmp_path), "weights", path=str(tmp_path / "converted"))
    convert_checkpoint(original, config.weights.path)
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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = converted(copy)
    monkeypatch.setattr(folders, "convert_checkpoint", lambda *_: pytest.fail("converted again"))
    assert converted(copy) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = copy / "dit.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["head.head.bias"] += 1
    safetensors.numpy.save_file(tensors, path)
    assert converted(copy) != first


@pytest.mark.slow
def test_of_two_processes_that_convert_at_once_the_first_one_counts(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def slow(source, target):
        convert_checkpoint(source, target)
        monkeypatch.setattr(folders, "convert_checkpoint", convert_checkpoint)
        converted(copy)  # the other one

    monkeypatch.setattr(folders, "convert_checkpoint", slow)
    made = Path(converted(copy))
    assert (made / "config.json").is_file() and list(made.parent.iterdir()) == [made]


def split_in_two(folder):
    """The transformer of a folder as two shards."""
    tensors = safetensors.numpy.load_file(folder / "dit.safetensors")
    names, shards = sorted(tensors), []
    for i, part in enumerate((names[::2], names[1::2])):
        shards.append(folder / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
        safetensors.numpy.save_file({name: tensors[name] for name in part}, shards[-1])
    (folder / "dit.safetensors").unlink()
    return shards


def test_sharded_transformer(original, copy, tmp_path):
    split_in_two(copy)
    convert_checkpoint(original, tmp_path / "whole")
    convert_checkpoint(copy, tmp_path / "converted")
    assert (
        contents(tmp_path / "converted")["dit.safetensors"] == contents(tmp_path / "whole")["dit.safetensors"]
    )


def damage_truncate(folder):
    path = folder / "vae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_shards(folder):
    (folder / "dit.safetensors").rename(folder / "dit-00001-of-00002.safetensors")


def damage_pointer(folder):
    (folder / "dit.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    )


def damage_unknown(folder):
    tensors = safetensors.numpy.load_file(folder / "dit.safetensors")
    safetensors.numpy.save_file(
        tensors | {"blocks.0.extra.weight": np.zeros(2, np.float32)}, folder / "dit.safetensors"
    )


def damage_dtype(folder):
    tensors = safetensors.numpy.load_file(folder / "dit.safetensors")
    tensors["head.head.bias"] = tensors["head.head.bias"].astype(np.int32)
    safetensors.numpy.save_file(tensors, folder / "dit.safetensors")


def damage_twice(folder):
    shutil.copy(folder / "vae.safetensors", folder / "Wan2.1_VAE.safetensors")


def damage_other_model(folder):
    for name in ("dit", "vae", "text"):
        safetensors.numpy.save_file(
            {"model.layers.0.mlp.weight": np.zeros(2, np.float32)}, folder / f"{name}.safetensors"
        )


def damage_config(folder):
    (folder / "config.json").write_text('{"dim": 48')


def damage_nothing_left(folder):
    for path in folder.iterdir():
        path.unlink()


def damage_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dim": 64}))


def damage_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vace"}))


def damage_values(folder):
    tensors = safetensors.numpy.load_file(folder / "text.safetensors")
    tensors["norm.weight"][0] = np.nan
    safetensors.numpy.save_file(tensors, folder / "text.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "vae.safetensors"),
        (damage_shards, "dit-00002-of-00002.safetensors is missing"),
        (damage_pointer, "dit.safetensors is a pointer to weights.*git lfs pull"),
        (damage_unknown, r"unknown tensor blocks\.0\.extra\.weight \[2\]"),
        (damage_dtype, "head.head.bias has dtype I32"),
        (damage_twice, "Wan2.1_VAE.safetensors and .*vae.safetensors are both the network vae"),
        (damage_other_model, "holds no network that we know"),
        (damage_config, "config.json is damaged"),
        (damage_nothing_left, "no weights in"),
        (damage_width, "do not fit the module"),
        (damage_kind, "VACE"),
        (damage_values, "norm.weight holds values that are not finite"),
    ],
)
def test_bad_originals_leave_nothing_behind(copy, tmp_path, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=f"(?s){message}"):
        convert_checkpoint(copy, tmp_path / "converted")
    assert not list(tmp_path.glob("*converted*"))


def test_every_finding_of_every_file_in_one_message(copy, tmp_path):
    damage_truncate(copy)
    damage_pointer(copy)
    damage_config(copy)
    with pytest.raises(UserError, match=r"3 findings") as error:
        convert_checkpoint(copy, tmp_path / "converted")
    for name in ("config.json", "dit.safetensors", "vae.safetensors"):
        assert str(copy / name) in str(error.value)


def test_every_finding_in_values_in_one_message(copy, tmp_path):
    damage_values(copy)
    tensors = safetensors.numpy.load_file(copy / "dit.safetensors")
    tensors["head.head.bias"][3] = np.inf
    safetensors.numpy.save_file(tensors, copy / "dit.safetensors")
    with pytest.raises(UserError, match=r"head\.head\.bias holds values(.|\n)*norm\.weight holds values"):
        convert_checkpoint(copy, tmp_path / "converted")


def index_of(folder, shards):
    names = {name: path.name for path in shards for name in safetensors.numpy.load_file(path)}
    return names, folder / "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names.update(ghost=names["head.head.bias"]), "ghost is not in .*0000[12]-of-00002"),
        (lambda names: names.pop("head.head.bias"), "head.head.bias in .* is not in .*index.json"),
        (lambda names: names.update(ghost="x.safetensors"), "x.safetensors is missing: a shard of"),
        (lambda names: names.update(ghost="../dit.safetensors"), "no name of a file beside it"),
        (lambda names: names.update(ghost=3), "index.json is damaged"),
        (lambda names: None, None),
    ],
    ids=["ghost", "unlisted", "missing", "elsewhere", "number", "right"],
)
def test_an_index_and_its_shards_agree(copy, tmp_path, change, message):
    shards = split_in_two(copy)
    names, index = index_of(copy, shards)
    change(names)
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    if message is None:
        convert_checkpoint(copy, tmp_path / "converted")
        return
    with pytest.raises(UserError, match=message):
        convert_checkpoint(copy, tmp_path / "converted")


def test_a_tensor_in_two_shards(copy, tmp_path):
    first, second = split_in_two(copy)
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(first) | safetensors.numpy.load_file(second), second
    )
    with pytest.raises(UserError, match=r"blocks\.0\.cross_attn\.k\.bias is in .*00001.* and in .*00002"):
        convert_checkpoint(copy, tmp_path / "converted")


# --- targets ----------------------------------------------------------------------------------------------------


def test_an_existing_target_is_not_touched(original, tmp_path):
    with pytest.raises(UserError, match="is no folder of converted weights"):
        convert_checkpoint(original, tmp_path)
    assert not list(tmp_path.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_folder_is_put_together_in_several_calls(original, tmp_path):
    convert_checkpoint(original, tmp_path / "whole")
    for name in ("dit", "vae", "text"):
        convert_checkpoint(original / f"{name}.safetensors", tmp_path / "parts")
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert whole.keys() - parts.keys() == {"tokenizer.json"}
    indices = [json.loads(files.pop("config.json")) for files in (whole, parts)]
    seals = [index.pop("sha256") for index in indices]
    assert seals[0] != seals[1]
    del indices[0]["checksums"]["tokenizer.json"]
    assert indices[0] == indices[1]
    assert all(parts[name] == whole[name] for name in parts)
    with pytest.raises(UserError, match="exists and holds vae"):
        convert_checkpoint(original / "vae.safetensors", tmp_path / "parts")


def test_the_tokenizer_belongs_to_the_text_encoder(original, copy, tmp_path):
    for name in ("vae", "text"):
        (copy / f"{name}.safetensors").unlink()
    (copy / "tokenizer.json").write_text("{}")  # of a folder that now holds a transformer only
    source, target = open_source(original), tmp_path / "converted"
    text = plan(source, Options(kind="text"))
    write_folder(source, text, target)
    convert_checkpoint(copy, target)
    assert (target / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()
    assert damage(target) == []
    (target / "tokenizer.json").write_text("{}")
    assert "tokenizer.json has sha256" in damage(target)[0]
    (target / "tokenizer.json").unlink()
    assert damage(target) == ["tokenizer.json is missing"]

    convert_checkpoint(copy, tmp_path / "other")
    assert (tmp_path / "other" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(UserError, match="is not the tokenizer of this text encoder"):
        write_folder(source, text, tmp_path / "other")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_dtypes(copy, tmp_path, dtype):
    tensors = safetensors.numpy.load_file(copy / "text.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"].astype(jnp.bfloat16)
    safetensors.numpy.save_file(tensors, copy / "text.safetensors")
    source = open_source(copy / "text.safetensors")
    write_folder(source, plan(source, Options(dtype=dtype)), tmp_path / "converted")
    found = safetensors.numpy.load_file(tmp_path / "converted" / "text.safetensors")
    embedding = tensors["token_embedding.weight"]
    assert found["norm.scale"].dtype == (dtype or jnp.bfloat16)
    assert found["token_embedding.embedding"].dtype == (dtype or np.float32)
    np.testing.assert_array_equal(found["token_embedding.embedding"], embedding.astype(dtype or np.float32))


def test_values_too_large_for_the_dtype(copy, tmp_path):
    tensors = safetensors.numpy.load_file(copy / "text.safetensors")
    tensors["norm.weight"][0] = np.finfo(np.float32).max
    safetensors.numpy.save_file(tensors, copy / "text.safetensors")
    source = open_source(copy / "text.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight holds values that are not finite"):
        write_folder(source, plan(source, Options(dtype="bfloat16")), tmp_path / "converted")


LAYOUTS = [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")]


def two_experts(folder, names):
    """Puts two transformers that differ in the place of the one in a folder."""
    for shift, name in enumerate(reversed(names)):
        (folder / name).mkdir()
        tensors = safetensors.numpy.load_file(folder / "dit.safetensors")
        tensors["head.head.bias"] += shift
        safetensors.numpy.save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
        shutil.copy(folder / "config.json", folder / name)
    (folder / "dit.safetensors").unlink()


@pytest.mark.parametrize("names", LAYOUTS)
@pytest.mark.parametrize("what", ["root", "folders", "files"])
def test_two_experts_are_two_transformers(copy, tmp_path, names, what):
    two_experts(copy, names)
    if what == "root":
        convert_checkpoint(copy, tmp_path / "converted")
    else:
        for name in names:
            source = copy / name
            source = source / "diffusion_pytorch_model.safetensors" if what == "files" else source
            convert_checkpoint(source, tmp_path / "converted")
    high, low = (
        safetensors.numpy.load_file(tmp_path / "converted" / f"{name}.safetensors")
        for name in ("dit_high", "dit")
    )
    np.testing.assert_array_equal(high["head.bias"], low["head.bias"] + 1)


def test_one_expert_of_two(copy, tmp_path, monkeypatch):
    two_experts(copy, LAYOUTS[0])
    monkeypatch.chdir(copy / "high_noise_model")
    assert [network.role for network in plan(open_source("."))] == ["dit_high"]
    shutil.rmtree(copy / "low_noise_model")
    assert "dit_high" in [network.role for network in plan(open_source(copy))]
    (copy / "high_noise_model").rename(copy / "transformer")
    assert "dit" in [network.role for network in plan(open_source(copy))]


def test_provenance_and_checksums(original, tmp_path):
    convert_checkpoint(original, tmp_path / "converted")
    index = json.loads((tmp_path / "converted" / "config.json").read_text())
    digest = hashlib.sha256((original / "vae.safetensors").read_bytes()).hexdigest()
    assert index["provenance"]["vae"]["files"][0] == {
        "name": "vae.safetensors", "bytes": (original / "vae.safetensors").stat().st_size, "sha256": digest
    }  # fmt: skip
    array = safetensors.numpy.load_file(tmp_path / "converted" / "dit.safetensors")["head.kernel"]
    assert index["checksums"]["dit.safetensors"]["head.kernel"] == f"{zlib.crc32(array.tobytes()):08x}"
    assert damage(tmp_path / "converted") == []


@pytest.mark.slow
def test_a_changed_bit_is_found(original, tmp_path):
    convert_checkpoint(original, tmp_path / "converted")
    networks = plan(open_source(original))
    assert not [problem for *_, problem in deviations(networks, tmp_path / "converted") if problem]
    path = tmp_path / "converted" / "dit.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last array
    path.write_bytes(content)
    last = list(safetensors.numpy.load_file(path))[-1]
    assert len(damage(tmp_path / "converted")) == 1
    problems = [
        (name, problem) for name, _, problem in deviations(networks, tmp_path / "converted") if problem
    ]
    assert len(problems) == 1 and "holds other values" in problems[0][1], last


KILLED = """
import os, signal, sys
from ditmem_jax.convert import folder
count = 0
def dies(*arguments):
    global count
    count += 1
    if count > int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)
function = getattr(folder, sys.argv[3])
setattr(folder, sys.argv[3], dies)
folder.convert_checkpoint(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "calls"), [("blocks", 30), ("_provenance", 2), ("write_text", 0), ("_sync", 0)]
)
def test_killed_and_run_again(original, tmp_path, function, calls):
    target = tmp_path / "converted"
    command = [sys.executable, "-c", KILLED, original, target, function, str(calls)]
    assert subprocess.run(command, check=False, cwd=ROOT).returncode == -signal.SIGKILL
    assert not target.exists()
    convert_checkpoint(original, target)
    convert_checkpoint(original, tmp_path / "undisturbed")
    assert contents(target) == contents(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"converted", "undisturbed"}


def test_killed_while_a_network_is_added(original, tmp_path, monkeypatch):
    target = tmp_path / "converted"
    convert_checkpoint(original / "dit.safetensors", target)
    before = (target / "config.json").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        replace_file = os.replace

        def interrupt(source, destination):
            if destination == target / "config.json":
                raise KeyboardInterrupt
            replace_file(source, destination)

        patch.setattr(folders.os, "replace", interrupt)
        convert_checkpoint(original / "vae.safetensors", target)
    assert (target / "config.json").read_bytes() == before
    convert_checkpoint(original / "vae.safetensors", target)
    assert damage(target) == [] and "vae.safetensors" in contents(target)


@pytest.mark.parametrize("function", ["fsync", "rename", "mkdir"])
def test_a_disk_that_is_full(original, tmp_path, monkeypatch, function):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(UserError, match=r"cannot write .*converted(.|\n)*No space left on device"):
        convert_checkpoint(original, tmp_path / "converted")
    monkeypatch.undo()
    assert not list(tmp_path.glob("*converted*"))


@pytest.mark.parametrize("name", ["dit.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("moment", ["_write_network", "_provenance"])
def test_a_source_that_vanishes_is_no_full_disk(copy, tmp_path, monkeypatch, name, moment):
    source = open_source(copy)
    networks = plan(source)
    function = getattr(folders, moment)

    def vanishes(*arguments):
        (copy / name).unlink(missing_ok=True)
        return function(*arguments)

    monkeypatch.setattr(folders, moment, vanishes)
    with pytest.raises(UserError, match=rf"cannot read .*{name}(.|\n)*No such file"):
        write_folder(source, networks, tmp_path / "converted")
    assert not list(tmp_path.glob("*converted*"))


def test_a_disk_without_room(original, tmp_path, monkeypatch):
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 2, 7))
    with pytest.raises(UserError, match=r"no room for .*converted(.|\n)*7 bytes free"):
        convert_checkpoint(original, tmp_path / "converted")
