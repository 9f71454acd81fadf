"""`python -m ditmem_jax.encode --csv captions.csv --videos DIR --out RECORDS`: videos to records.

Every row of the table becomes a record of VAE latents and its caption's embedding (see `data.records`). Running
the same command again continues after the last finished shard, and takes up rows that were added to the table.
Videos that cannot be encoded are listed with the reason in `skipped.csv` beside the records.
"""

import collections
import csv
import dataclasses
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jaxtyping import Array, Float, UInt8
from rich.progress import track

from ditmem_jax import cli
from ditmem_jax.checkpoint import load_umt5, load_vae
from ditmem_jax.config import Config
from ditmem_jax.data.files import write_text
from ditmem_jax.data.records import Entry, Meta, Record, RecordWriter
from ditmem_jax.data.tokenizer import Tokenizer, clean
from ditmem_jax.data.video import read_clip, to_unit
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import split
from ditmem_jax.models.umt5 import UMT5
from ditmem_jax.models.vae import VAE, encode

SHARD_SIZE = (
    64  # at least; a multiple of the batch, so that a continued run makes the batches it would have made
)
Clip = UInt8[np.ndarray, "T H W 3"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """How many records were made now, how many were there before, and the rows (id, reason) left out."""

    made: int
    found: int
    skipped: list[tuple[str, str]]

    def __str__(self) -> str:
        return f"{self.made} videos encoded, {self.found} found encoded, {len(self.skipped)} skipped"


def read_table(path: str | Path) -> list[Entry]:
    """The rows of a CSV with columns `video` or `video_path`, and `caption`; other columns become `extra`.

    The id of a row is its video, with #2, #3, ... for further rows of the same video.

    Raises:
        UserError: if the file is no such table.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}", expected="a CSV file in UTF-8", found=error) from error
    video = next((name for name in ("video", "video_path") if name in columns), None)
    if video is None or "caption" not in columns:
        raise UserError(
            f"{path} lacks the column {'caption' if video else 'video'}",
            expected="columns video (or video_path) and caption",
            found=", ".join(columns) or "an empty file",
        )
    counts = collections.Counter()
    entries = []
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise UserError(
                f"row {number} of {path} has more values than there are columns",
                found=", ".join(row[None]),
                fix='put captions with commas into "quotation marks"',
            )
        source, caption = row.pop(video).strip(), row.pop("caption").strip()
        counts[source] += 1
        id = source if counts[source] == 1 else f"{source}#{counts[source]}"
        entries.append(Entry(id, caption, source, extra=row))
    if not entries:
        raise UserError(f"{path} has no rows", expected="a row for each video")
    return entries


def encode_dataset(
    entries: Sequence[Entry],
    videos: str | Path,
    out: str | Path,
    config: Config,
    vae: VAE,
    text: tuple[UMT5, Tokenizer],
    *,
    batch: int = 4,
    minimum: int = 2,
    shard_size: int = SHARD_SIZE,
) -> Summary:
    """Encodes videos and captions to the records in `out`, and the prompts that sampling needs.

    Args:
        entries: what to encode; `source` is the path of the video below the folder `videos`.
        config: its `video` decides the size of the clips, `weights.dtype` that of stored numbers.
        batch: clips that go through the networks at once.
        minimum: frames that a video must have.

    Raises:
        UserError: if `out` holds anything but records of the same making and table (it is left as it is), or if
            not one of the videos can be encoded.
    """
    shard_size = -(-shard_size // batch) * batch
    with RecordWriter(out, describe(config, vae, text), shard_size) as writer:
        _check_table(entries, writer)
        found = {entry.id for entry in writer.entries}
        waiting = [entry for entry in entries if entry.id not in found]
        skipped: list[tuple[str, str]] = []
        clips = _read_ahead(waiting, Path(videos), config, minimum, ahead=2 * batch)
        good = _set_aside(track(clips, "encoding", total=len(waiting)), skipped)
        made = 0
        for group in _batched(good, batch):
            for record in _encode_batch(group, batch, vae, text):
                writer.add(record)
                made += 1
        _write_skipped(Path(out) / "skipped.csv", skipped)
        if not made and not found:
            raise UserError(f"none of {len(entries)} videos could be encoded", found=skipped[0][1])
        prompts = ["", config.sample.negative_prompt]
        writer.add_prompts(dict(zip(prompts, embed(*text, prompts), strict=True)))
    return Summary(made, len(found), skipped)


def describe(config: Config, vae: VAE, text: tuple[UMT5, Tokenizer]) -> Meta:
    """What identifies records made with this config and these networks."""
    video, (umt5, tokenizer) = config.video, text
    grid = vae.config.latent_grid(video.frames, video.height, video.width)
    return Meta(
        latents=(*grid, vae.config.z_dim),
        text_dim=umt5.config.dim,
        dtype=config.weights.computed_in,
        made_by={
            "frames": video.frames,
            "height": video.height,
            "width": video.width,
            "resize": video.resize,
            "text_len": tokenizer.length,
            "vae": _fingerprint(vae),
            "text": _fingerprint(umt5),
            "tokenizer": hashlib.sha256(tokenizer.path.read_bytes()).hexdigest(),
        },
    )


def embed(umt5: UMT5, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[Float[np.ndarray, "L D"]]:
    """The embedding of each prompt, without padding; a prompt may be empty."""
    ids, mask = tokenizer(prompts, allow_empty=True)
    graph, state = nnx.split(umt5)
    embeddings = np.asarray(_embed(graph, state, jnp.asarray(ids), jnp.asarray(mask)))
    return [embedding[: row.sum()] for embedding, row in zip(embeddings, mask, strict=True)]


@partial(jax.jit, static_argnums=0)
def _embed(graph: nnx.GraphDef, state: nnx.State, ids: Array, mask: Array) -> Array:
    return nnx.merge(graph, state)(ids, mask)


def _encode_batch(
    group: list[tuple[Entry, Clip]], size: int, vae: VAE, text: tuple[UMT5, Tokenizer]
) -> Iterator[Record]:
    padded = group + group[-1:] * (size - len(group))  # one shape, one compilation
    latents = np.asarray(encode(vae, jnp.asarray(to_unit(np.stack([clip for _, clip in padded])))))
    embeddings = embed(*text, [entry.caption for entry, _ in padded])
    for (entry, _), x, embedding in zip(group, latents, embeddings, strict=False):
        yield Record(**vars(entry), latents=x, text_embedding=embedding)


def _read_ahead(
    entries: Iterable[Entry], folder: Path, config: Config, minimum: int, ahead: int
) -> Iterator[tuple[Entry, Future[Clip]]]:
    """The entries in order with their clips, of which `ahead` are being decoded while one is in use."""
    video, pending = config.video, collections.deque()

    def read(entry: Entry) -> Clip:
        if not clean(entry.caption):
            raise UserError("the caption is empty")
        size = (video.frames, video.height, video.width)
        return read_clip(folder / entry.source, *size, video.resize, minimum)

    with ThreadPoolExecutor() as pool:
        for entry in entries:
            pending.append((entry, pool.submit(read, entry)))
            if len(pending) > ahead:
                yield pending.popleft()
        yield from pending


def _set_aside(
    clips: Iterable[tuple[Entry, Future[Clip]]], skipped: list[tuple[str, str]]
) -> Iterator[tuple[Entry, Clip]]:
    """The clips that could be read; the others go to `skipped`."""
    for entry, clip in clips:
        try:
            yield entry, clip.result()
        except UserError as error:
            skipped.append((entry.id, "; ".join(" ".join(line.split()) for line in str(error).split("\n"))))


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


def _check_table(entries: Sequence[Entry], writer: RecordWriter) -> None:
    by_id = {entry.id: entry for entry in entries}
    for entry in writer.entries:
        if by_id.get(entry.id) != entry:
            raise UserError(
                f"{writer.folder} holds the records of another table",
                expected=by_id.get(entry.id, f"a row for {entry.id!r}"),
                found=entry,
                fix="another output folder, or the table of that run (rows may be added to it)",
            )


def _write_skipped(path: Path, skipped: list[tuple[str, str]]) -> None:
    path.unlink(missing_ok=True)
    if skipped:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("video", "reason"), *skipped])
        write_text(path, table.getvalue())


def _fingerprint(module: nnx.Module) -> str:
    """A hash of the module's weights."""
    digest = hashlib.sha256()
    for path, array in sorted(split(module)[1].items()):
        array = np.asarray(array)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def main() -> None:
    config = cli.load_config(CONFIG)
    if RESIZE.value:
        config = dataclasses.replace(config, video=dataclasses.replace(config.video, resize=RESIZE.value))
    entries = read_table(CSV.value)
    videos = Path(VIDEOS.value or Path(CSV.value).parent)
    if not videos.is_dir():
        raise UserError(f"no folder {videos}", expected="the folder of the videos", fix="--videos=DIR")
    networks = load_vae(config), load_umt5(config)
    summary = encode_dataset(
        entries, videos, OUT.value, config, *networks, batch=BATCH.value, minimum=MINIMUM.value
    )
    print(f"{summary}: {OUT.value}")
    if summary.skipped:
        reasons = Path(OUT.value) / "skipped.csv"
        print(f"the reasons are in {reasons}")
        if STRICT.value:
            raise UserError(
                f"{len(summary.skipped)} videos were skipped", expected="none, since --strict was given"
            )


if __name__ == "__main__":
    CONFIG = cli.define_config("configs/tiny.py")
    CSV = flags.DEFINE_string(
        "csv", None, "Table with columns video (or video_path) and caption.", required=True
    )
    VIDEOS = flags.DEFINE_string("videos", None, "Folder of the videos; the table's own by default.")
    OUT = flags.DEFINE_string("out", None, "Folder for the records.", required=True)
    STRICT = flags.DEFINE_bool("strict", False, "Fail if any video was skipped.")
    RESIZE = flags.DEFINE_enum("resize", None, ["stretch", "crop"], "Overrides config.video.resize.")
    BATCH = flags.DEFINE_integer("batch", 4, "Clips that are encoded at once.", lower_bound=1)
    MINIMUM = flags.DEFINE_integer("min_frames", 2, "Frames that a video must have.", lower_bound=1)
    cli.run(main)
