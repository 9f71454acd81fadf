"""The bank on disk: a LanceDB table of videos, local or on an object store, and the versions it went through.

A row is a video: `id` (unique), `caption`, `source`, its unit `vector`, `duration` in seconds, `frames`, `fps`, any
further columns of numbers or text (scores such as motion), and where its record is: the folder `records`, the `row`
in it and the `checksum` of its latents. `digest` is of all that, since Lance's files have no checksums; rows of
banks of earlier versions lack it. The table's own schema tells what made the vectors, so that a bank is there once its
first commit is, and whole.

Every change is one commit of Lance, which appears at once or not at all. Two writers never lose each other's rows:
the second to commit has its commit repeated on top of the first. That also keeps ids unique on object stores, since
`id` is declared as Lance's primary key and commits with equal keys conflict. In a folder a writer waits for another
one to end.

A commit that adds rows writes a fragment, a file that every later scan opens. Where there are many small ones, the
rows of all small ones move into a new one (`compact`), in a commit like any other: the older versions stay, and the
numbers of those rows change.
"""

import contextlib
import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, UInt64

from ditmem_jax.bank.embedders import Embedder
from ditmem_jax.bank.filters import checked
from ditmem_jax.errors import UserError, nearest
from ditmem_jax.storage.files import parse_json
from ditmem_jax.storage.locks import owned

FORMAT = 1
NAME = "videos"
ROWS_AT_ONCE = 1 << 14  # that are read or written: 48 MB of vectors of 768 numbers
SMALL_FRAGMENTS = 8  # beyond which their rows move into one
SMALL = 1 / 8  # of the rows of the bank: a fragment with fewer is small
PATIENCE = 30  # seconds that a writer waits for another one
KEY = {
    f"lance-schema:unenforced-primary-key{suffix}": value
    for suffix, value in (("", "true"), (":position", "1"))
}
FIXED = (
    pa.field("id", pa.string(), nullable=False, metadata=KEY),
    pa.field("caption", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("duration", pa.float32()),
    pa.field("frames", pa.int32()),
    pa.field("fps", pa.float32()),
    pa.field("records", pa.string()),
    pa.field("row", pa.int32()),
    pa.field("checksum", pa.string()),
    pa.field("digest", pa.string()),
)


class Table:
    """One version of a bank; changes move it to the version that they make. See `open` and `create`.

    Attributes:
        description: of the embedder that made the vectors, by `Embedder.describe`.
        words: word counts of a lexical embedder; otherwise empty.
        digests: every row has a digest; in a bank that an earlier version began some may not.
    """

    def __init__(self, uri: str, table: lancedb.table.Table, older: bool = False):
        self.uri, self._table, self._older = uri, table, older
        text = (table.schema.metadata or {}).get(b"ditmem_jax", b"{}").decode(errors="replace")
        stored = parse_json(text, f"the schema of the bank {uri}")
        if not isinstance(stored, dict) or not isinstance(stored.get("embedder", {}), dict):
            raise UserError(f"the schema of the bank {uri} is damaged", found=text[:200])
        if stored.get("format") != FORMAT:
            raise UserError(
                f"the bank {uri} has another format",
                expected=f"format {FORMAT}",
                found=f"format {stored.get('format')}",
                fix="the version of ditmem_jax that made it",
            )
        if missing := {"embedder", "words"} - stored.keys():
            raise UserError(f"the schema of the bank {uri} is damaged", found=f"no {', '.join(missing)}")
        self.description: dict[str, Any] = stored["embedder"]
        self.words: dict[str, int] = stored["words"]
        self.digests: bool = stored.get("digests", False)

    @classmethod
    def open(cls, uri: str | Path, version: int | None = None) -> "Table":
        """The newest version of a bank, or an older one, which cannot be changed.

        Raises:
            UserError: if there is none, or it is of a newer format.
        """
        uri = str(uri)
        build = f"ditmem bank build --bank {uri} --records RECORDS"
        if "://" not in uri and not (Path(uri) / f"{NAME}.lance").exists():
            raise UserError(f"no bank at {uri}", fix=build)
        with lance_errors(f"cannot open the bank {uri}", fix=build):
            table = lancedb.connect(uri).open_table(NAME)
        if version is not None:
            if not 0 < version < 2**63:
                raise UserError(f"the bank {uri} has no version {version}", expected="1 or more")
            with lance_errors(
                f"the bank {uri} has no version {version}",
                fix=f"ditmem bank versions --bank {uri} lists them",
            ):
                table.checkout(version)
        return cls(uri, table, older=version is not None)

    @classmethod
    def exists(cls, uri: str | Path) -> bool:
        """Return True where there is a bank that can be opened."""
        try:
            cls.open(uri)
        except UserError:
            return False
        return True

    @classmethod
    def create(
        cls, uri: str | Path, embedder: Embedder, rows: pa.Table, vectors: np.ndarray | None = None
    ) -> "Table":
        """A new bank of the given rows (see `conform`), in one commit.

        Args:
            vectors: [N, D], perhaps mapped from a file; by default the embedder's of the captions.
        Raises:
            UserError: if there is a bank at `uri`, or the rows do not make one.
        """
        uri = str(uri)
        with _alone(uri, wait=0):  # two would overwrite each other
            return cls._create(uri, embedder, rows, vectors)

    @classmethod
    def _create(cls, uri: str, embedder: Embedder, rows: pa.Table, vectors: np.ndarray | None) -> "Table":
        if cls.exists(uri):
            raise UserError(f"there is a bank at {uri}", fix="another folder, or add to that bank")
        stored = {
            "format": FORMAT,
            "embedder": embedder.describe(),
            "words": dict(getattr(embedder, "frequency", {})),
            "digests": True,
        }
        further = [field for field in rows.schema if field.name not in {fixed.name for fixed in FIXED}]
        fields = [*FIXED, *further, pa.field("vector", pa.list_(pa.float32(), embedder.dim), nullable=False)]
        schema = pa.schema(fields, metadata={"ditmem_jax": json.dumps(stored, ensure_ascii=False)})
        rows = conform(rows, schema)
        with (
            _written(rows, vectors, embedder, schema) as reader,
            lance_errors(f"cannot build the bank {uri}"),
        ):
            table = lancedb.connect(uri).create_table(NAME, reader)
        return cls(uri, table)

    def __len__(self) -> int:
        with lance_errors(f"cannot read the bank {self.uri}"):
            return self._table.count_rows()

    @property
    def version(self) -> int:
        return self._table.version

    @property
    def dim(self) -> int:
        return self._table.schema.field("vector").type.list_size

    @property
    def columns(self) -> list[str]:
        """All but the vector."""
        return [name for name in self._table.schema.names if name != "vector"]

    def add(self, rows: pa.Table, embedder: Embedder, vectors: np.ndarray | None = None) -> None:
        """Adds all of the rows, in one commit.

        Columns new to the bank become columns of it first, in a commit of their own: without values, should the
        rows then not follow.

        Raises:
            UserError: if the embedder is another than the bank's, or a row does not fit or has an id of another:
                no row is added then. Also if another writer added the same id at the same moment: all other rows
                are in then; and if another process does not let go of the bank.
        """
        with _alone(self.uri):
            self._add(rows, embedder, vectors)
            self._gather()

    def _add(self, rows: pa.Table, embedder: Embedder, vectors: np.ndarray | None) -> None:
        if (ours := embedder.describe()) != self.description:
            raise UserError(
                f"the bank {self.uri} was built with another embedder",
                expected=self.description, found=ours, fix="add with that one, or build another bank",
            )  # fmt: skip
        self._newest()
        schema = self._table.schema
        known = [*rows.schema, *(field for field in FIXED if field.name not in rows.schema.names)]
        new = [
            field for field in known if field.name not in schema.names
        ]  # banks of earlier versions lack some
        rows = conform(rows, pa.schema([*schema, *new]))
        if there := self.known(rows["id"].to_pylist(), ["id"])["id"].to_pylist():
            raise UserError(
                f"the bank holds {len(there)} of these {len(rows)} videos already; none was added",
                found=", ".join(map(repr, there[:5])),
                fix="leave them out, or remove them first",
            )
        if new:
            with lance_errors(f"cannot add columns to the bank {self.uri}", fix="try once more"):
                self._table.add_columns(new)
        with (
            _written(rows, vectors, embedder, self._table.schema) as reader,
            lance_errors(f"cannot add to the bank {self.uri}"),
        ):
            done = self._table.merge_insert("id").when_not_matched_insert_all().execute(reader)
        if done.num_inserted_rows < len(rows):
            raise UserError(
                f"another writer added {len(rows) - done.num_inserted_rows} videos of the same ids meanwhile",
                expected=f"{len(rows)} added", found=f"{done.num_inserted_rows} added",
            )  # fmt: skip

    def remove(self, ids: Sequence[str] | None = None, where: str | None = None) -> int:
        """Removes the rows of the given ids, or those that a filter leaves, in one commit; tells how many.

        Raises:
            UserError: if there is no row of one of the ids (nothing is removed then), the filter does not parse, or
                another process does not let go of the bank.
        """
        with _alone(self.uri):
            return self._remove(ids, where)

    def _remove(self, ids: Sequence[str] | None, where: str | None) -> int:
        self._newest()
        if ids is not None:
            self.by_id(ids)
            where = _among(ids)
        elif where is not None:
            where = checked(where, self.columns)
        if not len(self._select(where, ["_rowid"])):
            return 0
        with lance_errors(f"cannot remove from the bank {self.uri}"):
            return self._table.delete(where).num_deleted_rows  # pyright: ignore[reportAttributeAccessIssue]  # not in the stub

    def compact(self, older_than: datetime.timedelta | None = None) -> int:
        """Brings all rows into as few files as can be, in one commit; tells how many fragments are left.

        Args:
            older_than: age of the versions that are deleted for good, with the files that only they need; the
                newest stays whatever its age. None keeps all.
        Raises:
            UserError: for an older version, or if another process does not let go of the bank.
        """
        with _alone(self.uri), lance_errors(f"cannot compact the bank {self.uri}"):
            self._newest()
            age = datetime.timedelta(days=36500) if older_than is None else older_than
            self._table.optimize(cleanup_older_than=age)
            self._table.checkout_latest()
            return self._fragments()

    def _fragments(self) -> int:
        return self._table.stats()["fragment_stats"]["num_fragments"]  # pyright: ignore[reportIndexIssue]  # a dict

    def _gather(self) -> None:
        """Moves the rows of the small fragments into one, where there are many."""
        with lance_errors(f"the rows are in, but cannot compact the bank {self.uri}", fix="bank compact"):
            if self._fragments() <= SMALL_FRAGMENTS:
                return
            rows = self._table.search().select(["_rowid", "_rowaddr"]).to_arrow()
            numbers, counts = np.unique(rows["_rowaddr"].to_numpy() >> np.uint64(32), return_counts=True)
            small = numbers[counts < SMALL * len(rows)]
            if len(small) <= SMALL_FRAGMENTS:
                return
            moved = np.isin(rows["_rowaddr"].to_numpy() >> np.uint64(32), small)
            taken = self.take(rows["_rowid"].to_numpy()[moved], self._table.schema.names)
            taken = taken.cast(self._table.schema)
            self._table.merge_insert("id").when_matched_update_all().execute(taken)

    def refresh(self) -> None:
        """Moves on to the newest version, which another writer may have made; not from an older one on purpose."""
        if self._older:
            return
        with lance_errors(f"cannot read the bank {self.uri}"):
            self._table.checkout_latest()

    def _newest(self) -> None:
        if self._older:
            raise UserError(
                f"version {self.version} of the bank {self.uri} is an older version, which cannot change",
                fix="leave out the version",
            )
        self.refresh()

    def versions(self) -> list[dict[str, Any]]:
        """Number, time and count of rows of each version, the oldest first."""
        with lance_errors(f"cannot read the bank {self.uri}"):
            return self._versions()

    def _versions(self) -> list[dict[str, Any]]:
        return [
            {"version": v["version"], "time": v["timestamp"], "rows": int(v["metadata"]["total_rows"])}
            for v in self._table.list_versions()
        ]

    def rows(self, where: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows that a filter such as "motion > 0.5" leaves, without vectors.

        Raises:
            UserError: if the filter is none (see `bank.filters`) or names an unknown column.
        """
        return self._filtered(where, self.columns if columns is None else list(columns))

    def known(self, ids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of those of the ids that are there, in any order, without vectors."""
        return self._select(_among(ids), self.columns if columns is None else list(columns))

    def by_id(self, ids: Sequence[str]) -> pa.Table:
        """The rows of these ids in this order, without vectors.

        Raises:
            UserError: if one is not there.
        """
        found = self.known(ids)
        order = pc.index_in(pa.array(ids, pa.string()), found["id"])
        if order.null_count:
            missing = [name for name, place in zip(ids, order, strict=True) if not place.is_valid]
            raise UserError(
                f"the bank {self.uri} has no video {missing[0]!r}",
                expected=nearest(missing[0], self.rows(columns=["id"])["id"][:1000].to_pylist()),
                found=f"{len(missing)} of {len(ids)} are not there",
            )
        return found.take(order)

    def row_ids(self, where: str | None = None) -> UInt64[np.ndarray, " N"]:
        """Lance's numbers of the rows that a filter leaves. A number stands for one row, which may get another one."""
        return self._filtered(where, ["_rowid"])["_rowid"].to_numpy()

    def take(self, row_ids: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of these numbers in this order, without vectors unless named."""
        row_ids = [int(number) for number in row_ids]
        columns = self.columns if columns is None else list(columns)
        with lance_errors(f"cannot read the bank {self.uri}"):
            found = (
                self._table.take_row_ids(sorted(set(row_ids))).select(list({*columns, "_rowid"})).to_arrow()
            )
        order = pc.index_in(pa.array(row_ids, pa.uint64()), found["_rowid"])
        if order.null_count:
            raise UserError("a video was removed from the bank meanwhile", fix="search once more")
        return found.take(order).select(columns)

    def blocks(self, columns: Sequence[str] = ("id", "vector")) -> Iterator[pa.Table]:
        """`_rowid` and these columns of all rows, some at a time: a plain scan reads far ahead into memory."""
        size = ROWS_AT_ONCE

        def read(start: int) -> pa.Table:
            with lance_errors(f"cannot read the bank {self.uri}"):
                query = self._table.search().select(["_rowid", *columns])
                return query.offset(start).limit(size).to_batches(batch_size=size).read_all()

        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(read, 0)
            for start in range(0, len(self), size):
                part, waiting = waiting.result(), pool.submit(read, start + size)
                yield part

    def _filtered(self, where: str | None, columns: list[str]) -> pa.Table:
        return self._select(None if where is None else checked(where, self.columns), columns)

    def _select(self, where: str | None, columns: list[str]) -> pa.Table:
        """The rows of a filter that is checked, or made here."""
        query = self._table.search().select(columns)
        if where is None:
            with lance_errors(f"cannot read the bank {self.uri}"):
                return query.to_arrow()
        with lance_errors(
            f"the filter {where[:200]!r} does not fit the bank {self.uri}",
            expected=f"comparisons that fit the columns {', '.join(self.columns)}",
        ):
            return query.where(where).to_arrow()


def cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """The column in the type of the field; a blank text is no number, and so absent.

    Raises:
        UserError: if a value does not fit.
    """
    try:
        if pa.types.is_string(column.type) and not pa.types.is_string(field.type):
            blank = pc.equal(pc.utf8_trim_whitespace(column), "")
            column = pc.if_else(blank, pa.scalar(None, pa.string()), column)
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:  # of a value, of a type such as lists
        raise UserError(
            f"a value does not fit the column {field.name}", expected=str(field.type), found=error
        ) from error


def conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the columns of the schema but for the vector, absent values null, numbers and texts cast.

    Raises:
        UserError: for a value that does not fit its column, or an id that is absent or there twice.
    """
    columns = []
    for field in schema:
        if field.name == "vector":
            continue
        if field.name not in rows.schema.names:
            if not field.nullable:
                raise UserError(f"the rows lack the column {field.name}", found=", ".join(rows.schema.names))
            columns.append(pa.nulls(len(rows), field.type))
            continue
        column = cast(rows[field.name], field)
        if column.null_count and not field.nullable:
            raise UserError(f"a row has no {field.name}", found=f"{column.null_count} of {len(rows)} rows")
        columns.append(column)
    if bad := [name for name in schema.names if not name or set(name) & set(".`") or name.startswith("_row")]:
        raise UserError(
            f"no column of a bank can be called {bad[0]!r}",
            expected="a name without . and `, that does not begin with _row",
        )
    if not len(rows):
        raise UserError("there are no videos", expected="at least one row")
    rows = pa.table(columns, pa.schema([field for field in schema if field.name != "vector"]))
    counts = pc.value_counts(rows["id"])
    if twice := [item["values"].as_py() for item in counts.filter(pc.greater(counts.field("counts"), 1))[:5]]:
        raise UserError("videos have equal ids", expected="one row per id", found=", ".join(map(repr, twice)))
    return rows


def to_matrix(vectors: pa.ChunkedArray) -> Float32[np.ndarray, "n D"]:
    """Arrow's lists of equal length as a matrix, on Arrow's own memory where that is in one piece."""
    width = vectors.type.list_size
    parts = [chunk.flatten().to_numpy().reshape(-1, width) for chunk in vectors.chunks]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def digests_of(rows: pa.Table) -> list[str]:
    """Of each row, with its vector: a digest of all that is there but the digest. Columns that are added later,
    without a value, do not change it."""
    vectors = to_matrix(rows["vector"])
    texts = rows.drop_columns(
        [name for name in ("vector", "digest") if name in rows.schema.names]
    ).to_pylist()
    found = []
    for row, vector in zip(texts, vectors, strict=True):
        there = sorted((name, value) for name, value in row.items() if value is not None)
        digest = hashlib.blake2b(json.dumps(there).encode(), digest_size=16)
        digest.update(vector.tobytes())
        found.append(digest.hexdigest())
    return found


def unit(vectors: np.ndarray, names: Sequence[str] | pa.ChunkedArray) -> Float32[np.ndarray, "n D"]:
    """The vectors at length 1; those that have it already, and zeros, as they are.

    Raises:
        UserError: for a number that is not finite, with the name of the row.
    """
    vectors = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise UserError(
            f"the vector of {str(names[int(np.flatnonzero(~np.isfinite(norms))[0])])!r} is not finite",
            fix="leave that row out",
        )
    near = (np.abs(norms - 1) < 1e-6) | (norms == 0)
    return vectors if near.all() else (vectors / np.where(near, 1, norms)).astype(np.float32)


@contextlib.contextmanager
def _written(
    rows: pa.Table, vectors: np.ndarray | None, embedder: Embedder, schema: pa.Schema
) -> Iterator[pa.RecordBatchReader]:
    """Rows with their vectors as a stream. Arrow loses the error of a stream that fails; it is raised here."""
    if vectors is not None and vectors.shape != (len(rows), embedder.dim):
        raise UserError(
            "vectors and rows do not go together",
            expected=f"vectors {[len(rows), embedder.dim]}",
            found=f"vectors {list(vectors.shape)}",
        )
    failed = []

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                part = rows[start : start + ROWS_AT_ONCE].combine_chunks()
                found = vectors[start : start + ROWS_AT_ONCE] if vectors is not None else None
                found = embedder.documents(part["caption"].to_pylist()) if found is None else found
                flat = pa.array(unit(found, part["id"]).reshape(-1))
                columns = {"vector": pa.FixedSizeListArray.from_arrays(flat, embedder.dim)}
                columns |= {name: part[name].chunk(0) for name in part.schema.names}
                columns["digest"] = pa.array(digests_of(pa.table(columns)), pa.string())
                yield pa.record_batch([columns[name] for name in schema.names], schema)
        except UserError as error:
            failed.append(error)
            raise

    try:
        yield pa.RecordBatchReader.from_batches(schema, batches())
    except UserError as error:
        raise (failed or [error])[0] from None


@contextlib.contextmanager
def lance_errors(what: str, **advice: str) -> Iterator[None]:
    """Raises what LanceDB raises as a UserError that says `what`."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, OverflowError, TypeError) as error:
        found = str(error).split(", /")[0].strip().splitlines()[:1]  # without places in Lance's source
        raise UserError(what, found=found[0] if found else repr(error), **advice) from error


def _alone(uri: str, wait: int | None = None) -> contextlib.AbstractContextManager[None]:
    """Hold the folder of a bank, after PATIENCE or `wait` seconds; on object stores Lance's commits see to all."""
    return contextlib.nullcontext() if "://" in uri else owned(uri, PATIENCE if wait is None else wait)


def _among(ids: Iterable[str]) -> str:
    """The filter that leaves these ids."""
    listed = ", ".join("'" + text.replace("'", "''") + "'" for text in ids)
    return f"id IN ({listed})" if listed else "false"
