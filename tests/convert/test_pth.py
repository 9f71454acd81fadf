"""Torch files: read like safetensors, and never run."""

import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.convert.folder import convert_checkpoint
from ditmem_jax.convert.sources import open_source
from ditmem_jax.errors import UserError
from tests.convert.test_sources import random_text


class Payload:
    """Writes a file when it is unpickled by a reader that lets it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def save(torch, path, tensors, **options):
    as_torch = {
        name: torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        if x.dtype == jnp.bfloat16
        else torch.from_numpy(x)
        for name, x in tensors.items()
    }
    torch.save(as_torch, path, **options)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_reads_like_safetensors(torch, tmp_path, dtype, zipped):
    import safetensors.numpy

    tensors = random_text(dtype)
    save(torch, tmp_path / "text.pth", tensors, _use_new_zipfile_serialization=zipped)
    safetensors.numpy.save_file(tensors, tmp_path / "text.safetensors")
    for name in ("text.pth", "text.safetensors"):
        convert_checkpoint(tmp_path / name, tmp_path / f"from {name}")
    first, second = (
        (tmp_path / f"from {name}" / "text.safetensors").read_bytes()
        for name in ("text.pth", "text.safetensors")
    )
    assert first == second


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_wants_to_run_code_is_refused_and_named(torch, tmp_path, zipped):
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save({"conv1.weight": Payload(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"Wan2\.1_VAE\.pth is no plain file of tensors; nothing in it was run.*mkdir"
    ):
        convert_checkpoint(path, tmp_path / "converted")
    assert {p.name for p in tmp_path.iterdir()} == {path.name}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"no torch file at all"])
def test_damaged_torch_files_are_named(torch, tmp_path, content):
    path = tmp_path / "Wan2.1_VAE.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"Wan2\.1_VAE\.pth"):
        open_source(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_off_torch_files_are_named(torch, tmp_path, zipped):
    path = tmp_path / "text.pth"
    save(torch, path, random_text(), _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"text\.pth"):
            open_source(path)


@pytest.mark.filterwarnings("ignore")  # of torch, about protocols that it does not know
@pytest.mark.parametrize("zipped", [True, False])
def test_altered_torch_files_are_named_or_opened(torch, tmp_path, zipped):
    path, rng = tmp_path / "text.pth", np.random.default_rng(0)
    save(torch, path, random_text(), _use_new_zipfile_serialization=zipped)
    content, refused = np.fromfile(path, np.uint8), 0
    for _ in range(500):
        altered = content.copy()
        altered[rng.integers(1000, size=3)] = rng.integers(256, size=3)
        altered.tofile(path)
        try:
            open_source(path)
        except UserError as error:
            assert "text.pth" in str(error)
            refused += 1
    assert refused > 100


def test_too_little_memory_is_no_damage(torch, tmp_path, monkeypatch):
    def load(*_, **__):
        raise MemoryError

    save(torch, tmp_path / "text.pth", random_text())
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        open_source(tmp_path / "text.pth")


def test_something_else_than_tensors(torch, tmp_path):
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="something else than tensors by name"):
        open_source(tmp_path)


def test_a_pointer_instead_of_a_torch_file(tmp_path):
    (tmp_path / "x.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="is a pointer to weights"):
        open_source(tmp_path)


def test_without_torch_the_message_says_so(tmp_path, monkeypatch):
    (tmp_path / "x.pth").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"x\.pth needs torch to be read"):
        open_source(tmp_path)
