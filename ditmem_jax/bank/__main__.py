"""`python -m ditmem_jax.bank COMMAND --bank BANK ...`: a memory that anyone can search and change.

    python -m ditmem_jax.bank build --bank bank --records records
    python -m ditmem_jax.bank search "a ball falls on zorvex" --bank bank --k 3 --where "motion > 0.5"
    python -m ditmem_jax.bank add --bank bank --records more
    python -m ditmem_jax.bank remove clip-7.mp4,clip-9.mp4 --bank bank

Commands:

    build             a new bank of --records, or of --table with --vectors
    add               the same into a bank that is there
    remove [ID,ID]    videos by id, or all that --where leaves
    search [PROMPT]   the --k videos nearest to a text, or to each line of the file --queries
    show ID           all that the bank says about a video
    stats             how many videos, of what
    verify            checks the table and the records that it points to
    match RECORDS     finds --k references for each record of a training set, see `bank.matches`
    tokens            what an --encoder makes of each video, once, into --out; sampling takes it as --features
    export-faiss DIR  the bank in the released layout: labels.index, id_map.json, metadata.json; --latents=DIR for .pt
    import-faiss DIR  a new bank from that layout; with --latents=DIR a folder of records for sampling as well
    versions          what the bank was, commit by commit; --version opens one
    serve             a page to look into the bank and to change it, for this machine only unless --host says more;
                      clips play with --videos or --config, and with --config videos can be added
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import flags
from rich.console import Console
from rich.table import Table as Grid

from ditmem_jax.bank import matches, released
from ditmem_jax.bank.embedders import Embedder, load_embedder, make_embedder
from ditmem_jax.bank.rows import read_rows, rows_of_records
from ditmem_jax.bank.search import IVF_ABOVE, Bank
from ditmem_jax.bank.table import Table
from ditmem_jax.bank.verify import check
from ditmem_jax.config import flags as cli
from ditmem_jax.data.records import RecordReader
from ditmem_jax.errors import UserError, nearest


def build() -> None:
    rows, vectors = _given()
    name = EMBEDDER.value or ("lexical" if vectors is None else "vectors")
    dim = None if vectors is None else vectors.shape[1]
    embedder = make_embedder(name, (text.as_py() for text in rows["caption"]), dim)
    table = Table.create(BANK.value, embedder, rows, _vectors(embedder, rows, vectors))
    print(f"{len(table)} videos: {BANK.value}, version {table.version}")


def add() -> None:
    rows, vectors = _given()
    table = Table.open(BANK.value)
    embedder = load_embedder(table.description, table.words, embeds=vectors is None)
    table.add(rows, embedder, _vectors(embedder, rows, vectors))
    print(f"{len(rows)} videos added: {BANK.value}, version {table.version}")


def remove(ids: str | None = None) -> None:
    if (ids is None) == (WHERE.value is None):
        raise UserError("what is to be removed", expected="ids, as ID,ID, or --where")
    table = Table.open(BANK.value)
    if ids is not None:
        whole = table.rows(columns=["id"])["id"].to_pylist()
        named = [ids] if ids in whole else ids.split(",")  # ids may hold commas
    removed = table.remove(None if ids is None else named, WHERE.value)
    print(f"{removed} videos removed: {BANK.value}, version {table.version}")


def search(prompt: str | None = None) -> None:
    queries = _queries(prompt)
    found = Bank.open(BANK.value, VERSION.value, IVF.value).search(queries, K.value, where=WHERE.value)
    shown = queries if isinstance(queries, list) else [f"query {i}" for i in range(len(queries))]
    for query, rows, scores in zip(shown, found.rows, found.scores, strict=True):
        rows = [row | {"score": round(float(score), 6)} for score, row in zip(scores, rows, strict=True)]
        if JSON.value:
            print(json.dumps({"query": query, "found": rows}, ensure_ascii=False))
        else:
            _print(query, [{name: row[name] for name in ("score", "id", "caption")} for row in rows])


def show(id: str) -> None:
    table = Table.open(BANK.value, VERSION.value)
    (row,) = table.by_id([id]).to_pylist()
    print(json.dumps(row, ensure_ascii=False, indent=1))


def stats() -> None:
    table = Table.open(BANK.value, VERSION.value)
    rows = table.rows()
    about = {"bank": BANK.value, "version": table.version, "videos": len(rows), "embedder": table.description}
    columns = [_summary(name, rows[name]) for name in rows.schema.names if rows[name].null_count < len(rows)]
    if JSON.value:
        print(json.dumps(about | {"columns": columns}, ensure_ascii=False))
    else:
        print("\n".join(f"{name:<9} {value}" for name, value in about.items()))
        _print("columns", columns)


def _summary(name: str, column: pa.ChunkedArray) -> dict[str, Any]:
    """How many rows have a value, how many values there are, and their range."""
    low, high = pc.min_max(column).values()
    return {
        "column": name,
        "type": str(column.type),
        "there": len(column) - column.null_count,
        "different": pc.count_distinct(column).as_py(),
        "least": low.as_py(),
        "most": high.as_py(),
    }


def verify() -> None:
    table = Table.open(BANK.value, VERSION.value)
    problems = check(table, DEEP.value)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{len(problems)} faults in the bank {BANK.value}")
    print(f"{len(table)} videos, no fault: {BANK.value}, version {table.version}")


def match(folder: str) -> None:
    count = 5 if K.value is None else K.value
    bank = Bank.open(BANK.value, ivf_above=IVF.value)
    found = matches.find(RecordReader(folder), bank, count, THRESHOLD.value)
    found.save(Path(folder) / matches.FILE)
    left_out = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
    print(f"{count} references for each of {len(found.table)} records: {Path(folder) / matches.FILE}")
    print(f"kept out: {left_out}")


def tokens() -> None:
    if ENCODER.value is None:
        raise UserError("--encoder is missing", expected="the encoder.safetensors of a training run")
    from ditmem_jax.bank.features import make_features  # the networks are slow to import

    out = OUT.value or BANK.value
    print(make_features(Table.open(BANK.value, VERSION.value), ENCODER.value, out))
    print(f"for python -m ditmem_jax.sample: --features={out}")


def export_faiss(folder: str) -> None:
    table = Table.open(BANK.value, VERSION.value)
    released.export_faiss(table, folder, LATENTS.value)
    print(f"{len(table)} videos: {folder}")


def import_faiss(folder: str) -> None:
    if RECORDS.value and len(RECORDS.value) > 1:
        raise UserError("import-faiss writes one folder of records", found=", ".join(RECORDS.value))
    records = RECORDS.value[0] if RECORDS.value else None
    table = released.import_faiss(folder, BANK.value, LATENTS.value, records, EMBEDDER.value or "vectors")
    print(f"{len(table)} videos: {BANK.value}, version {table.version}")


def versions() -> None:
    rows = Table.open(BANK.value).versions()
    if JSON.value:
        print(json.dumps(rows, default=str))
    else:
        _print(BANK.value, rows)


def serve() -> None:
    from ditmem_jax.gallery import server  # networks and a web server, which no other command needs
    from ditmem_jax.gallery.gallery import Gallery

    config = None if CONFIG.value is None else cli.load_config(CONFIG)
    gallery = Gallery.open(BANK.value, videos=VIDEOS.value, config=config, cache=CACHE.value)
    server.serve(gallery, HOST.value, PORT.value)


def _given() -> tuple[pa.Table, np.ndarray | None]:
    """Rows, and vectors if there are any, of the command line."""
    if bool(RECORDS.value) == bool(TABLE.value) or (VECTORS.value and not TABLE.value):
        raise UserError("which videos", expected="--records=DIR[,DIR], or --table=FILE [--vectors=FILE.npy]")
    if RECORDS.value:
        return rows_of_records(RECORDS.value), None
    return read_rows(TABLE.value), read_vectors(VECTORS.value) if VECTORS.value else None


def _vectors(embedder: Embedder, rows: pa.Table, given: np.ndarray | None) -> np.ndarray | None:
    """The given vectors, or those that a cluster makes if it is to; None leaves them to the table."""
    cluster = CLUSTER()
    if cluster is None or given is not None:
        return given
    from ditmem_jax.encode.engines import OnRay  # with the networks of `encode`, which are slow to import

    return OnRay(*cluster).documents(embedder, rows["caption"].to_pylist())


def _queries(prompt: str | None) -> list[str] | np.ndarray:
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


def read_vectors(path: str) -> np.ndarray:
    """A matrix [N, D] of float32 mapped from a .npy file."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}", expected="a .npy file", found=error) from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise UserError(
            f"{path} holds no vectors",
            expected="floats [N, D]",
            found=f"{vectors.dtype} {list(vectors.shape)}",
        )
    return vectors


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    """A table that fits the terminal; in a pipe it is as wide as it needs to be."""
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    grid = Grid(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        grid.add_column(name, overflow="fold" if name == "id" else "ellipsis", no_wrap=name != "id")
    for row in rows:
        grid.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(grid)


# What a command takes from the command line beside flags, its flags beside --bank, and what it does.
COMMANDS: dict[str, tuple[str, str, Callable[..., None]]] = {
    "build": ("", "records table vectors embedder engine address workers", build),
    "add": ("", "records table vectors engine address workers", add),
    "remove": ("[ID,ID]", "where", remove),
    "search": ("[PROMPT]", "k where queries version ivf_above json", search),
    "show": ("ID", "version", show),
    "stats": ("", "version json", stats),
    "verify": ("", "version deep", verify),
    "tokens": ("", "version encoder out", tokens),
    "export-faiss": ("DIR", "version latents", export_faiss),
    "import-faiss": ("DIR", "latents records embedder", import_faiss),
    "versions": ("", "json", versions),
    "match": ("RECORDS", "k threshold ivf_above", match),
    "serve": ("", "config set videos cache host port", serve),
}


def main(command: str, argument: str | None = None) -> None:
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}", expected=nearest(command, COMMANDS, len(COMMANDS)))
    takes, names, action = COMMANDS[command]
    ours = {name for _, names, _ in COMMANDS.values() for name in names.split()}
    if ignored := [name for name in sorted(ours - set(names.split())) if flags.FLAGS[name].present]:
        raise UserError(
            f"{command} takes no --{ignored[0]}",
            expected=", ".join(f"--{name}" for name in ["bank", *names.split()]),
        )
    if argument is not None and not takes:
        raise UserError(f"{command} takes no {argument!r}", fix="flags start with --; see --help")
    if argument is None and takes and not takes.startswith("["):
        raise UserError(f"{command} needs {takes}")
    action(*([] if argument is None else [argument]))


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
        "threshold", 0.98, "Cosine of captions above which match takes videos for duplicates; 1 for none."
    )
    DEEP = flags.DEFINE_bool("deep", False, "verify reads the latents of every record.")
    ENCODER = flags.DEFINE_string("encoder", None, "File of a trained memory encoder, for tokens.")
    OUT = flags.DEFINE_string("out", None, "Folder that tokens go to; the bank itself by default.")
    LATENTS = flags.DEFINE_string(
        "latents", None, "Folder of latents as .pt files, for export-faiss and import-faiss."
    )
    IVF = flags.DEFINE_integer(
        "ivf_above", IVF_ABOVE, "Videos beyond which search is approximate (FAISS IVF)."
    )
    JSON = flags.DEFINE_bool("json", False, "Print JSON, a line per query.")
    CLUSTER = cli.define_cluster("embeds captions")
    CONFIG = cli.define_config()
    VIDEOS = flags.DEFINE_string("videos", None, "serve: folder of the original videos.")
    CACHE = flags.DEFINE_string(
        "cache", None, "serve: folder of decoded clips; one of the user's by default."
    )
    HOST = flags.DEFINE_string(
        "host",
        "127.0.0.1",
        "serve: address to answer at, and names that browsers call it by: 0.0.0.0,NAME lets other machines in.",
    )
    PORT = flags.DEFINE_integer("port", 7860, "serve: port to answer at; 0 takes a free one.", 0, 65535)
    cli.run(main, "COMMAND [ARGUMENT]")
