"""Banks in the layout that DiT-Mem was released with, in and out.

    labels.index    FAISS IndexFlatIP of the captions' vectors, of length 1
    id_map.json     {"0": "clip.mp4", ...}: the video of each row; a list of them is read as well
    metadata.json   [{"index": 0, "video": "clip.mp4", "caption": "...", "motion_score": 1.5, "frame": 120, ...}, ...]
    clip.pt         in a folder of its own, {"latent": normalised latents [C, T, H, W] in bfloat16, ...}; the bare
                    tensor is read as well

The release writes 0 for a number of frames, a frame rate or a duration that it does not know. Its vectors are of
gte-base-en-v1.5, which brings code of its own: a bank made of them is searched with vectors, unless another embedder
is named. Text embeddings of the captions are not in the layout, so records made of its latents have empty ones: they
serve as references, not as a training set.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32

from ditmem_jax.bank.embedders import make_embedder
from ditmem_jax.bank.rows import columns_of, rows_of_records
from ditmem_jax.bank.table import Table, to_matrix
from ditmem_jax.data.record import DTYPES, Entry, Record
from ditmem_jax.data.records import Meta, RecordWriter
from ditmem_jax.data.references import References
from ditmem_jax.errors import UserError
from ditmem_jax.progress import track
from ditmem_jax.storage.digests import of_file
from ditmem_jax.storage.files import make_folder, read_json, replacing, write_text
from ditmem_jax.storage.torch_files import import_torch, load_torch, to_numpy

INDEX, ID_MAP, METADATA = "labels.index", "id_map.json", "metadata.json"
OURS = {"frame": "frames", "seconds": "duration", "fps": "fps"}  # names there and here; 0 is unknown there
UNIT = 1e-3  # by which the length of a vector may be off 1


def import_faiss(
    folder: str | Path,
    uri: str | Path,
    latents: str | Path | None = None,
    records: str | Path | None = None,
    embedder: str = "vectors",
) -> Table:
    """A new bank from the released layout; run again, it continues with the latents that are not records yet.

    Args:
        latents: folder of the `.pt` files; without it the bank has no records.
        records: folder that they go to as records; the bank's name with `-records` by default.
        embedder: name of what made the vectors (see `bank.embedders`).
    Raises:
        UserError: for a file that is missing, damaged or disagrees with the others, latents of a video that are
            missing or of another shape than the first, or a bank that is there.
    """
    folder, uri = Path(folder), str(uri)
    if Table.exists(uri):
        raise UserError(f"there is a bank at {uri}", fix="another --bank")
    vectors = _read_index(folder / INDEX)
    entries, videos = _read_entries(folder, len(vectors))
    rows = pa.table(columns_of(entries))
    if latents is not None:
        if records is None and "://" in uri:
            raise UserError("where the records go", expected="--records=DIR, since the bank is not a folder")
        records = Path(records or f"{uri.rstrip('/')}-records")
        digest = of_file(folder / INDEX)
        files = [Path(latents) / _file(video) for video in videos]
        _write_records(records, entries, files, {"layout": "DiT-Mem", "index": digest})
        rows = rows_of_records([records])
    made = make_embedder(embedder, (entry.caption for entry in entries), vectors.shape[1])
    return Table.create(uri, made, rows, vectors)


def export_faiss(table: Table, folder: str | Path, latents: str | Path | None = None) -> None:
    """Writes a bank in the released layout, `labels.index` last.

    Args:
        latents: folder for the latents of all videos, one file each; needs torch (extra `convert`).
    Raises:
        UserError: if such files are there, a record is gone or altered, or two videos would share a file.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise UserError(f"{folder} holds {INDEX} already", fix="another folder")
    make_folder(folder)
    index, rows = faiss.IndexFlatIP(table.dim), []
    for part in table.blocks():
        index.add(to_matrix(part["vector"]))
        rows += table.take(part["_rowid"].to_pylist()).to_pylist()
    if latents is not None:
        _write_latents(rows, Path(latents))
    write_text(folder / ID_MAP, json.dumps({str(i): row["id"] for i, row in enumerate(rows)}, indent=1))
    metadata = [_metadata(number, row) for number, row in enumerate(rows)]
    write_text(folder / METADATA, json.dumps(metadata, indent=1, ensure_ascii=False))
    with replacing(folder / INDEX, RuntimeError) as temporary:
        faiss.write_index(index, str(temporary))


def _metadata(number: int, row: dict[str, Any]) -> dict[str, Any]:
    theirs = {ours: name for name, ours in OURS.items()}
    ours = ("id", "records", "row", "checksum", "digest")
    further = {name: value for name, value in row.items() if name not in ours}
    known = {theirs.get(name, name): value for name, value in further.items()}
    known |= {name: known[name] or 0 for name in OURS}
    known = {f"{name}_" if name in ("index", "video") else name: value for name, value in known.items()}
    return {"index": number, "video": row["id"]} | known


def _write_latents(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    names = [_file(row["id"]) for row in rows]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{len(twice)} files of latents would be of more than one video", found=twice[0])
    references = References.of(rows)
    torch = import_torch(folder)
    make_folder(folder)
    for index in track(range(len(rows)), "latents"):
        found = np.moveaxis(references[index].latents, -1, 0).astype(np.float32)
        tensor = torch.from_numpy(np.ascontiguousarray(found)).to(torch.bfloat16)
        about = {"video_id": Path(names[index]).stem, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}
        with replacing(folder / names[index], RuntimeError) as temporary:
            torch.save({"latent": tensor} | about, temporary)


def _write_records(
    folder: Path, entries: Sequence[Entry], files: Sequence[Path], made_by: dict[str, str]
) -> None:
    """The entries with the latents in the files as records, in order."""
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(
            f"{len(missing)} of {len(entries)} videos have no latents in {files[0].parent}",
            expected=missing[0],
            fix="the latents of all videos, or a bank without records: leave out --latents",
        )
    first = _read_latents(files[0])
    names = {dtype: name for name, dtype in DTYPES.items()}
    with RecordWriter(folder, Meta(first.shape, 0, names[first.dtype], made_by)) as writer:
        done = len(writer.entries)
        if writer.entries != list(entries[:done]):
            raise UserError(f"{folder} holds records of other metadata", fix="another --records")
        for entry, file in track(list(zip(entries, files, strict=True))[done:], "latents"):
            empty = np.zeros((0, 0), np.float32)
            writer.add(Record(**vars(entry), latents=_read_latents(file), text_embedding=empty))


def _read_latents(path: Path) -> Float[np.ndarray, "T H W C"]:
    loaded = load_torch(path)
    tensor = loaded.get("latent") if isinstance(loaded, dict) else loaded
    if getattr(tensor, "ndim", None) != 4 or str(tensor.dtype) not in ("torch.bfloat16", "torch.float32"):
        raise UserError(
            f"{path} holds no latents of a video",
            expected="a tensor [C, T, H, W] in bfloat16 or float32, or such a one under the name latent",
            found=f"{type(tensor).__name__} {list(getattr(tensor, 'shape', []))}",
        )
    return np.moveaxis(to_numpy(tensor), 0, -1)


def _file(video: str) -> str:
    return f"{Path(video).stem}.pt"


def _read_index(path: Path) -> Float32[np.ndarray, "N D"]:
    if not path.is_file():
        raise UserError(f"{path.parent} is no bank in the released layout", expected=path)
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise UserError(f"cannot read {path}", expected="an index of FAISS", found=error) from error
    if not isinstance(index, faiss.IndexFlat) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UserError(
            f"{path} is another kind of index",
            expected="IndexFlatIP, which holds the vectors themselves",
            found=type(index).__name__,
        )
    vectors = index.reconstruct_n(0, index.ntotal)
    lengths = np.linalg.norm(vectors, axis=1)
    if not ((np.abs(lengths - 1) <= UNIT) | (lengths == 0)).all():  # so written, NaN counts
        worst = lengths[np.argmax(np.where(np.isfinite(lengths), np.abs(lengths - 1), np.inf))]
        raise UserError(f"the vectors in {path} are not of length 1", found=f"a length of {worst}")
    return vectors


def _read_entries(folder: Path, count: int) -> tuple[list[Entry], list[str]]:
    """The rows of the index and their videos: what id_map.json and metadata.json say, which must agree."""
    videos, metadata = (_by_row(folder / name, count) for name in (ID_MAP, METADATA))
    seen: Counter[str] = Counter()
    entries = []
    for number, (video, row) in enumerate(zip(videos, metadata, strict=True)):
        if not isinstance(row, dict) or not isinstance(row.get("caption"), str) or not isinstance(video, str):
            raise UserError(
                f"row {number} in {folder} is not as in the released layout",
                expected='in id_map.json the name of a video, in metadata.json {"caption": text, ...}',
                found=f"{video!r}, {str(row)[:200]}",
            )
        told = row.get("video", video), row.get("index", number)
        if told != (video, number):
            raise UserError(
                f"{ID_MAP} and {METADATA} in {folder} disagree on row {number}",
                expected=f"{video!r}, index {number}",
                found=f"{told[0]!r}, index {told[1]}",
            )
        seen[video] += 1
        id = video if seen[video] == 1 else f"{video}#{seen[video]}"
        source = row.get("source")
        source = source if isinstance(source, str) and source else video
        entries.append(Entry(id, row["caption"], source, extra=_extra(row)))
    return entries, videos


def _extra(row: dict[str, Any]) -> dict[str, str]:
    extra = {}
    for name, value in row.items():
        if name not in ("index", "video", "caption", "id", "source"):
            unknown = value is None or value != value or (name in OURS and not value)
            extra[OURS.get(name, name)] = "" if unknown else str(value)
    return extra


def _by_row(path: Path, count: int) -> list[Any]:
    """A list in JSON, or an object whose names are the numbers of the rows."""
    found = read_json(path)
    if isinstance(found, dict) and found.keys() == {str(number) for number in range(count)}:
        return [found[str(number)] for number in range(count)]
    if isinstance(found, list) and len(found) == count:
        return found
    raise UserError(
        f"{path} does not fit {INDEX}",
        expected=f'a list of {count}, or an object with the names "0" to "{count - 1}"',
        found=f"{type(found).__name__} of {len(found) if isinstance(found, (dict, list)) else 1}",
    )
