"""Files of prompts: each form, and what is wrong in them by line."""

import pytest

from ditmem_jax.errors import UserError
from ditmem_jax.sample.requests import Request, read_requests

BOTH = [Request("a ball, a wall", 3, ("x", "y"), 0.5), Request("a pendulum")]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("prompts.txt", "\ufeffa ball\n\n  a wall \n", [Request("a ball"), Request("a wall")]),
        ("prompts", "{no json}\n", [Request("{no json}")]),
        ("a.csv", 'prompt,seed,memory,strength\n"a ball, a wall",3,"x, y",0.5\n,,,\na pendulum,,,\n', BOTH),
        (
            "a.jsonl",
            '{"prompt": "a ball, a wall", "seed": 3, "memory": ["x", "y"], "strength": 0.5}\n\n{"prompt": "a pendulum"}',
            BOTH,
        ),
        ("b.jsonl", '{"prompt": "a", "memory": "none", "seed": 0}', [Request("a", 0, "none")]),
    ],
)
def test_requests_are_read(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_requests(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "has no prompt"),
        ("a.csv", "prompt\n", "has no prompt"),
        ("a.csv", "prompt,sed\na,1\n", r"a.csv, line 2: unknown field 'sed'(.|\n)*one of: seed"),
        ("a.csv", "prompt,seed\na\n", "line 2: as many values"),
        ("a.csv", "prompt\na,b\n", "line 2: as many values"),
        ("a.csv", "prompt,seed\na,1\nb,1.5\n", r"line 3: seed(.|\n)*a whole number(.|\n)*'1.5'"),
        ("a.csv", "prompt,seed\n,1\n", "line 2: the prompt is missing"),
        ("a.jsonl", '{"prompt": "a"}\n{', "line 2: no JSON"),
        ("a.jsonl", '["a"]', "line 1"),
        ("a.jsonl", '{"prompt": 3}', "the prompt is missing"),
        ("a.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}', "line 1: seed"),
        ("a.jsonl", '{"prompt": "a", "strength": NaN}', "line 1: strength"),
        ("a.jsonl", '{"prompt": "a", "memory": []}', "line 1: memory"),
    ],
)
def test_what_is_wrong_is_named_by_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_requests(tmp_path / name)


def test_a_file_that_is_no_text_or_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_requests(tmp_path / "absent.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text"):
        read_requests(tmp_path / "a.txt")
