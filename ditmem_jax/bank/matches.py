"""The references of a set of records, found once before training: `ditmem bank match RECORDS`.

No record is given itself, a clip of the same source, equal latents, or a near duplicate: a video whose caption is
closer than a threshold in the bank's own embedding, or that looks the same, by a sketch of its latents. The file `matches.parquet` beside the records holds a row per
record, and in its metadata where they were found and what was kept out.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32

from ditmem_jax.bank.search import DIGITS, QUERIES_AT_ONCE, WITH_RECORD, Bank, cosines
from ditmem_jax.bank.sketches import Sketches
from ditmem_jax.bank.table import Table
from ditmem_jax.data.record import Entry
from ditmem_jax.data.records import RecordReader
from ditmem_jax.data.references import Pointer, References
from ditmem_jax.errors import UserError
from ditmem_jax.progress import track
from ditmem_jax.storage.digests import of_json
from ditmem_jax.storage.files import parse_json, replacing

FILE = "matches.parquet"
LOOK_THE_SAME = 0.985
REASONS = ("itself", "same source", "equal latents", "near duplicate", "looks the same")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # of the record
        ("matches", pa.list_(pa.string())),  # ids in the bank, best first
        ("scores", pa.list_(pa.float32())),
        ("records", pa.list_(pa.string())),
        ("rows", pa.list_(pa.int32())),
        ("checksums", pa.list_(pa.string())),
    ]
)


@dataclasses.dataclass(frozen=True)
class Matches:
    """The k references of each record.

    Attributes:
        table: a row per record, see SCHEMA.
        bank, version: where they were found.
        records: digest of the list of the records.
        left_out: how many videos that would have been references were not, by reason.
        latents: correlation of latents above which videos look the same.
        wordless: how many references share no word with the caption of their record.
    """

    table: pa.Table
    bank: str
    version: int
    records: str
    k: int
    threshold: float
    left_out: Mapping[str, int]
    latents: float = 1.0
    wordless: int = 0

    def save(self, path: str | Path) -> None:
        about = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "table"}
        table = self.table.replace_schema_metadata({"ditmem_jax": json.dumps(about)})
        with replacing(Path(path), pa.ArrowException) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def load(cls, path: str | Path) -> "Matches":
        """Raises UserError for a file that `save` did not write."""
        try:
            table = pq.read_table(path)
            about = table.schema.metadata[b"ditmem_jax"]
            return cls(table, **parse_json(about.decode(), f"the schema of {path}"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"cannot read the matches in {path}", found=error, fix="match the records again"
            ) from error

    def warn_if_stale(self) -> None:
        """Says so if the bank has changed since."""
        if (version := Table.open(self.bank).version) != self.version:
            print(
                f"note: {len(self.table)} records are matched with version {self.version} of the bank {self.bank}, "
                f"which is at version {version}"
            )

    def found_in(self, uri: str) -> "Matches":
        """The same references, told by the checksums of their latents, where the bank at `uri` has them.

        Raises:
            UserError: if it lacks one of them, or has another video under its id.
        """
        ids = self.table["matches"].combine_chunks()
        flat = ids.flatten().to_pylist()
        rows = {row["id"]: row for row in Table.open(uri).by_id(sorted(set(flat))).to_pylist()}
        sums = self.table["checksums"].combine_chunks().flatten().to_pylist()
        for id, checksum in zip(flat, sums, strict=True):
            if (found := rows[id]["checksum"]) != checksum:
                raise UserError(
                    f"the bank {uri} holds another video under {id!r} than the one matched",
                    expected=f"latents of checksum {checksum}",
                    found=found,
                    fix="the bank that the records were matched with, wherever it lies now",
                )
        table = self.table
        for name, column in (("records", "records"), ("rows", "row")):
            field = SCHEMA.field(name)
            values = pa.array([rows[id][column] for id in flat], field.type.value_type)
            values = pa.ListArray.from_arrays(ids.offsets, values)
            table = table.set_column(table.schema.get_field_index(name), field, values)
        return dataclasses.replace(self, table=table, bank=uri, version=Table.open(uri).version)

    def references(self, k: int) -> tuple[References, Int32[np.ndarray, "n k"]]:
        """The videos, each once, and for each record which of them are its k best references."""
        columns = [self.table[name].combine_chunks().flatten() for name in ("records", "rows", "checksums")]
        names, checksums = columns[0].dictionary_encode(), columns[2].to_pylist()
        keys = names.indices.to_numpy().astype(np.int64) << 32 | columns[1].to_numpy()
        keys = keys.reshape(len(self.table), self.k)[:, :k]
        first = np.arange(len(self.table) * self.k).reshape(len(self.table), self.k)[:, :k].reshape(-1)
        found, where, index = np.unique(keys, return_index=True, return_inverse=True)
        folders = names.dictionary.to_pylist()
        pointers = [
            Pointer(folders[key >> 32], int(key & 0xFFFFFFFF), checksums[first[place]])
            for key, place in zip(found.tolist(), where.tolist(), strict=True)
        ]
        return References(pointers), index.reshape(keys.shape).astype(np.int32)


def digest(records: RecordReader) -> str:
    """The digest of the list of the records, in order."""
    listed = [
        [e.id, e.caption, e.source, sum] for e, sum in zip(records.entries, records.checksums, strict=True)
    ]
    return of_json(listed)


def find(
    records: RecordReader, bank: Bank, k: int, threshold: float = 0.98, latents: float = LOOK_THE_SAME
) -> Matches:
    """Finds the k references of each record, under a progress bar.

    Args:
        threshold: cosine of two captions above which the videos count as duplicates; 1 keeps all.
        latents: correlation of the sketches of two videos (see `bank.sketches`) above which they count as duplicates;
            1 keeps all, and saves reading all latents once.
    Raises:
        UserError: if too few are left for a record.
    """
    entries, checksums = records.entries, records.checksums
    left_out: collections.Counter[str] = collections.Counter(dict.fromkeys(REASONS, 0))
    rows: list[dict[str, Any]] = []
    sketches = Sketches(records, bank) if latents < 1 else None
    for start in track(range(0, len(entries), QUERIES_AT_ONCE), "matching"):
        group = slice(start, start + QUERIES_AT_ONCE)
        numbers = range(len(entries))[group]

        def looks(number: int, hits: Sequence[Mapping[str, Any]], numbers: range = numbers) -> np.ndarray:
            if sketches is None:
                return np.zeros(len(hits), bool)
            return sketches.correlations(numbers[number], hits) > latents

        found = _find(entries[group], checksums[group], bank, k, threshold, looks)
        for entry, (kept, reasons) in zip(entries[group], found, strict=True):
            left_out.update(reasons)
            rows.append({"id": entry.id} | {name: [hit[name] for hit in kept] for name in SCHEMA.names[1:]})
    uri = bank.table.uri if "://" in bank.table.uri else str(Path(bank.table.uri).resolve())
    table = pa.Table.from_pylist(rows, SCHEMA)
    scores = [score for row in rows for score in row["scores"]] if bank.by_words else []
    wordless = sum(round(score, DIGITS) == 0 for score in scores)
    return Matches(table, uri, bank.version, digest(records), k, threshold, dict(left_out), latents, wordless)


def _find(
    entries: Sequence[Entry],
    checksums: Sequence[str],
    bank: Bank,
    k: int,
    threshold: float,
    looks: Callable[[int, Sequence[Mapping[str, Any]]], np.ndarray],
) -> list[tuple[list[dict[str, Any]], list[str]]]:
    """For each record what is kept, and why what came before was not. Looks deeper until k are kept for each."""
    captions = [entry.caption for entry in entries]
    queries, documents = bank.embedder.queries(captions), bank.embedder.documents(captions)
    if wordless := [entry for entry, query in zip(entries, queries, strict=True) if not query.any()]:
        raise UserError(
            f"the caption of {wordless[0].id!r} has nothing to search for",
            expected="words", found=repr(wordless[0].caption), fix="encode without it, or with another caption",
        )  # fmt: skip
    most = len(bank.table.row_ids(WITH_RECORD))
    done: dict[int, tuple[list[dict[str, Any]], list[str]]] = {}
    depth = min(k + 8, most)
    while waiting := [i for i in range(len(entries)) if i not in done]:
        asked = [captions[i] for i in waiting] if bank.by_words else queries[waiting]
        results = bank.search_records(asked, max(depth, 1))
        hits = results.columns(["id", "source", "records", "row", "checksum"])
        for number, i in enumerate(waiting):
            near = cosines(documents[i], bank.vectors(results.places[number])) > threshold
            near = np.stack([near, looks(i, hits[number])], axis=1)
            kept, reasons = _keep(entries[i], checksums[i], hits[number], near, results.scores[number], k)
            if len(kept) == k:
                done[i] = kept, reasons
            elif depth == most:
                raise UserError(
                    f"the bank {bank.table.uri} cannot give {k} references for {entries[i].id!r}",
                    expected=f"1 to {len(kept)}: the bank holds {most} records"
                    + "".join(f", {reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons)),
                    found=k,
                    fix="fewer references, or more videos in the bank",
                )
        depth = min(2 * depth, most)
    return [done[i] for i in range(len(entries))]


def _keep(
    entry: Entry, own: str, hits: Sequence[Mapping[str, Any]], near: np.ndarray, scores: np.ndarray, k: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """The first k hits that a record may have as references, and the reasons of those passed over."""
    kept, reasons = [], []
    for hit, duplicate, score in zip(hits, near, scores, strict=True):
        checks = (
            hit["id"] == entry.id,
            hit["source"] == entry.source != "",
            hit["checksum"] == own,
            *map(bool, duplicate),
        )
        if any(checks):
            reasons.append(REASONS[checks.index(True)])
            continue
        columns = {"matches": "id", "records": "records", "rows": "row", "checksums": "checksum"}
        kept.append({name: hit[column] for name, column in columns.items()} | {"scores": float(score)})
        if len(kept) == k:
            break
    return kept, reasons


def read(records: RecordReader, bank: str, k: int, own: Path | None = None) -> Matches:
    """The matches of the records, from the file `own` where it exists, else from beside the records.

    Those in `own` may be of a bank at another place that holds the same videos.

    Raises:
        UserError: if there are none, or they are of other records, of another bank, or too few; with the command
            that makes them.
    """
    path = own if own is not None and own.exists() else records.folder / FILE
    command = f"ditmem bank match {records.folder} --bank {bank} --k {k}"
    if not path.exists():
        raise UserError(f"the records in {records.folder} have not been matched with a bank", fix=command)
    matches = Matches.load(path)
    uri = bank if "://" in bank else str(Path(bank).resolve())
    if path == own and matches.bank != uri and matches.records == digest(records):
        matches = matches.found_in(uri)
    now, then = (uri, digest(records)), (matches.bank, matches.records)
    if now != then or matches.k < k:
        raise UserError(
            f"the matches in {path} are not of these records and this bank",
            expected=f"bank {now[0]}, records {now[1][:12]}, at least {k} references",
            found=f"bank {then[0]}, records {then[1][:12]}, {matches.k} references",
            fix=command if path != own else "the records as they were, or another run.out",
        )
    return matches
