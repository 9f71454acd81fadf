"""Input records on disk: shards `videos-00000.array_record`, whole or absent, and what tells how far they are.

Beside each shard `videos-00000.jsonl` lists what is in it, and `videos.json` says how the records were made and
whether all are there. Running again makes what is missing, in new shards.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter

from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import make_folder, read_json, replacing, write_text

FORMAT = 1
Record = tuple[dict[str, str], dict[str, np.ndarray]]
"""Metadata (id, caption, source, extra as JSON, and fps of frames) and the one tensor, `video` or `frames`."""


def open_folder(folder: Path, made_by: dict[str, Any]) -> set[str]:
    """The ids of the records in a folder that is new, empty, or of an earlier run with the same `made_by`.

    Raises:
        UserError: if it is anything else; it is left as it is.
    """
    path = folder / "videos.json"
    if path.exists():
        try:
            before = read_json(path, "another output folder")
            found = before["made_by"] | {"format": before["format"]}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged", found=error, fix="another output folder") from error
        if found != made_by | {"format": FORMAT}:
            raise UserError(
                f"{folder} holds the records of another run",
                expected=made_by | {"format": FORMAT},
                found=found,
                fix="another output folder, or the settings of that run",
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something else", expected="a new or empty folder")
    make_folder(folder)
    mark(folder, made_by, complete=False)
    lists = [path.with_suffix(".jsonl") for path in _shards(folder)]
    return {json.loads(line)["id"] for path in lists for line in path.read_text().splitlines()}


def mark(folder: Path, made_by: dict[str, Any], complete: bool) -> None:
    """Writes down whether the folder holds all that it should."""
    state = {"format": FORMAT, "complete": complete, "made_by": made_by}
    write_text(folder / "videos.json", json.dumps(state, indent=1) + "\n")


def write(folder: Path, records: Iterable[Record], size: int) -> Iterator[tuple[Path, int]]:
    """Writes records after those that are there, `size` in a shard; yields each shard and how many it holds."""
    records = iter(records)
    first = len(_shards(folder))
    for number, record in enumerate(records, start=first):
        path = folder / f"videos-{number:05d}.array_record"
        metadata = []
        with replacing(path, RuntimeError) as temporary:
            with contextlib.closing(ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")) as writer:
                for texts, tensors in itertools.chain([record], itertools.islice(records, size - 1)):
                    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
                    writer.write(safetensors.numpy.save(contiguous, texts))
                    metadata.append(json.dumps(texts))
            write_text(path.with_suffix(".jsonl"), "\n".join(metadata) + "\n")
        yield path, len(metadata)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("videos-*.array_record"))
