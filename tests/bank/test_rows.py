"""Rows from records and from tables of users: types of columns, names that are taken, texts without loss."""

import csv
import dataclasses
import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ditmem_jax.bank.rows import read_rows, rows_of_records
from ditmem_jax.data.record import Entry
from ditmem_jax.data.records import RecordReader, RecordWriter
from ditmem_jax.data.video import Facts
from ditmem_jax.errors import UserError
from tests.bank.test_table import HARD
from tests.data.test_records import META, record


def test_rows_of_records(tmp_path):
    for name, start, extra in (
        ("one", 0, {"motion": "0.5", "row": "x"}),
        ("two", 5, {"motion": "", "kind": "b"}),
    ):
        with RecordWriter(tmp_path / name, META, shard_size=2) as writer:
            for i in range(start, start + 3):
                given = record(i)
                writer.add(type(given)(**vars(Entry(given.id, given.caption, given.source, extra=extra)),
                           latents=given.latents, text_embedding=given.text_embedding))  # fmt: skip
    rows = rows_of_records([tmp_path / "one", tmp_path / "two"])
    assert rows["id"].to_pylist() == [f"clip-{i}" for i in (0, 1, 2, 5, 6, 7)]
    assert rows["caption"][4].as_py() == record(6).caption
    assert rows["row"].to_pylist() == [0, 1, 2] * 2 and rows["row_"].to_pylist() == ["x"] * 3 + [""] * 3
    assert rows["records"].to_pylist() == [str(tmp_path / name) for name in ("one", "two") for _ in range(3)]
    assert rows["checksum"].to_pylist()[3:] == RecordReader(tmp_path / "two").checksums
    assert rows["motion"].to_pylist() == [0.5] * 3 + [None] * 3 and rows["kind"].to_pylist()[2:4] == ["", "b"]


def test_the_users_table_goes_before_what_videos_tell_of_themselves(tmp_path):
    given = [
        (Facts(81, 16.0), {}),
        (Facts(3, None), {"fps": " ", "frames": ""}),
        (None, {"duration": "9"}),
        (Facts(10, 5.0), {"duration": "7.5", "fps": "60"}),
    ]
    with RecordWriter(tmp_path / "records", META) as writer:
        for i, (facts, extra) in enumerate(given):
            writer.add(dataclasses.replace(record(i), facts=facts, extra=extra))
    rows = rows_of_records([tmp_path / "records"])
    assert rows["duration"].to_pylist() == [81 / 16, None, 9, 7.5]
    assert rows["frames"].to_pylist() == [81, 3, None, 10] and rows["fps"].to_pylist() == [16, None, None, 60]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_tables_of_users(tmp_path, kind):
    path = tmp_path / f"table.{kind}"
    lines = [
        {"id": id, "caption": text, "motion": float(i), "fps": 8.0, "vector": "v", "a.b": "1"}
        for i, (id, text) in enumerate(HARD.items())
    ]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(lines), path)
    elif kind == "csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    else:
        path.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
    rows = read_rows(path)
    assert rows["id"].to_pylist() == list(HARD) and rows["caption"].to_pylist() == list(HARD.values())
    assert rows["motion"].type == pa.float64() and rows["fps"].type == pa.float32()
    assert rows["source"].to_pylist() == [""] * len(HARD) and rows["vector_"].to_pylist() == ["v"] * len(HARD)
    assert "a_b" in rows.schema.names


def test_ids_that_look_like_numbers_stay_texts(tmp_path):
    (tmp_path / "table.csv").write_text("id,caption,x\n0012,7,1\n0013,,\n")
    rows = read_rows(tmp_path / "table.csv")
    assert rows["id"].to_pylist() == ["0012", "0013"] and rows["caption"].to_pylist() == ["7", ""]
    assert rows["x"].to_pylist() == [1, None]
    (tmp_path / "table.csv").write_text("id,caption,tag,fps,,a.b\n1,x,007,,9,2\n2,y,8,,9,2\n")
    rows = read_rows(tmp_path / "table.csv")
    assert rows["tag"].to_pylist() == ["007", "8"] and rows["fps"].to_pylist() == [None, None]
    assert rows.schema.names[-3:] == ["unnamed", "a_b", "source"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "name\nx\n", "lacks the column id"),
        ("t.csv", "", "lacks the column id"),
        ("t.csv", "id,caption\na,b,c\n", "more values"),
        ("t.jsonl", '{"id": "a"\n', "line 1 of .* is damaged"),
        ("t.jsonl", '{"id": "a", "list": [1]}', "column list"),
        ("t.jsonl", "[1]", "row 1 of .* is no JSON object"),
        ("t.csv", "id,a.b,a_b\n1,2,3\n", "2 columns would be called a_b"),
        ("t.csv", "id,fps\n1,fast\n", "does not fit the column fps"),
        ("t.jsonl", '{"id": "a", "duration": [1]}', "does not fit the column duration"),
        ("t.jsonl", '{"id": "a", "n": 1180591620717411303424}', "cannot read"),
        ("t.parquet", "PAR1", "cannot read"),
        ("t.xlsx", "", "is no table"),
    ],
)
def test_tables_that_cannot_be(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


def test_bad_rows_are_left_out_by_number(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("id,caption,score\na,x,0.2\nb,y,0.3,z\nc,z,nan\n")
    rows = read_rows(tmp_path / "t.csv")
    assert rows["id"].to_pylist() == ["a", "c"] and rows["score"].to_pylist() == [0.2, None]
    assert "left out: row 2 of" in capsys.readouterr().err
    with pytest.raises(UserError, match="row 2 of"):
        read_rows(tmp_path / "t.csv", strict=True)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_what_is_absent_and_dates_and_decimals(tmp_path, kind):
    values = {"id": ["a", "b"], "score": [0.5, float("nan")], "name": ["nan", "x"], "day": ["2024-01-31", ""]}
    if kind == "parquet":
        days = pa.array([datetime.date(2024, 1, 31), None])
        prices = pa.array([decimal.Decimal("1.10"), None])
        pq.write_table(pa.table(values | {"day": days, "price": prices}), tmp_path / "t.parquet")
    elif kind == "csv":
        (tmp_path / "t.csv").write_text("id,score,name,day,price\na,0.5,nan,2024-01-31,1.10\nb,NaN,x,,N/A\n")
    else:
        lines = (
            '{"id": "a", "score": 0.5, "name": "nan", "day": "2024-01-31", "price": 1.10}\n'
            '{"id": "b", "score": NaN, "name": "x", "day": ""}'
        )
        (tmp_path / "t.jsonl").write_text(lines)
    rows = read_rows(tmp_path / f"t.{kind}")
    assert rows["score"].to_pylist() == [0.5, None] and rows["name"].to_pylist() == ["nan", "x"]
    assert rows["day"][0].as_py() == "2024-01-31" and rows["price"].to_pylist() == [1.1, None]
