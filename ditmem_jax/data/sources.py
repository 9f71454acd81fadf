"""The videos of a user: a table that says what they show, and the places where their files lie.

A table is CSV, TSV, JSON (lines or an array) or parquet (see `data.tables`), which may hold the files themselves. A
place is a folder, a zip or tar file (also compressed, and as webdataset writes them), or a folder of input records
(see `data.places`); without a table each video takes its caption from a file beside it (`a.mp4` with `a.txt`,
`a.caption` or `a.json`).
"""

import collections
import dataclasses
import functools
import glob
import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ditmem_jax.data import tables
from ditmem_jax.data.decode import SUFFIXES
from ditmem_jax.data.places import (
    INPUT_RECORDS,
    InFolder,
    InParquet,
    Place,
    list_archive,
    list_folder,
    list_input_records,
)
from ditmem_jax.data.record import Entry
from ditmem_jax.data.video import Clip, Part, read_clip
from ditmem_jax.errors import UserError
from ditmem_jax.models.wan.tokenizer import clean
from ditmem_jax.storage.files import parse_json

LONGEST = 1 << 20  # bytes of a caption
# Names of columns that are in use, the first that is there counts.
VIDEO = (
    "video", "video_path", "file_name", "filename", "file_path", "filepath", "file", "path", "clip_path", "clip", "mp4",
    "media_path", "media", "video_file", "video_name",
)  # fmt: skip
CAPTION = ("caption", "text", "prompt", "description", "captions", "sentence", "long_caption", "txt")
BESIDE = (".txt", ".caption", ".json")  # files of captions


# --- tables -----------------------------------------------------------------------------------------------------


def read_table(
    path: str | Path, video: str | None = None, caption: str | None = None
) -> list[tuple[Entry, "str | Place | UserError"]]:
    """The rows of a table of videos and captions, and the video of each; rows that cannot be read come last.

    A column `source` says what each video was cut from, else it stands for itself; other columns become `extra`. The
    id of a row is its video, with #2, #3, ... for further rows of the same video.

    Args:
        video: the column of the videos' paths or files, by default the first of `VIDEO` that is there.
        caption: the column of captions, by default the first of `CAPTION`.
    Raises:
        UserError: if the file is no such table.
    """
    table = tables.read(path)
    names = [
        _column(table, "video", VIDEO, video),
        _column(table, "caption", CAPTION, caption),
        "source",
    ]
    if not table.rows:
        raise UserError(f"{path} has no rows", expected="a row for each video")
    counts = collections.Counter()
    entries: list[tuple[Entry, str | Place | UserError]] = []
    problems = list(table.problems)
    for number, row in table.rows:
        if problem := _problem(f"row {number} of {path}", names, row, table.embedded):
            problems.append((number, problem))
            continue
        extra = {
            name: tables.text(value)
            for name, value in row.items()
            if name not in names + list(table.embedded)
        }
        place: str | Place
        if names[0] in table.embedded:
            held = row[names[0]] or {}
            name = next((value for value in held.values() if isinstance(value, str) and value), None)
            name = name or f"{table.path.stem}-{number}"
            place = InParquet(str(table.path.absolute()), name, names[0], number)
        else:
            place = name = tables.text(row.get(names[0])).strip()
        about, source = (tables.text(row.get(column)).strip() for column in names[1:])
        counts[name] += 1
        id = name if counts[name] == 1 else f"{name}#{counts[name]}"
        entries.append((Entry(id, about, source or name, extra=extra), place))
    return entries + [
        (Entry(f"row {number}", "", ""), problem) for number, problem in sorted(problems, key=lambda x: x[0])
    ]


def _problem(
    what: str, names: Sequence[str], row: Mapping[str, Any], embedded: Sequence[str]
) -> UserError | None:
    """Say why a row tells of no video."""
    for kind, name in zip(("video", "caption"), names, strict=False):
        if name not in embedded and isinstance(row.get(name), (list, dict)):
            found = f"{name} = {tables.text(row[name])[:80]}"
            return UserError(f"{what} has no {kind} that is one text", found=found)
    if names[0] not in embedded and not tables.text(row.get(names[0])).strip():
        return UserError(f"{what} names no video", found=f"nothing in {names[0]}")
    return None


def _column(table: tables.Rows, kind: str, known: Sequence[str], named: str | None) -> str:
    if named:
        found = named if named in table.columns else None
    else:  # "File Name" is file_name
        there = {re.sub(r"[\W_]", "", name).lower(): name for name in reversed(table.columns)}
        plain = (name.replace("_", "") for name in known)
        found = next((there[name] for name in plain if name in there), None)
    if found is None:
        raise UserError(
            f"{table.path} lacks the column {named or kind}",
            expected=f"a column {named}" if named else f"one of the columns {', '.join(known)}",
            found=", ".join(table.columns) or "an empty file",
            fix=f"--{kind}_column=NAME",
        )
    return found


# --- videos -----------------------------------------------------------------------------------------------------


Row = tuple[Entry, Place | UserError]
"""A video to encode, and where it lies or why that is not known."""


class Videos:
    """The videos of folders, zip files, tar files and folders of input records.

    Attributes:
        left_out: after `rows` without a table, the files that are neither videos nor captions of one.
    Raises:
        UserError: for a place that is missing, of another kind or damaged.
    """

    def __init__(self, places: Sequence[str | Path]):
        self.places = [Path(place).absolute() for place in places]
        self._folders: list[Path] = []
        self._archives: list[list[Place]] = []
        self._records: list[tuple[Entry, Place]] = []
        for path in self.places:
            if path.is_dir() and any(path.glob(INPUT_RECORDS)):
                self._records += list_input_records(path)
            elif path.is_dir():
                self._folders.append(path)
            else:
                self._archives.append(list_archive(path))
        self.left_out: list[str] = []
        self._by_last_part: dict[str, list[Place]] = collections.defaultdict(list)
        for place in [*itertools.chain(*self._archives), *(place for _, place in self._records)]:
            self._by_last_part[_composed(PurePosixPath(place.name).name)].append(place)

    def find(self, video: str) -> Place:
        """The place of the video that a table calls `video`: its path below a folder or in an archive.

        The path may be absolute, or begin with the name of the folder, and may have the separators of Windows. Accents
        may be one letter or two. In archives the path may lack parts in front, so that a table need not know how they
        were packed.

        Raises:
            UserError: if there is no such video, or more than one, or the path leaves the folder.
        """
        names = self._spellings(video)
        if not names:
            raise UserError(
                f"the path {video} leaves the folder of the videos",
                expected=f"a path in {', '.join(map(str, self.places))}",
            )
        found = next(filter(None, map(self._named, names)), [])
        if len(found) != 1:
            raise UserError(
                f"{len(found) or 'no'} videos are called {video}",
                expected=f"one in {', '.join(map(str, self.places))}",
                found=", ".join(map(str, found)) or None,
            )
        return found[0]

    def _spellings(self, video: str) -> list[str]:
        """What `video` may be called below the folders, the likeliest first; nothing that leaves them."""
        names = []
        for text in dict.fromkeys([video, video.replace("\\", "/")]):
            path = PurePosixPath(text)
            absolute = path.is_absolute() or re.match(r"[A-Za-z]:[/\\]", text)
            if ".." in path.parts:
                return []
            names += [] if absolute else [str(path)]
            for folder in self._folders:
                for root in dict.fromkeys([folder, folder.resolve()]):
                    names += [str(path.relative_to(root))] if path.is_relative_to(root) else []
                # as if seen from a folder above, on this machine or another
                after = [i + 1 for i, part in enumerate(path.parts[:-1]) if part == folder.name]
                names += [str(PurePosixPath(*path.parts[start:])) for start in after]
        return list(dict.fromkeys(names))

    def _named(self, name: str) -> list[Place]:
        """Every place of this very name; in archives, where there is none, those whose name ends so."""
        try:
            found: list[Place] = [
                InFolder(str(path), name) for path in self._folders if (path / name).is_file()
            ]
        except (OSError, ValueError) as error:
            raise UserError(f"no video can be called {name[:80]!r}", found=error) from error
        composed = _composed(name)
        if not found and not name.isascii():
            found = self._with_accents.get(composed, [])
        members = self._by_last_part.get(PurePosixPath(composed).name, [])
        exact = [place for place in members if _composed(place.name) == composed]
        return found + (
            exact or [place for place in members if _composed(place.name).endswith(f"/{composed}")]
        )

    @functools.cached_property
    def _with_accents(self) -> dict[str, list[Place]]:
        """The files in folders whose names are not of ASCII alone, by their composed names."""
        places: dict[str, list[Place]] = collections.defaultdict(list)
        for place in itertools.chain(*map(list_folder, self._folders)):
            if not place.name.isascii():
                places[_composed(place.name)].append(place)
        return places

    def rows(self, table: Iterable[tuple[Entry, "str | Place | UserError"]] | None = None) -> list[Row]:
        """The videos of a table (see `read_table`); without a table all that there are, captioned by files beside them.

        Columns `start` and `end`, in seconds or as 1:02:03.5, name the part of a video that a row is about.

        Raises:
            UserError: without a table, if there is no video, no caption, or two videos have the same name.
        """
        if table is not None:
            return [(entry, self._find(video, entry.extra)) for entry, video in table]
        rows: list[Row] = list(self._records)
        self.left_out = []
        for places in [*map(list_folder, self._folders), *self._archives]:
            by_name, taken = {place.name: place for place in places}, set()
            composed = {_composed(name): place for name, place in by_name.items()}
            for name in sorted(filter(_is_video, by_name)):
                stem = _composed(str(PurePosixPath(name).with_suffix("")))
                beside = [composed[stem + suffix] for suffix in BESIDE if stem + suffix in composed]
                taken |= {name, *(place.name for place in beside)}
                try:
                    caption, extra = _beside(beside)
                    rows.append((Entry(name, caption, name, extra=extra), by_name[name]))
                except UserError as error:
                    rows.append((Entry(name, "", name), error))
            self.left_out += sorted(name for name in by_name if name not in taken and not _is_hidden(name))
        self._check(rows)
        return rows

    def _find(self, video: "str | Place | UserError", extra: Mapping[str, str]) -> Place | UserError:
        if isinstance(video, UserError):
            return video
        try:
            place = self.find(video) if isinstance(video, str) else video
            start, end = (_seconds(name, extra.get(name, "")) for name in ("start", "end"))
            return dataclasses.replace(place, part=Part(start or 0.0, end))
        except UserError as error:
            return error

    def _check(self, rows: list[Row]) -> None:
        where = ", ".join(map(str, self.places))
        if not rows:
            raise UserError(
                f"there are no videos in {where}",
                expected=f"files {', '.join(SUFFIXES)}",
                found=_some(self.left_out) or None,
            )
        if not any(entry.caption for entry, _ in rows):
            for _, place in rows:
                if isinstance(place, UserError):
                    raise place
            raise UserError(
                f"no video in {where} has a caption",
                fix="--table, or a text file beside each video: a.txt for a.mp4",
            )
        counts = collections.Counter(entry.id for entry, _ in rows)
        if double := [id for id, count in counts.items() if count > 1]:
            raise UserError(
                f"several videos are called {double[0]}", found=f"{len(double)} such names in {where}"
            )


def read_row(row: Row, options: dict[str, Any]) -> Clip | str:
    """The clip of a row, as `read_clip` makes it with these options, or why there is none.

    The option `fps` is of the clip (see `Part.fps`).
    """
    entry, place = row
    options, fps = {name: value for name, value in options.items() if name != "fps"}, options.get("fps")
    try:
        if isinstance(place, UserError):
            raise place
        if not clean(entry.caption):
            raise UserError("the caption is empty")
        clip = read_clip(place.open(), **options, part=dataclasses.replace(place.part, fps=fps))
        return dataclasses.replace(clip, stamp=place.stamp())
    except UserError as error:
        return error.in_one_line()


def cut(rows: Iterable[Row], clips: str) -> list[Row]:
    """The rows with the windows of their videos that clips are taken from.

    Args:
        clips: "head", "middle", or "uniform:N" for N rows of each video, spread over it, of the same source and with
            @2, @3, ... after its id.
    Raises:
        UserError: for another word.
    """
    number = re.fullmatch(r"uniform:([1-9]\d{0,5})", clips)
    if clips not in ("head", "middle") and not number:
        raise UserError(f"clips are cut in no way {clips!r}", expected="head, middle or uniform:N")
    windows = [(i, int(number[1])) for i in range(int(number[1]))] if number else [clips]
    cut_rows: list[Row] = []
    for entry, place in rows:
        if isinstance(place, UserError):
            cut_rows.append((entry, place))
            continue
        for i, window in enumerate(windows):
            clip = dataclasses.replace(entry, id=f"{entry.id}@{i + 1}" if i else entry.id)
            part = dataclasses.replace(place.part, window=window)
            cut_rows.append((clip, dataclasses.replace(place, part=part)))
    return cut_rows


def expand(patterns: Iterable[str]) -> list[Path]:
    """The files and folders that paths and patterns such as `parts/*.zip` or `parts-{000..099}.tar` name.

    Raises:
        UserError: if one names nothing.
    """
    places = []
    for pattern in itertools.chain.from_iterable(map(_counted, patterns)):
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        if not found:
            raise UserError(f"no file or folder {pattern}", expected="the videos", fix="--videos=PLACE")
        places += map(Path, found)
    return places


def _counted(pattern: str) -> list[str]:
    """The names that {000..099} in a pattern counts through; itself without that, or where there is such a file."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces is None or Path(pattern).exists():
        return [pattern]
    numbers = range(int(braces[1]), int(braces[2]) + 1)
    names = [f"{pattern[: braces.start()]}{i:0{len(braces[1])}d}{pattern[braces.end() :]}" for i in numbers]
    return list(itertools.chain.from_iterable(map(_counted, names)))


def _is_video(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)  # Macs pack ._a.mp4 beside a.mp4


def _composed(name: str) -> str:
    """The name with accents as one letter (NFC); Macs write two."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _some(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _seconds(name: str, text: str) -> float | None:
    """Seconds of a text such as 63.5, 1:03.5 or 0:01:03.5; None if it is empty."""
    parts = text.strip().split(":")
    if parts == [""]:
        return None
    try:
        numbers = [float(part) for part in parts]
        if len(numbers) > 3 or not all(0 <= number < float("inf") for number in numbers):
            raise ValueError
    except ValueError as error:
        raise UserError(f"{name} is no time", expected="seconds, or 1:02:03.5", found=text[:80]) from error
    return sum(number * 60**power for power, number in enumerate(reversed(numbers)))


def _beside(places: Sequence[Place]) -> tuple[str, dict[str, str]]:
    """The caption in the files beside a video, and what else the one in JSON tells."""
    caption, extra = "", {}
    for place in places:
        try:
            data = place.read(LONGEST + 1)
            if len(data) > LONGEST:
                raise UserError(f"{place} is no caption", expected=f"at most {LONGEST:,} bytes", found="more")
            text = data.decode("utf-8-sig")
            if PurePosixPath(place.name).suffix != ".json":
                caption = caption or text.strip()
                continue
            values = parse_json(text, place)
            extra = {str(key): tables.text(value) for key, value in values.items()}
        except (ValueError, AttributeError) as error:
            expected = "text in UTF-8" if isinstance(error, UnicodeDecodeError) else "a JSON object"
            raise UserError(f"cannot read {place}", expected=expected, found=error) from error
        told = next((extra.pop(name) for name in CAPTION if name in extra), "")
        caption = caption or told.strip()
    return caption, extra
