"""Build, search, change and show a bank of reference videos.

ditmem bank build --bank bank --records records
ditmem bank search "a ball falls on planet Zorvex" --bank bank --k 3
ditmem bank search --help
"""

import datetime
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from ditmem_jax.config import flags as cli
from ditmem_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ditmem_jax.bank.embedders import Embedder


def build() -> None:
    """Make a bank of records, or of a table with captions or vectors.

    ditmem bank build --bank bank --records records,more
    ditmem bank build --bank bank --table captions.csv --embedder sentence-transformers:Alibaba-NLP/gte-modernbert-base
    ditmem bank build --bank bank --table rows.parquet --vectors vectors.npy
    """
    from ditmem_jax.bank.embedders import default_embedder, make_embedder
    from ditmem_jax.bank.table import Table

    rows, vectors = _given()
    name = EMBEDDER.value or (default_embedder() if vectors is None else "vectors")
    dim = None if vectors is None else vectors.shape[1]
    embedder = make_embedder(name, (text.as_py() for text in rows["caption"]), dim)
    table = Table.create(BANK.value, embedder, rows, _vectors(embedder, rows, vectors))
    print(f"{len(table)} videos: {BANK.value}, version {table.version}")


def add() -> None:
    """Add records, or the rows of a table, to a bank.

    ditmem bank add --bank bank --records more
    """
    from ditmem_jax.bank.embedders import load_embedder
    from ditmem_jax.bank.table import Table

    rows, vectors = _given()
    table = Table.open(BANK.value)
    embedder = load_embedder(table.description, table.words, embeds=vectors is None)
    table.add(rows, embedder, _vectors(embedder, rows, vectors))
    print(f"{len(rows)} videos added: {BANK.value}, version {table.version}")


def remove(ids: str | None = None) -> None:
    """Remove videos by id, or all that a filter finds.

    ditmem bank remove 7.mp4,9.mp4 --bank bank
    ditmem bank remove --bank bank --where "duration < 1"
    """
    from ditmem_jax.bank.table import Table

    if (ids is None) == (WHERE.value is None):
        raise UserError("what is to be removed", expected="ids, as ID,ID, or --where")
    table = Table.open(BANK.value)
    if ids is not None:
        whole = table.rows(columns=["id"])["id"].to_pylist()
        named = [ids] if ids in whole else ids.split(",")  # ids may hold commas
    removed = table.remove(None if ids is None else named, WHERE.value)
    print(f"{removed} videos removed: {BANK.value}, version {table.version}")


def search(prompt: str | None = None) -> None:
    """Find the videos nearest to a text, or to each line of a file.

    ditmem bank search "a ball falls on planet Zorvex" --bank bank --k 3 --where "gravity > 0"
    ditmem bank search --queries prompts.txt --bank bank --json
    """
    from ditmem_jax.bank.search import Bank

    queries = _queries(prompt)
    found = Bank.open(BANK.value, VERSION.value, IVF.value).search(queries, K.value, where=WHERE.value)
    shown = queries if isinstance(queries, list) else [f"query {i}" for i in range(len(queries))]
    for query, rows, scores, count in zip(shown, found.rows, found.scores, found.matched, strict=True):
        rows = [row | {"score": round(float(score), 6)} for score, row in zip(scores, rows, strict=True)][
            :count
        ]
        if JSON.value:
            print(json.dumps({"query": query, "found": rows}, ensure_ascii=False))
        else:
            _print(query, [{name: row[name] for name in ("score", "id", "caption")} for row in rows])
            if not rows:
                print("no caption shares a word with it")


def show(id: str) -> None:
    """Print all that the bank says about a video, as JSON.

    ditmem bank show 7.mp4 --bank bank
    """
    from ditmem_jax.bank.table import Table

    table = Table.open(BANK.value, VERSION.value)
    (row,) = table.by_id([id]).to_pylist()
    print(json.dumps(row, ensure_ascii=False, indent=1))


def stats() -> None:
    """Count the videos, and the values of each column.

    ditmem bank stats --bank bank
    """
    from ditmem_jax.bank.rows import summary
    from ditmem_jax.bank.table import Table

    table = Table.open(BANK.value, VERSION.value)
    rows = table.rows()
    about = {"bank": BANK.value, "version": table.version, "videos": len(rows), "embedder": table.description}
    columns = summary(rows)
    if JSON.value:
        print(json.dumps(about | {"columns": columns}, ensure_ascii=False))
    else:
        print("\n".join(f"{name:<9} {value}" for name, value in about.items()))
        _print("columns", columns)


def verify() -> None:
    """Check the table and the records that it points to; a fault is exit status 1.

    ditmem bank verify --bank bank --deep
    """
    from ditmem_jax.bank.table import Table
    from ditmem_jax.bank.verify import check

    table = Table.open(BANK.value, VERSION.value)
    problems = check(table, DEEP.value)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{len(problems)} faults in the bank {BANK.value}")
    older = "" if table.digests else "; rows that an earlier version of ditmem_jax wrote have no digest"
    print(f"{len(table)} videos, no fault: {BANK.value}, version {table.version}{older}")


def match(folder: str) -> None:
    """Find references in the bank for each record of a training set, once before training.

    A record is never given itself, a clip of the same source, equal latents or a near duplicate, by caption or by sight.

        ditmem bank match records --bank bank --k 3
    """
    from ditmem_jax.bank import matches
    from ditmem_jax.bank.search import Bank
    from ditmem_jax.data.records import RecordReader
    from ditmem_jax.storage.locks import owned

    count = 5 if K.value is None else K.value
    bank = Bank.open(BANK.value, ivf_above=IVF.value)
    with owned(Path(folder) / matches.FILE):
        found = matches.find(RecordReader(folder), bank, count, THRESHOLD.value, DUPLICATE_LATENTS.value)
        found.save(Path(folder) / matches.FILE)
    left_out = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
    print(f"{count} references for each of {len(found.table)} records: {Path(folder) / matches.FILE}")
    print(f"kept out: {left_out}")
    if found.wordless:
        print(f"{found.wordless} references share no word with the caption of their record")


def tokens() -> None:
    """Store what an encoder makes of each video, for ditmem sample --features.

    ditmem bank tokens --bank bank --encoder runs/tiny/encoder.safetensors
    """
    from ditmem_jax.bank.features import make_features
    from ditmem_jax.bank.table import Table

    if ENCODER.value is None:
        raise UserError("--encoder is missing", expected="the encoder.safetensors of a training run")
    out = OUT.value or BANK.value
    print(make_features(Table.open(BANK.value, VERSION.value), ENCODER.value, out))
    print(f"for ditmem sample: --features={out}")


def export_faiss(folder: str) -> None:
    """Write the bank in the released layout.

    The folder gets labels.index, id_map.json and metadata.json; --latents another one with latents as .pt files.

        ditmem bank export-faiss exported --bank bank --latents exported/latents
    """
    from ditmem_jax.bank import released
    from ditmem_jax.bank.table import Table

    table = Table.open(BANK.value, VERSION.value)
    released.export_faiss(table, folder, LATENTS.value)
    print(f"{len(table)} videos: {folder}")


def import_faiss(folder: str) -> None:
    """Make a bank of one in the released layout.

    With --latents it makes a folder of --records as well, which sampling needs.

        ditmem bank import-faiss released --bank bank --latents released/latents --records records
    """
    from ditmem_jax.bank import released

    if RECORDS.value and len(RECORDS.value) > 1:
        raise UserError("import-faiss writes one folder of records", found=", ".join(RECORDS.value))
    records = RECORDS.value[0] if RECORDS.value else None
    table = released.import_faiss(folder, BANK.value, LATENTS.value, records, EMBEDDER.value or "vectors")
    print(f"{len(table)} videos: {BANK.value}, version {table.version}")


def versions() -> None:
    """List the versions of the bank, which --version opens.

    ditmem bank versions --bank bank
    """
    from ditmem_jax.bank.table import Table

    rows = Table.open(BANK.value).versions()
    if JSON.value:
        print(json.dumps(rows, default=str))
    else:
        _print(BANK.value, rows)


def compact() -> None:
    """Bring all rows into as few files as can be, for speed; adding does so by itself for small ones.

    --older_than deletes the versions before, for good.

        ditmem bank compact --bank bank
    """
    from ditmem_jax.bank.table import Table

    table = Table.open(BANK.value)
    age = None if OLDER.value is None else datetime.timedelta(days=OLDER.value)
    count = table.compact(age)
    print(f"{len(table)} videos in {count} fragments: {BANK.value}, version {table.version}")


def serve() -> None:
    """Serve a page to look into the bank and to change it.

    It answers this machine only unless --host says more. Clips play with --videos or --config; with --config
    videos can be added.

        ditmem bank serve --bank bank --videos videos --config tiny
    """
    from ditmem_jax.gallery import server
    from ditmem_jax.gallery.gallery import Gallery

    config = None if flags.FLAGS.config is None else CONFIG()
    gallery = Gallery.open(BANK.value, videos=VIDEOS.value, config=config, cache=CACHE.value)
    server.serve(gallery, HOST.value, PORT.value)


def _given() -> "tuple[pa.Table, np.ndarray | None]":
    """Return the rows, and the vectors if there are any, of --records or --table."""
    from ditmem_jax.bank.rows import read_rows, read_vectors, rows_of_records

    if bool(RECORDS.value) == bool(TABLE.value) or (VECTORS.value and not TABLE.value):
        raise UserError("which videos", expected="--records=DIR[,DIR], or --table=FILE [--vectors=FILE.npy]")
    if RECORDS.value:
        return rows_of_records(RECORDS.value), None
    vectors = read_vectors(VECTORS.value) if VECTORS.value else None
    return read_rows(TABLE.value, strict=vectors is not None), vectors


def _vectors(embedder: "Embedder", rows: "pa.Table", given: "np.ndarray | None") -> "np.ndarray | None":
    """Return the given vectors, or those that a cluster makes if it is to; None leaves them to the table."""
    cluster = CLUSTER()
    if cluster is None or given is not None:
        return given
    from ditmem_jax.encode.engines import OnRay  # with the networks of `encode`, which are slow to import

    return OnRay(*cluster).documents(embedder, rows["caption"].to_pylist())


def _queries(prompt: str | None) -> "list[str] | np.ndarray":
    from ditmem_jax.bank.rows import read_vectors

    if (prompt is None) == (QUERIES.value is None):
        raise UserError(
            "what to search for", expected="either a text, or --queries=FILE with one a line (or .npy)"
        )
    if prompt is not None:
        return [prompt]
    if QUERIES.value.endswith(".npy"):
        return read_vectors(QUERIES.value)
    try:
        lines = Path(QUERIES.value).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {QUERIES.value}", found=error) from error
    return [line for line in lines if line.strip()]


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table that fits the terminal; in a pipe it is as wide as it needs to be."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    grid = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        grid.add_column(name, overflow="fold" if name == "id" else "ellipsis", no_wrap=name != "id")
    for row in rows:
        grid.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(grid)


COMMANDS = {
    "build": cli.Command(build, flags="records table vectors embedder engine address workers"),
    "add": cli.Command(add, flags="records table vectors engine address workers"),
    "remove": cli.Command(remove, "[ID,ID]", "where"),
    "search": cli.Command(search, "[PROMPT]", "k where queries version ivf_above json"),
    "show": cli.Command(show, "ID", "version"),
    "stats": cli.Command(stats, flags="version json"),
    "verify": cli.Command(verify, flags="version deep"),
    "match": cli.Command(match, "RECORDS", "k threshold duplicate_latents ivf_above"),
    "tokens": cli.Command(tokens, flags="version encoder out"),
    "export-faiss": cli.Command(export_faiss, "DIR", "version latents"),
    "import-faiss": cli.Command(import_faiss, "DIR", "latents records embedder"),
    "versions": cli.Command(versions, flags="json"),
    "compact": cli.Command(compact, flags="older_than"),
    "serve": cli.Command(serve, flags="config videos cache host port"),
}

if __name__ == "__main__":
    BANK = flags.DEFINE_string("bank", None, "The bank: a folder, or s3://, gs:// ...", required=True)
    RECORDS = flags.DEFINE_list("records", None, "Folders of records, DIR[,DIR].")
    TABLE = flags.DEFINE_string("table", None, "Table of videos (.parquet, .csv or .jsonl) with a column id.")
    VECTORS = flags.DEFINE_string(
        "vectors", None, "Vectors of the rows of --table, by the bank's embedder: a .npy file [N, D]."
    )
    EMBEDDER = flags.DEFINE_string(
        "embedder", None, "lexical, or sentence-transformers:NAME_OR_FOLDER[@REVISION]."
    )
    K = flags.DEFINE_integer("k", None, "How many videos; 5 by default.", lower_bound=1)
    WHERE = flags.DEFINE_string("where", None, 'Filter in SQL, such as "motion > 0.5".')
    QUERIES = flags.DEFINE_string("queries", None, "File of texts, one a line, or of vectors (.npy).")
    VERSION = flags.DEFINE_integer("version", None, "An older version of the bank.")
    THRESHOLD = flags.DEFINE_float(
        "threshold", 0.98, "Cosine of captions above which videos are taken for duplicates; 1 for none."
    )
    DUPLICATE_LATENTS = flags.DEFINE_float(
        "duplicate_latents",
        0.985,
        "Correlation of latents above which match takes videos for duplicates by sight; 1 for none.",
    )
    DEEP = flags.DEFINE_bool("deep", False, "Read the latents of every record.")
    ENCODER = flags.DEFINE_string("encoder", None, "File of a trained memory encoder.")
    OUT = flags.DEFINE_string("out", None, "Folder that the tokens go to; the bank itself by default.")
    LATENTS = flags.DEFINE_string("latents", None, "Folder of latents as .pt files.")
    IVF = flags.DEFINE_integer(
        "ivf_above", 1_000_000, "Videos beyond which search is approximate (FAISS IVF)."
    )
    JSON = flags.DEFINE_bool("json", False, "Print JSON, a line per query.")
    OLDER = flags.DEFINE_float(
        "older_than", None, "Delete versions older than so many days; none by default.", 0
    )
    CLUSTER = cli.define_cluster("embeds captions")
    CONFIG = cli.define_config()
    VIDEOS = flags.DEFINE_string("videos", None, "Folder of the original videos.")
    CACHE = flags.DEFINE_string("cache", None, "Folder of decoded clips; one of the user's by default.")
    HOST = flags.DEFINE_string(
        "host",
        "127.0.0.1",
        "Address to answer at, and names that browsers call it by: 0.0.0.0,NAME lets other machines in.",
    )
    PORT = flags.DEFINE_integer("port", 7860, "Port to answer at; 0 takes a free one.", 0, 65535)
    cli.run(COMMANDS)
