"""The table on disk: what goes in comes out, each change is one version, and what cannot be is refused whole."""

import datetime
import json
import multiprocessing
import subprocess
import sys

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from ditmem_jax.bank import table as tables
from ditmem_jax.bank.embedders import make_embedder
from ditmem_jax.bank.rows import further
from ditmem_jax.bank.table import FORMAT, SMALL_FRAGMENTS, Table, to_matrix
from ditmem_jax.bank.verify import check
from ditmem_jax.errors import UserError
from ditmem_jax.storage.locks import owned

DIM = 4
HARD = {
    "it's": 'she said "it\'s"; -- DROP TABLE videos',
    "new\nline": "two\nlines\r\nand\ta tab",
    "🎈": "a ball 🎈 falls, e\u0301 is é, \u2028 too",
    "كرة": "كرة تسقط على كوكب زورفكس",
    "long": "word " * 2000,
    "back`tick": "100% of `a_b` \\ / {}",
}


def rows(*ids, **columns):
    table = pa.table({"id": pa.array(ids, pa.string()), "caption": [f"caption of {id}" for id in ids]})
    table = table.append_column("source", [[f"{id}.mp4" for id in ids]])
    for name, values in further(columns).items():
        table = table.append_column(name, values)
    return table


def vectors(count, seed=0):
    x = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


EMBEDDER = make_embedder("vectors", [], DIM)


def create(path, *ids, **columns):
    return Table.create(path, EMBEDDER, rows(*ids, **columns), vectors(len(ids)))


def ids(table, where=None):
    return sorted(table.rows(where, ["id"])["id"].to_pylist())


def test_round_trip_of_hard_texts(tmp_path):
    embedder = make_embedder("lexical", HARD.values())
    given = pa.table(
        {"id": list(HARD), "caption": list(HARD.values()), "source": list(HARD), "note": list(HARD.values())}
    )
    Table.create(tmp_path / "bank", embedder, given)
    table = Table.open(tmp_path / "bank")
    assert table.by_id(list(HARD)).select(given.schema.names).to_pydict() == given.to_pydict()
    assert table.words == embedder.frequency and table.description == embedder.describe()
    for id in HARD:
        assert table.by_id([id])["caption"].to_pylist() == [HARD[id]]
    assert table.remove(list(HARD)[:-1]) == len(HARD) - 1 and ids(table) == [list(HARD)[-1]]


def test_versions(tmp_path):
    table = create(tmp_path, "a", "b")
    table.add(rows("c"), EMBEDDER, vectors(1))
    assert table.remove(where="id = 'a'") == 1 and table.remove(where="id = 'a'") == 0
    assert [v["rows"] for v in table.versions()] == [2, 3, 2]
    assert [ids(Table.open(tmp_path, v)) for v in (1, 2, 3)] == [["a", "b"], ["a", "b", "c"], ["b", "c"]]
    with pytest.raises(UserError, match="no version 9"):
        Table.open(tmp_path, 9)
    with pytest.raises(UserError, match="older version"):
        Table.open(tmp_path, 1).add(rows("d"), EMBEDDER, vectors(1))


def test_a_reader_keeps_its_version(tmp_path):
    writer = create(tmp_path, "a", "b")
    reader = Table.open(tmp_path)
    writer.remove(["a"])
    assert ids(reader) == ["a", "b"] and reader.version == 1
    reader.refresh()
    assert ids(reader) == ["b"]


def test_vectors_come_out_as_they_went_in(tmp_path, monkeypatch):
    monkeypatch.setattr("ditmem_jax.bank.table.ROWS_AT_ONCE", 7)
    given = vectors(50)
    given[7] = 0
    names = [f"{i:02}" for i in range(50)]
    table = Table.create(tmp_path, EMBEDDER, rows(*names), np.concatenate([given[:25], 3 * given[25:]]))
    found = table.take(table.row_ids(), ["id", "vector"])
    assert found["id"].to_pylist() == names
    np.testing.assert_array_equal(to_matrix(found["vector"])[:25], given[:25])
    np.testing.assert_allclose(to_matrix(found["vector"]), given, atol=1e-7)
    blocks = list(table.blocks())
    assert [len(block) for block in blocks] == [7] * 7 + [1]
    np.testing.assert_array_equal(to_matrix(pa.concat_tables(blocks)["vector"]), to_matrix(found["vector"]))


def test_columns_of_scores(tmp_path):
    table = create(tmp_path, "a", "b", "c", motion=["0.5", " 2 ", ""], kind=["1", "x", ""])
    assert ids(table, "motion > 0.5") == ["b"] and ids(table, "Motion IS NULL OR kind = '1'") == ["a", "c"]
    table.add(rows("d", light=["7"]), EMBEDDER, vectors(1))
    assert table.by_id(["a", "d"])["light"].to_pylist() == [None, 7]
    assert table.by_id(["d"])["motion"].to_pylist() == [None]
    with pytest.raises(UserError, match="does not fit the column motion"):
        table.add(rows("e", motion=["fast"]), EMBEDDER, vectors(1))
    assert len(table) == 4


@pytest.mark.parametrize("where", ["motio > 1", "motion >", "motion > 'x'", "; DROP TABLE videos", "motion"])
def test_filters_that_do_not_fit_show_the_columns(tmp_path, where):
    table = create(tmp_path, "a", motion=["0.5"])
    with pytest.raises(UserError, match=r"does not fit the bank(.|\n)*caption.*motion"):
        table.rows(where)
    with pytest.raises(UserError, match="does not fit the bank"):
        table.remove(where=where)
    assert len(table) == 1


def test_what_does_not_fit_is_refused_whole(tmp_path):
    table = create(tmp_path, "a", "b")
    other = make_embedder("vectors:other", [], DIM)
    bad = vectors(2)
    bad[1, 2] = np.nan
    for given, found, embedder, message in (
        (rows("c", "a"), vectors(2), EMBEDDER, "holds 1 of these 2 videos already(.|\n)*'a'"),
        (rows("c", "c"), vectors(2), EMBEDDER, "equal ids"),
        (rows("c", "d"), vectors(3), EMBEDDER, "do not go together"),
        (rows("c", "d"), bad, EMBEDDER, "vector of 'd' is not finite"),
        (rows("c"), vectors(1), other, "built with another embedder"),
        (rows(), vectors(0), EMBEDDER, "no videos"),
        (rows("c").drop_columns("caption"), vectors(1), EMBEDDER, "lack the column caption"),
        (rows("c"), None, EMBEDDER, "cannot embed text"),
    ):
        with pytest.raises(UserError, match=message):
            table.add(given, embedder, found)
    with pytest.raises(UserError, match="no video 'z'"):
        table.remove(["a", "z"])
    assert ids(Table.open(tmp_path)) == ["a", "b"]
    with pytest.raises(UserError, match="there is a bank"):
        create(tmp_path, "c")
    with pytest.raises(UserError, match="no bank at"):
        Table.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_failed_build_leaves_no_bank(tmp_path):
    with pytest.raises(UserError, match="cannot embed text"):
        Table.create(tmp_path / "bank", EMBEDDER, rows("a"))
    with pytest.raises(UserError, match="bank"):
        Table.open(tmp_path / "bank")
    assert len(create(tmp_path / "bank", "a")) == 1


def test_a_newer_format_is_refused(tmp_path):
    schema = pa.schema([("id", pa.string())], metadata={"ditmem_jax": json.dumps({"format": FORMAT + 1})})
    lancedb.connect(tmp_path).create_table("videos", schema=schema)
    with pytest.raises(UserError, match=f"format {FORMAT + 1}"):
        Table.open(tmp_path)


def write(path, name, same, barrier):
    table = Table.open(path)
    barrier.wait()
    for part in range(5):
        table.add(rows(*(f"{name}-{part}-{i}" for i in range(20))), EMBEDDER, vectors(20))
    try:
        table.add(rows(*same), EMBEDDER, vectors(len(same)))
    except UserError as error:
        assert "already" in str(error) or "meanwhile" in str(error)


@pytest.mark.slow
def test_two_writers_lose_nothing_and_ids_stay_unique(tmp_path):
    create(tmp_path, "a")
    context = multiprocessing.get_context("spawn")
    barrier, same = context.Barrier(2), [f"same-{i}" for i in range(20)]
    processes = [context.Process(target=write, args=(tmp_path, name, same, barrier)) for name in "xy"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    own = [f"{name}-{part}-{i}" for name in "xy" for part in range(5) for i in range(20)]
    assert ids(Table.open(tmp_path)) == sorted(["a", *own, *same])


FULL = """
import resource, signal, sys
from tests.bank.test_table import EMBEDDER, Table, UserError, rows, vectors
table = Table.open(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    table.add(rows(*(f"new-{i}" for i in range(20_000))), EMBEDDER, vectors(20_000))
except UserError as error:
    sys.exit(f"told: {error}")
"""


@pytest.mark.slow
def test_a_full_disk_is_told_and_loses_nothing(tmp_path):
    create(tmp_path, "a", "b")
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("told: cannot add to the bank"), done.stderr
    table = Table.open(tmp_path)
    assert ids(table) == ["a", "b"] and check(table) == []


@pytest.mark.parametrize("name", ["a`b", "a.b", "", "_rowid"])
def test_columns_that_lance_cannot_read_again_are_refused(tmp_path, name):
    odd = rows("a").append_column(name, [[1.0]])
    with pytest.raises(UserError, match="no column of a bank can be called"):
        Table.create(tmp_path, EMBEDDER, odd, vectors(1))
    table = create(tmp_path, "b")
    with pytest.raises(UserError, match="no column of a bank can be called"):
        table.add(odd, EMBEDDER, vectors(1))
    assert ids(table) == ["b"] and check(table) == []


@pytest.mark.parametrize("version", [-1, 0, 9, 2**64, 10**25])
def test_versions_that_are_not_there(tmp_path, version):
    create(tmp_path, "a")
    with pytest.raises(UserError, match=f"no version {version}"):
        Table.open(tmp_path, version)


def test_a_bank_that_grows_row_by_row_stays_in_few_files(tmp_path):
    table = create(tmp_path, *(f"old {i}" for i in range(40)), motion=["0.5"] * 40)
    for i in range(3 * SMALL_FRAGMENTS):
        table.add(rows(f"new {i}", motion=["1"]), EMBEDDER, vectors(1, seed=i))
        assert table._fragments() <= SMALL_FRAGMENTS + 3
    names = [f"new {i}" for i in range(3 * SMALL_FRAGMENTS)]
    assert ids(table, "motion > 0.6") == sorted(names) and len(table) == 40 + len(names)
    found = table.take(table.row_ids(), ["id", "vector"])
    place = found["id"].to_pylist().index("new 3")
    np.testing.assert_allclose(to_matrix(found["vector"])[place], vectors(1, seed=3)[0], atol=1e-7)
    assert check(table) == [] and ids(Table.open(tmp_path, 1)) == sorted(f"old {i}" for i in range(40))

    assert table.compact() == 1 and ids(table, "motion > 0.6") == sorted(names) and check(table) == []
    assert ids(Table.open(tmp_path, 1)) == sorted(f"old {i}" for i in range(40))
    table.compact(datetime.timedelta(0))
    assert [version["rows"] for version in table.versions()][-1] == len(table)
    with pytest.raises(UserError, match="no version 1"):
        Table.open(tmp_path, 1)


def test_rows_that_were_altered_are_found(tmp_path):
    table = create(tmp_path, "a", "b", "c", motion=["0.5", "1", ""])
    table.add(rows("d", light=["7"]), EMBEDDER, vectors(1))  # a new column, in which the others have nothing
    assert check(table) == []
    for column, value in (("caption", "'x'"), ("motion", "0.25"), ("digest", "'0'"), ("digest", "NULL")):
        version = table.version
        table._table.update(where="id = 'b'", values_sql={column: value})
        table.refresh()
        (fault,) = check(table)
        assert "'b' was altered" in fault
        table._table.checkout(version)
        table._table.restore()


def test_a_bank_that_another_process_changes_is_waited_for_and_then_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PATIENCE", 0)
    table = create(tmp_path / "bank", "a")
    with owned(tmp_path / "bank"):
        for change in (
            lambda: table.add(rows("b"), EMBEDDER, vectors(1)),
            lambda: table.remove(["a"]),
            table.compact,
            lambda: create(tmp_path / "bank", "c"),
        ):
            with pytest.raises(UserError, match=r"bank is in use(.|\n)*holds it since"):
                change()
    table.add(rows("b"), EMBEDDER, vectors(1))
    assert ids(table) == ["a", "b"]
