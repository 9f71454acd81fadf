"""The released layout: what FAISS finds, the bank finds; names and numbers come back; files that disagree are named."""

import json
import pickle
import subprocess
import sys

import faiss
import numpy as np
import pyarrow as pa
import pytest

from ditmem_jax.bank import released
from ditmem_jax.bank.embedders import make_embedder
from ditmem_jax.bank.released import export_faiss, import_faiss
from ditmem_jax.bank.search import Bank
from ditmem_jax.bank.table import Table
from ditmem_jax.data.records import RecordReader
from ditmem_jax.errors import UserError

COUNT, DIM, SHAPE = 40, 16, (4, 3, 2, 5)  # latents [C, T, H, W]


@pytest.fixture
def layout(tmp_path):
    """Files as the release's own scripts write them; the second caption of one video, and unknown numbers."""
    folder = tmp_path / "index"
    folder.mkdir()
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((COUNT, DIM)).astype(np.float32)
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    faiss.write_index(index, str(folder / "labels.index"))
    videos = [f"clip {max(i, 1)}.mp4" for i in range(COUNT)]
    (folder / "id_map.json").write_text(json.dumps(dict(enumerate(videos)), indent=2))
    metadata = [
        dict(index=i, video=video, caption=f"caption {i} 🪐", aesthetic_score=4.5, motion_score=i / 8,
             camera_motion="pan", frame=i, fps=8.0, seconds=i / 8)
        for i, video in enumerate(videos)
    ]  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2))
    return folder


def write_latents(folder, torch, bare=()):
    folder.mkdir()
    rng, arrays = np.random.default_rng(1), {}
    for i in range(1, COUNT):
        latent = torch.from_numpy(rng.standard_normal(SHAPE).astype(np.float32)).to(torch.bfloat16)
        about = {"video_id": f"clip {i}", "shape": list(latent.shape), "dtype": str(latent.dtype)}
        torch.save(latent if i in bare else {"latent": latent} | about, folder / f"clip {i}.pt")
        arrays[f"clip {i}.mp4"] = latent.float().numpy()
    return arrays


def test_search_equals_that_of_faiss(layout, tmp_path):
    bank = Bank(import_faiss(layout, tmp_path / "bank"))
    queries = np.random.default_rng(2).standard_normal((30, DIM)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    scores, rows = faiss.read_index(str(layout / "labels.index")).search(queries, 5)
    found = bank.search(queries, 5)
    names = ["clip 1.mp4", "clip 1.mp4#2", *(f"clip {i}.mp4" for i in range(2, COUNT))]
    assert found.ids == [[names[i] for i in best] for best in rows]
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    with pytest.raises(UserError, match="made elsewhere"):
        bank.search(["caption 3"], 1)


def test_numbers_become_columns_and_unknown_ones_absent(layout, tmp_path):
    table = import_faiss(layout, tmp_path / "bank")
    rows = {row["id"]: row for row in table.rows().to_pylist()}
    first, last = rows["clip 1.mp4"], rows[f"clip {COUNT - 1}.mp4"]
    assert (first["duration"], first["frames"], first["caption"]) == (None, None, "caption 0 🪐")
    assert (last["frames"], last["fps"], last["camera_motion"]) == (COUNT - 1, 8.0, "pan")
    assert last["motion_score"] == (COUNT - 1) / 8 and last["records"] is None
    assert len(table.rows("motion_score > 4")) == COUNT - 33


def test_export_and_import_lead_back(layout, tmp_path):
    table = import_faiss(layout, tmp_path / "bank", embedder="vectors:gte")
    export_faiss(table, tmp_path / "exported")
    again = import_faiss(tmp_path / "exported", tmp_path / "again", embedder="vectors:gte")
    assert again.rows().equals(table.rows())
    vectors = [
        faiss.read_index(str(folder / "labels.index")).reconstruct_n(0, COUNT)
        for folder in (layout, tmp_path / "exported")
    ]
    np.testing.assert_array_equal(*vectors)
    ours, theirs = (json.loads((f / "metadata.json").read_text()) for f in (tmp_path / "exported", layout))
    assert [row | {"video": ""} for row in ours[2:]] == [
        row | {"source": row["video"], "video": ""} for row in theirs[2:]
    ]
    with pytest.raises(UserError, match="already"):
        export_faiss(table, tmp_path / "exported")


def test_any_bank_leads_back(tmp_path):
    """One that knows no durations, with columns of the layout's names, and a caption without words."""
    rows = {"id": ["a", "b"], "caption": ["a ball", "?!"], "source": ["film", "film"], "index": ["x", "y"]}
    rows = pa.table(rows)
    table = Table.create(tmp_path / "bank", make_embedder("lexical", rows["caption"].to_pylist()), rows)
    export_faiss(table, tmp_path / "exported")
    again = import_faiss(tmp_path / "exported", tmp_path / "again").rows()
    assert again["source"].to_pylist() == ["film", "film"] and again["index_"].to_pylist() == ["x", "y"]
    assert again["duration"].null_count == 2


def test_latents_become_records_and_go_back(layout, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = write_latents(tmp_path / "latents", torch, bare=(3,))
    table = import_faiss(layout, tmp_path / "bank", tmp_path / "latents")
    reader = RecordReader(tmp_path / "bank-records")
    assert (reader.meta.latents, reader.meta.dtype) == ((3, 2, 5, 4), "bfloat16")
    for record in reader:
        np.testing.assert_array_equal(
            np.moveaxis(record.latents, -1, 0).astype(np.float32), arrays[record.source]
        )
    pointers = table.rows(columns=["id", "row", "checksum"]).to_pylist()
    assert {row["id"]: row["checksum"] for row in pointers} == dict(
        zip([entry.id for entry in reader.entries], reader.checksums, strict=True)
    )
    table.remove(["clip 1.mp4#2"])  # has the file of latents that clip 1.mp4 has
    export_faiss(table, tmp_path / "exported", tmp_path / "again")
    for video, latents in arrays.items():
        loaded = torch.load(tmp_path / "again" / video.replace(".mp4", ".pt"), weights_only=True)
        np.testing.assert_array_equal(loaded["latent"].float().numpy(), latents)


def test_an_import_that_was_stopped_continues(layout, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    write_latents(tmp_path / "latents", torch)
    given = layout, tmp_path / "bank", tmp_path / "latents", tmp_path / "records"
    with monkeypatch.context() as patch:
        patch.setattr(Table, "create", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_faiss(*given)
    read, seen = released._read_latents, []
    monkeypatch.setattr(released, "_read_latents", lambda path: seen.append(path) or read(path))
    assert len(import_faiss(*given)) == COUNT
    assert len(seen) == 1  # for its shape
    with pytest.raises(UserError, match="there is a bank at"):
        import_faiss(*given)


def test_latents_that_do_not_fit_are_named(layout, tmp_path):
    torch = pytest.importorskip("torch")
    latents = tmp_path / "latents"
    write_latents(latents, torch)
    marker = tmp_path / "ran"

    class Runs:
        def __reduce__(self):
            return open, (str(marker), "w")

    cases = [
        (lambda file: file.unlink(), "1 of 40 videos have no latents"),
        (lambda file: torch.save({"latent": torch.zeros(3)}, file), "no latents of a video"),
        (lambda file: torch.save(torch.zeros(4, 3, 2, 6), file), "does not fit the others"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "cannot read"),
        (lambda file: file.write_bytes(pickle.dumps(Runs())), "nothing in it was run"),
    ]
    good = (latents / "clip 7.pt").read_bytes()
    for number, (spoil, message) in enumerate(cases):
        (latents / "clip 7.pt").write_bytes(good)
        spoil(latents / "clip 7.pt")
        with pytest.raises(UserError, match=message):
            import_faiss(layout, tmp_path / "bank", latents, tmp_path / f"records{number}")
    assert not marker.exists() and not (tmp_path / "bank").exists()


def spoil_json(name, change):
    return lambda folder: (folder / name).write_text(
        json.dumps(change(json.loads((folder / name).read_text())))
    )


def other_index(index, vectors):
    def write(folder):
        index.add(vectors)
        faiss.write_index(index, str(folder / "labels.index"))

    return write


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "labels.index").unlink(), "no bank in the released layout"),
        (lambda folder: (folder / "labels.index").write_bytes(b"IxF"), "an index of FAISS"),
        (lambda folder: (folder / "metadata.json").unlink(), "cannot read .*metadata"),
        (lambda folder: (folder / "id_map.json").write_text("[[["), "id_map.json is damaged"),
        (spoil_json("id_map.json", lambda names: names | {"40": "x.mp4"}), '"0" to "39"'),
        (spoil_json("id_map.json", lambda names: names | {"3": 3}), "row 3 .* released layout"),
        (spoil_json("id_map.json", lambda names: names | {"3": "x.mp4"}), "disagree on row 3"),
        (spoil_json("metadata.json", lambda rows: rows[1:]), "a list of 40"),
        (spoil_json("metadata.json", lambda rows: [*rows[1:], rows[0]]), "disagree on row 0"),
        (spoil_json("metadata.json", lambda rows: [{}, *rows[1:]]), "row 0 .* released layout"),
        (other_index(faiss.IndexFlatL2(DIM), np.eye(COUNT, DIM, dtype=np.float32)), "another kind of index"),
        (other_index(faiss.IndexFlatIP(DIM), 2 * np.ones((COUNT, DIM), np.float32)), "not of length 1"),
    ],
)
def test_files_that_do_not_fit_are_named(layout, tmp_path, spoil, message):
    spoil(layout)
    with pytest.raises(UserError, match=message):
        import_faiss(layout, tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


@pytest.mark.slow
def test_the_commands(layout, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "ditmem_jax.bank", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    bank = f"--bank={tmp_path / 'bank'}"
    done = run("import-faiss", layout, bank, "--embedder=vectors:gte")
    assert done.returncode == 0 and f"{COUNT} videos" in done.stdout, done.stderr
    assert Table.open(tmp_path / "bank").description["name"] == "gte"
    assert run("export-faiss", tmp_path / "exported", bank).returncode == 0
    assert len(import_faiss(tmp_path / "exported", tmp_path / "again")) == COUNT
    failed = run("import-faiss", tmp_path, f"--bank={tmp_path / 'third'}")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "labels.index" in failed.stderr


def test_lists_are_read_as_well(layout, tmp_path):
    spoil_json("id_map.json", lambda names: list(names.values()))(layout)
    spoil_json("metadata.json", lambda rows: {str(i): row for i, row in enumerate(rows)})(layout)
    assert len(import_faiss(layout, tmp_path / "bank")) == COUNT
