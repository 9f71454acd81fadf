"""Files that cannot be read or written: one message with the path and what is still there."""

import pytest

from ditmem_jax.errors import UserError
from ditmem_jax.storage.digests import sealed, unsealed
from ditmem_jax.storage.files import make_folder, read_json, replacing, write_text


def fill(path, error):
    with replacing(path, RuntimeError) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("write() failed\nat 3")]
)
def test_a_write_that_fails_leaves_what_was_there_and_says_so(tmp_path, error):
    with pytest.raises(UserError, match=r"cannot write .*a\.json\n.*; there is no a\.json\n"):
        fill(tmp_path / "a.json", error)
    write_text(tmp_path / "a.json", "whole")
    with pytest.raises(UserError, match=r"cannot write .*a\.json\n.*; a\.json is as it was before\n"):
        fill(tmp_path / "a.json", error)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def test_other_errors_pass(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "a.json", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [lambda path: write_text(path, ""), make_folder])
def test_what_is_in_the_way_is_named(tmp_path, write):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "file" / "a", tmp_path / "loop" / "a"):
        with pytest.raises(UserError, match=f"cannot write {path}"):
            write(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"9" * 5000], ids=range(5))
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is damaged(.|\n)*make it anew"):
        read_json(tmp_path / "a.json", fix="make it anew")
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path / "b.json")


def test_a_seal_tells_what_was_altered():
    values = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    assert unsealed(sealed(values), "x") == values
    for altered in ({"a": [1, 2.6, None]}, {"d": 0}, {"sha256": "0"}):
        with pytest.raises(UserError, match="x was altered"):
            unsealed(sealed(values) | altered, "x")
    with pytest.raises(UserError, match="x was altered"):
        unsealed(values, "x")
