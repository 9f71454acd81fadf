"""Rows of videos and captions: TFRecord files of tf.train.Example, and tables of paths, at any address.

Files are opened by TensorFlow's file systems, to which tensorflow-io adds `http://`, `https://` and `s3://` beside
`gs://` and local paths. It keeps three file descriptors open for each read over HTTP, so that TFRecord files are
read there in large pieces, and single videos with `requests`.
"""

import collections
import contextlib
import csv
import dataclasses
import io
import json
import posixpath
import re
from collections.abc import Callable, Iterator

import requests
import tensorflow as tf
import tensorflow_io  # noqa: F401  registers file systems
from google.protobuf.message import DecodeError

from ditmem_jax.errors import UserError, nearest

HTTP = ("http://", "https://")
PIECE = 64 * 2**20  # bytes; a server that does not heed Range serves files up to this size
TIMEOUT = 60  # seconds


@dataclasses.dataclass(frozen=True)
class Names:
    """Of features or columns. Without `id` and `source`, both are told from the place of the row."""

    video: str = "video"
    caption: str = "caption"
    id: str | None = None
    source: str | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A video to be: `read()` gives the bytes of its file and its caption, or raises a UserError.

    `left_out` names the features that `extra` cannot hold, since they are neither text nor numbers.
    """

    id: str
    source: str
    extra: dict[str, str]
    read: Callable[[], tuple[bytes, str]]
    left_out: tuple[str, ...] = ()


def rows(path: str, names: Names, videos: str | None = None) -> Iterator[Row]:
    """The rows of a table `.csv`, or of a TFRecord file, which may be compressed if its name ends with `.gz`.

    Args:
        videos: folder or address that the paths in a table start from; the table's own by default.

    Raises:
        UserError: if the file cannot be read to its end.
    """
    if path.lower().endswith(".csv"):
        return _table(path, names, videos)
    return _examples(path, names)


def expand(pattern: str) -> list[str]:
    """The files that a pattern such as `gs://bucket/part-*` matches; HTTP knows no patterns.

    Raises:
        UserError: if there are none.
    """
    if pattern.startswith(HTTP) or not re.search(r"[*?[]", pattern):
        return [pattern]
    with _reading(pattern):
        found = sorted(tf.io.gfile.glob(pattern))
    if not found:
        raise UserError(f"no file matches {pattern}")
    return found


def fetch(path: str) -> bytes:
    """The content of a file.

    Raises:
        UserError: if it cannot be read.
    """
    with _reading(path):
        if path.startswith(HTTP):
            response = requests.get(path, timeout=TIMEOUT)
            response.raise_for_status()
            return response.content
        return tf.io.read_file(path).numpy()


def reason(error: tf.errors.OpError) -> str:
    """The cause of an error, in a line, without the names of TensorFlow's inner parts."""
    text = re.sub(r"^\{\{.*?\}\} ?|\[Op:.*", "", error.message.strip(), flags=re.DOTALL).lstrip(": ")
    return " ".join(text.split(" with body ")[0].split())


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Raises a UserError that names `path` when the block, which reads it, fails."""
    try:
        yield
    except (tf.errors.OpError, requests.RequestException) as error:
        what = reason(error) if isinstance(error, tf.errors.OpError) else " ".join(str(error).split())
        ranges = "(23)" in what and path.startswith(HTTP)  # curl: more came than was asked for
        raise UserError(
            f"cannot read {path}",
            found=what,
            fix=f"a server that heeds the header Range, or files below {PIECE} bytes" if ranges else None,
        ) from error


def _examples(path: str, names: Names) -> Iterator[Row]:
    compression = "GZIP" if path.endswith(".gz") else ""
    with _reading(path):
        records = tf.data.TFRecordDataset(path, compression, buffer_size=PIECE).as_numpy_iterator()
        for number, record in enumerate(records):
            yield _example(f"{path}#{number}", record, names)


def _example(place: str, record: bytes, names: Names) -> Row:
    try:
        features = dict(tf.train.Example.FromString(record).features.feature)
    except DecodeError as error:
        raise UserError(f"{place} is no tf.train.Example", found=error) from error

    def text(name: str) -> str:
        if name not in features:
            raise UserError(f"there is no feature {name!r}", found=nearest(name, features) or "none at all")
        found = _text(features[name])
        if found is None:
            raise UserError(f"the feature {name!r} is no text in UTF-8")
        return found

    def read() -> tuple[bytes, str]:
        caption = text(names.caption)
        values = features[names.video].bytes_list.value if names.video in features else ()
        if len(values) != 1:
            raise UserError(
                f"the feature {names.video!r} does not hold the bytes of one file",
                found=f"{len(values)} byte strings; features: {nearest(names.video, features)}",
            )
        return values[0], caption

    rest = features.keys() - {names.video, names.caption, names.id, names.source}
    texts = {name: _text(features[name]) for name in sorted(rest)}
    return Row(
        text(names.id) if names.id else place,
        text(names.source) if names.source else place,
        {name: value for name, value in texts.items() if value is not None},
        read,
        tuple(name for name, value in texts.items() if value is None),
    )


def _text(feature: tf.train.Feature) -> str | None:
    """One value as it is, several as a JSON list; None if they are bytes and no text."""
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    try:
        values = [value.decode() if isinstance(value, bytes) else value for value in values]
    except UnicodeDecodeError:
        return None
    return str(values[0]) if len(values) == 1 else json.dumps(values, ensure_ascii=False)


def _table(path: str, names: Names, videos: str | None) -> Iterator[Row]:
    try:
        reader = csv.DictReader(
            io.StringIO(fetch(path).decode("utf-8-sig"), newline=""), restval="", strict=True
        )
        columns, table = list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}", expected="a CSV file in UTF-8", found=error) from error
    video = "video_path" if names.video == "video" and "video" not in columns else names.video
    for name in (video, names.caption, names.id, names.source):
        if name and name not in columns:
            raise UserError(f"{path} lacks the column {name}", found=", ".join(columns) or "an empty file")
    counts = collections.Counter()
    for number, row in enumerate(table, start=1):
        if None in row:
            raise UserError(
                f"row {number} of {path} has more values than there are columns",
                found=", ".join(row[None]),
                fix='put captions with commas into "quotation marks"',
            )
        place, caption = row[video].strip(), row[names.caption].strip()
        counts[place] += 1
        id = place if counts[place] == 1 else f"{place}#{counts[place]}"
        address = place if "://" in place else posixpath.join(videos or posixpath.dirname(path), place)
        yield Row(
            row[names.id] if names.id else id,
            row[names.source] if names.source else place,
            {
                name: row[name]
                for name in columns
                if name not in (video, names.caption, names.id, names.source)
            },
            lambda address=address, caption=caption: (fetch(address), caption),
        )
