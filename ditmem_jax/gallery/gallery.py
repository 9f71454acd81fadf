"""The state behind the page of a bank, without the page: every call sees what other people have changed."""

import dataclasses
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from ditmem_jax.bank.rows import rows_of_records
from ditmem_jax.bank.search import Bank
from ditmem_jax.bank.table import FIXED, Table
from ditmem_jax.config import Config
from ditmem_jax.data.record import Entry
from ditmem_jax.data.records import RecordReader
from ditmem_jax.data.sources import Videos
from ditmem_jax.encode.dataset import encode_dataset
from ditmem_jax.encode.engines import Local
from ditmem_jax.errors import UserError
from ditmem_jax.gallery.clips import Clips, Decoder, below
from ditmem_jax.gallery.map import Colours, colour, project
from ditmem_jax.models.wan.tokenizer import clean
from ditmem_jax.storage.files import cache_folder, make_folder, writing
from ditmem_jax.storage.weights import load_umt5, load_vae

POINTS = 2000  # of a map: more would hide each other
OWN = ("duration", "frames", "fps")  # columns of every bank that a map can be coloured by


@dataclasses.dataclass(frozen=True)
class About:
    """A bank at a version."""

    uri: str
    embedder: str
    rows: int
    version: int


@dataclasses.dataclass(frozen=True)
class Found:
    """Rows of a bank with their scores (None where nothing was asked), of the `left` that a filter leaves."""

    version: int
    rows: list[dict[str, Any]]
    scores: list[float | None]
    left: int


@dataclasses.dataclass(frozen=True)
class Version:
    number: int
    time: Any
    rows: int
    change: str


@dataclasses.dataclass(frozen=True)
class Map:
    """Points of a plane, from -1 to 1, for some or all of the `total` rows."""

    version: int
    points: np.ndarray
    ids: list[str]
    captions: list[str]
    colours: Colours
    total: int


class Gallery:
    """A bank and its clips.

    Args:
        config: of the networks that encode what is added; None for a bank that only grows elsewhere.
    Raises:
        UserError: here and in every method, with what to tell the person at the page.
    """

    def __init__(self, uri: str, clips: Clips, config: Config | None = None):
        self.clips, self._config = clips, config
        self._newest, self._old = Bank.open(uri), None
        self._lock = threading.RLock()  # pages are served by several threads
        self._encoding = threading.Lock()
        self._networks = None

    @classmethod
    def open(
        cls, uri: str, *, videos: str | None = None, config: Config | None = None, cache: str | None = None
    ) -> "Gallery":
        """A bank with its clips.

        Args:
            videos: folder of the originals.
            config: with a VAE that decodes what has no original, and a text encoder for what is added.
            cache: folder for decoded clips; by default the user's own.
        """
        if videos is not None and not Path(videos).is_dir():
            raise UserError(f"no folder {videos}", expected="the folder of the original videos")
        decoder = None if config is None else Decoder(config, Path(cache or cache_folder("clips")))
        own = Path(uri).resolve() / "added"  # resolved, as bank rows name folders of records
        return cls(uri, Clips(None if videos is None else Path(videos), own, decoder), config)

    def about(self, version: int | None = None) -> About:
        with self._lock:
            table = self._table(version)
            kind, name = (table.description.get(key) or "" for key in ("kind", "name"))
            embedder = kind if name in ("", kind) else f"{kind} {name}"
            return About(table.uri, embedder, len(table), table.version)

    def search(self, prompt: str, where: str = "", k: int = 12, version: int | None = None) -> Found:
        """The k rows nearest to a prompt that pass a filter, or fewer if there are not so many; without a prompt
        the first ones."""
        condition = where.strip() or None
        with self._lock:
            table = self._table(version)
        row_ids = table.row_ids(condition)  # without the lock: nobody waits for another's filter
        with self._lock:
            count = min(k, len(row_ids))
            if not count:
                return Found(table.version, [], [], 0)
            if not prompt.strip():
                rows = table.take(row_ids[:count]).to_pylist()
                return Found(table.version, rows, [None] * count, len(row_ids))
            results = self._bank(version).search([prompt], count, where=condition and row_ids)
            rows, scores = results.rows[0], results.scores[0].tolist()
            return Found(
                table.version, rows[: results.matched[0]], scores[: results.matched[0]], len(row_ids)
            )

    def row(self, name: str, version: int | None = None) -> dict[str, Any]:
        """The row of an id."""
        with self._lock:
            found = self._table(version).known([name]).to_pylist()
        if not found:
            raise UserError(f"the bank has no video {name[:100]!r} any more", fix="search again")
        return found[0]

    def versions(self) -> list[Version]:
        """The newest first."""
        with self._lock:
            listed = self._table(None).versions()
        before, versions = None, []
        for one in listed:
            versions.append(Version(one["version"], one["time"], one["rows"], _change(before, one["rows"])))
            before = one["rows"]
        return versions[::-1]

    def map(self, column: str | None = None, version: int | None = None) -> Map:
        """Where the vectors lie, the colours telling the values of a column."""
        with self._lock:
            table = self._table(version)
            if column is not None and column not in self.colourable(version):
                raise UserError(f"the bank has no column {column!r} any more", fix="choose another")
            row_ids = np.sort(table.row_ids())
            if (total := len(row_ids)) > POINTS:
                row_ids = np.random.default_rng(0).choice(row_ids, POINTS, replace=False)
            if not total:
                return Map(table.version, np.zeros((0, 2)), [], [], colour([]), 0)
            wanted = dict.fromkeys(["id", "caption", "vector", *([column] if column else [])])
            part = table.take(row_ids, list(wanted))
        vectors = np.stack(part["vector"].to_numpy())
        ids, captions = part["id"].to_pylist(), part["caption"].to_pylist()
        values = part[column].to_pylist() if column else [0.0] * len(ids)
        return Map(table.version, project(vectors), ids, captions, colour(values), total)

    def colourable(self, version: int | None = None) -> list[str]:
        """Columns that say something about the videos, those of the user's first."""
        with self._lock:
            columns = self._table(version).columns
        fixed = {field.name for field in FIXED}
        return [name for name in columns if name not in fixed] + list(OWN)

    def remove(self, name: str) -> None:
        """Removes a video from the newest version."""
        with self._lock:
            self.row(name)  # says that it is gone without looking for names like it
            self._bank(None).remove([name])

    @property
    def can_add(self) -> str:
        """Why nothing can be added here, or ""."""
        if self._config is None:
            return "To add videos, start the page with --config FILE: its VAE and text encoder encode them."
        if "://" in self._newest.table.uri:
            return "This bank is on an object store: add videos to it with encode and bank add."
        return ""

    def add(self, video: str | Path, caption: str) -> str:
        """Encodes a video into records of the bank's own, as `ditmem_jax.encode` does; returns its id."""
        if self.can_add:
            raise UserError(self.can_add)
        if not clean(caption):
            raise UserError("the caption is empty", expected="what the video shows, in words")
        original = Path(video)
        folder = self.clips.own / uuid.uuid4().hex
        make_folder(folder)
        try:
            with writing(folder / original.name):
                source = shutil.copyfile(original, folder / original.name).name
            below(folder, source)
            entry = Entry(self._free_id(source), caption, source)
            with self._encoding:
                self._networks = self._networks or (load_vae(self._config), load_umt5(self._config))
                rows, engine = Videos([folder]).rows([(entry, entry.source)]), Local(self._networks)
                encode_dataset(rows, folder / "records", self._config, engine, batch=1)
            self._check_making(RecordReader(folder / "records"))
            rows = rows_of_records([folder / "records"])
            with self._lock:
                self._bank(None).add(rows)
        except BaseException:
            shutil.rmtree(folder)  # nothing points into it
            raise
        return entry.id

    def _table(self, version: int | None) -> Table:
        """The newest version as others may have left it, or an older one."""
        if version is None:
            self._newest.refresh()
        elif version != self._newest.version:
            return Table.open(self._newest.table.uri, version)
        return self._newest.table

    def _bank(self, version: int | None) -> Bank:
        """The same with its vectors, for a search."""
        if (table := self._table(version)) is self._newest.table:
            return self._newest
        if self._old is None or self._old.version != version:
            self._old = Bank(table)
        return self._old

    def _free_id(self, name: str) -> str:
        """The name, or the first of name#2, name#3, ... that the bank does not have."""
        with self._lock:
            known = set(self._table(None).rows(columns=["id"])["id"].to_pylist())
        candidates = (name if number == 1 else f"{name}#{number}" for number in range(1, len(known) + 2))
        return next(candidate for candidate in candidates if candidate not in known)

    def _check_making(self, made: RecordReader) -> None:
        """Raises UserError if the bank's videos were encoded otherwise, since memories could not read both."""
        with self._lock:
            table = self._table(None)
            others = table.take(table.row_ids("records IS NOT NULL")[:1], ["records"])["records"].to_pylist()
        if others and (theirs := RecordReader(others[0]).meta) != made.meta:
            names = [
                name for name in made.meta.made_by if made.meta.made_by[name] != theirs.made_by.get(name)
            ]
            raise UserError(
                "the bank's videos were encoded with another config",
                expected=f"the {', '.join(names) or 'shape'} of {others[0]}",
                fix="start the page with the --config that made the bank",
            )


def _change(before: int | None, rows: int) -> str:
    if before is None:
        return f"built with {rows}"
    if rows == before:
        return "files or columns changed"  # see `Table.compact`
    return f"{rows - before} added" if rows > before else f"{before - rows} removed"
