"""Cleaning, padding, truncation and bad files, with a small tokenizer trained on the spot."""

import json

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Reference

from ditmem_jax.errors import UserError
from ditmem_jax.models.wan.tokenizer import Tokenizer, clean
from experiments.tiny_wan.tokenizer import PIECE, train_tokenizer

CAPTIONS = ["A ball falls at gravity 6.2 .", "a ball, a red ball", "the block slides"]


@pytest.fixture
def path(tmp_path):
    train_tokenizer(CAPTIONS, tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def vocab(path):
    return json.loads(path.read_text())["model"]["vocab"]


def test_vocabulary_order_and_specials(path):
    words = sorted(vocab(path), key=vocab(path).get)
    assert words[:5] == ["<pad>", "</s>", "<unk>", "a", "ball"]
    assert words[5:] == [",", ".", "6.2", "at", "block", "falls", "gravity", "red", "slides", "the"]


def test_training_is_deterministic(path, tmp_path):
    train_tokenizer(CAPTIONS[::-1], tmp_path / "again.json")
    assert path.read_bytes() == (tmp_path / "again.json").read_bytes()


def test_ids_and_mask(path):
    ids, mask = Tokenizer(path, 7)(["A Ball at 6.2", "the zebra, 6.3"])
    words = vocab(path)
    assert ids.dtype == np.int32 and mask.dtype == bool
    np.testing.assert_array_equal(
        ids,
        [
            [words["a"], words["ball"], words["at"], words["6.2"], 1, 0, 0],
            [words["the"], 2, words[","], 2, 1, 0, 0],
        ],
    )
    np.testing.assert_array_equal(mask, [[True] * 5 + [False] * 2] * 2)


def test_what_is_not_read_is_warned_of_once(path, capsys):
    tokenizer = Tokenizer(path, 5)
    tokenizer(["a ball falls"])
    assert not capsys.readouterr().err
    tokenizer(["the block slides at a red ball"])
    assert "longer than the text encoder reads" in (told := capsys.readouterr().err)
    assert "up to 4 tokens" in told and "what is lost begins with 'a red ball'" in told
    tokenizer(["a zebra fall"])
    assert "does not know 'zebra', 'fall' of 'a zebra fall'" in (told := capsys.readouterr().err)
    assert "for 'fall': falls" in told
    tokenizer(["the block slides at a red ball", "a zebra"])
    assert not capsys.readouterr().err


def test_numbers_and_units_split():
    split = pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True)
    words = [word for word, _ in split.pre_tokenize_str("at -9.81m/s2, x1.5 and 12. don't")]
    assert words == [
        "at",
        "-",
        "9.81",
        "m",
        "/",
        "s",
        "2",
        ",",
        "x",
        "1.5",
        "and",
        "12",
        ".",
        "don",
        "'",
        "t",
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 9])
def test_truncation_keeps_the_end_as_the_library_does(path, length):
    prompt = "a red ball falls , the block slides"
    reference = Reference.from_file(str(path))
    reference.enable_truncation(length)
    reference.enable_padding(length=length, pad_id=0, pad_token="<pad>")
    want = reference.encode(prompt)
    ids, mask = Tokenizer(path, length)([prompt])
    assert ids[0].tolist() == want.ids
    assert mask[0].tolist() == [bool(m) for m in want.attention_mask]


def test_settings_stored_in_the_file_do_not_count(path):
    stored = Reference.from_file(str(path))
    stored.enable_truncation(2)
    stored.enable_padding(length=20)
    stored.save(str(path))
    ids, _ = Tokenizer(path, 6)(["a red ball"])
    assert ids.shape == (1, 6) and ids[0, 3] == 1


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a \t ball\n\n falls ", "a ball falls"),
        ("a &amp;amp; b &lt;c&gt;", "a & b <c>"),
        ("a\u00a0ball\u2003falls", "a ball falls"),
        ("\u201ca ball\u2019s fall\u201d", '"a ball\'s fall"'),
        ("&nbsp;", ""),
        ("the fluid \ufb02ows", "the fluid flows"),  # a ligature
        ("a \uff42\uff41\uff4c\uff4c\u3000falls", "a ball falls"),  # full width
        ("it doesn\u00e2\u20ac\u2122t fall", "it doesn't fall"),  # UTF-8 read as Windows-1252
        ("sch\u00c3\u00b6n", "sch\u00f6n"),
        ("a \x1b[36mred\x1b[0m ball", "a red ball"),
    ],
)
def test_clean(raw, cleaned):
    assert clean(raw) == cleaned


def test_empty_prompt(path):
    tokenizer = Tokenizer(path, 3)
    with pytest.raises(UserError, match="empty"):
        tokenizer(["a ball", " &nbsp; "])
    ids, mask = tokenizer([""], allow_empty=True)
    assert ids.tolist() == [[1, 0, 0]] and mask.tolist() == [[True, False, False]]


def test_vocab_counts_the_rows_of_the_embedding(path):
    assert Tokenizer(path, 3).vocab == len(vocab(path)) == 15


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "hello",
            "{}",
            "[1]",
            '{"model": 5}',
            '{"model": {"type": "WordLev',
            b"\xff\x00",
            "[" * 100_000,
        ),
        *('{"model": {"type": "WordLevel", "vocab": {"a": 0}}}', '{"model": {"type": "?", "vocab": {}}}'),
    ],
    ids=range(10),
)
def test_not_a_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer(path, 3)


def test_missing_file_and_missing_tokens(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer(tmp_path / "none.json", 3)
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}))
    with pytest.raises(UserError, match="<pad>"):
        Tokenizer(path, 3)
