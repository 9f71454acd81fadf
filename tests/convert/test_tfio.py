"""tensorflow-io in its own environment, from files behind an HTTP server to input records.

What runs there is a process of its own, `python -m convert.tfio`; what it must have made is told by PyAV here.
"""

import csv
import http.server
import json
import os
import re
import subprocess
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource

from ditmem_jax.data.sources import Videos, read_row
from ditmem_jax.data.video import read_clip, read_video, write_video

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-tfio" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="needs the environment of `make tfio-env`")

COUNT = 5
WRITE = """
import json, sys
import tensorflow as tf

def feature(value):
    if isinstance(value, int):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

folder, options = sys.argv[1], tf.io.TFRecordOptions(compression_type="GZIP")
plain = tf.io.TFRecordWriter(f"{folder}/part.tfrecord")
zipped = tf.io.TFRecordWriter(f"{folder}/part.tfrecord.gz", options)
for i in range(int(sys.argv[2])):
    values = {
        "mp4": open(f"{folder}/videos/{i}.mp4", "rb").read(), "text": f"ball {i}, ü".encode(), "planet": b"\\xc3\\x98rn",
        "take": i, "thumbnail": b"\\xff\\xd8",
    }
    record = tf.train.Example(features=tf.train.Features(feature={k: feature(v) for k, v in values.items()}))
    for writer in (plain, zipped):
        writer.write(record.SerializeToString())
for writer in (plain, zipped):
    writer.write(tf.train.Example().SerializeToString())
    writer.close()
print(json.dumps(tf.io.gfile.get_registered_schemes()))
import tensorflow_io
print(json.dumps(tf.io.gfile.get_registered_schemes()))
"""


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a folder, and the ranges of files that tensorflow-io asks for."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self):
        path = self.folder / self.path[1:]
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(data))
        self.send_response(416 if start >= len(data) else 206 if asked else 200)
        self.send_header("Content-Length", str(len(data[start:stop])))
        self.end_headers()
        self.wfile.write(data[start:stop])

    def log_message(self, *_):
        pass


def frames(count=6, height=34, width=48):
    """A moving ramp, with more in it than a codec keeps."""
    t, y, x = np.mgrid[:count, :height, :width]
    return np.stack([x * 2 + t * 5, y * 3 + t * 9, x + y + t * 7], -1).astype(np.uint8)


def write_marked(path, width=48, codec="libx264", **context):
    """A video of a kind that tensorflow-io decodes otherwise than PyAV."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = width, 34, "yuv420p"
        if rotation := context.pop("rotation", 0):
            stream.set_display_rotation(rotation)
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for frame in frames(width=width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos, the same in TFRecord files, and a table that names more: a turned one, and some that are no use."""
    folder = tmp_path_factory.mktemp("user")
    videos = folder / "videos"
    videos.mkdir()
    for i in range(COUNT):
        write_video(videos / f"{i}.mp4", frames(4 + i), fps=12.5)
    write_marked(videos / "turned.mp4", rotation=90)
    write_marked(videos / "hd.mp4", colorspace=1)
    write_marked(videos / "wide.mp4", width=54)
    write_marked(videos / "av1.mp4", width=64, codec="libsvtav1")
    (videos / "cut.mp4").write_bytes((videos / "0.mp4").read_bytes()[:-99])
    (videos / "junk.mp4").write_text("junk")
    done = subprocess.run(
        [PYTHON, "-c", WRITE, folder, str(COUNT)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    (folder / "schemes.json").write_text("[" + ",".join(done.stdout.splitlines()) + "]")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("_", (Server,), {"folder": folder})
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(out, *arguments):
    environment = {
        name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"
    }  # jax's
    return subprocess.run(
        [PYTHON, "-m", "convert.tfio", f"--out={out}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def table(folder, *videos):
    path = folder / f"{len(videos)}.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("video", "caption", "planet"), *((v, f"a {v}, ü", "Ørn") for v in videos)]
        )
    return path


def read(out):
    """(metadata, tensors) of every record by id."""
    records = {}
    for path in sorted(out.glob("videos-*.array_record")):
        source = ArrayRecordDataSource([str(path)])
        for data in map(source.__getitem__, range(len(source))):
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            records[header["__metadata__"]["id"]] = (header["__metadata__"], safetensors.numpy.load(data))
    return records


def assert_clips(out, videos):
    """`encode` gets from the records what it would get from the files."""
    options = dict(frames=5, height=16, width=16)
    for row, path in zip(Videos([out]).rows(), videos, strict=True):
        got, want = read_row(row, options), read_clip(path, **options)
        np.testing.assert_array_equal(got.frames, want.frames)
        assert got.facts.frames == want.facts.frames and got.facts.fps == pytest.approx(want.facts.fps)


def reasons(out):
    with open(out / "skipped.csv", newline="") as file:
        return {row["video"]: row["reason"] for row in csv.DictReader(file)}


def test_tfrecords_over_http_pass_through(folder, address, tmp_path):
    path = f"{address}/part.tfrecord"
    done = run(tmp_path / "out", f"--in={path}", "--video=mp4", "--caption=text", "--shard_size=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    records = read(tmp_path / "out")
    assert list(records) == [f"{path}#{i}" for i in range(COUNT)]
    for i, (metadata, tensors) in enumerate(records.values()):
        assert metadata["caption"] == f"ball {i}, ü" and metadata["source"] == metadata["id"]
        assert json.loads(metadata["extra"]) == {"planet": "Ørn", "take": str(i)}
        assert tensors.keys() == {"video"}
        assert tensors["video"].tobytes() == (folder / "videos" / f"{i}.mp4").read_bytes()
    assert "there is no feature 'text'" in reasons(tmp_path / "out")[f"{path}#{COUNT}"]
    assert f"neither text nor numbers: thumbnail of {COUNT} videos" in done.stdout
    assert "5 videos written, 0 found written, 1 skipped" in done.stdout
    assert_clips(tmp_path / "out", [folder / "videos" / f"{i}.mp4" for i in range(COUNT)])


def test_compressed_tfrecords_decode_to_the_frames_of_pyav(folder, tmp_path):
    path = folder / "part.tfrecord.gz"
    done = run(tmp_path / "out", f"--in={path}", "--video=mp4", "--caption=text", "--mode=decode")
    assert done.returncode == 0, done.stderr
    for i, (metadata, tensors) in enumerate(read(tmp_path / "out").values()):
        video = read_video(folder / "videos" / f"{i}.mp4")
        assert float(metadata["fps"]) == video.fps == 12.5
        np.testing.assert_array_equal(tensors["frames"], video.frames)
    assert_clips(tmp_path / "out", [folder / "videos" / f"{i}.mp4" for i in range(COUNT)])


def test_paths_over_http_decode_or_are_listed_with_the_reason(folder, address, tmp_path):
    local = folder / "videos" / "1.mp4"
    names = [
        "0.mp4",
        "0.mp4",
        str(local),
        "turned.mp4",
        *(f"{x}.mp4" for x in ("hd", "wide", "av1", "cut", "junk", "no")),
    ]
    out = tmp_path / "out"
    path = table(folder, *names)
    done = run(out, f"--in={address}/{path.name}", f"--videos={address}/videos", "--mode=decode", "--strict")
    assert done.returncode == 1 and "6 videos were skipped" in done.stderr
    assert "Traceback" not in done.stderr
    records = read(out)
    assert list(records) == ["0.mp4", "0.mp4#2", str(local), "turned.mp4"]
    for metadata, tensors in records.values():
        assert metadata["caption"] == f"a {metadata['source']}, ü" and json.loads(metadata["extra"]) == {
            "planet": "Ørn"
        }
        video = read_video(folder / "videos" / metadata["source"])
        np.testing.assert_array_equal(tensors["frames"], video.frames)
    assert {name: why.split("; ")[-2 if "MODE" in why else -1] for name, why in reasons(out).items()} == {
        "hd.mp4": "found: colours marked as other than BT.601",
        "wide.mp4": "found: a width of 54, no multiple of 16",
        "av1.mp4": "found: codec libdav1d, not h264, hevc, vp9",
        "cut.mp4": f"found: {(folder / 'videos' / 'cut.mp4').stat().st_size}",
        "junk.mp4": "found: Invalid data found when processing input",
        "no.mp4": f"found: 404 Client Error: Not Found for url: {address}/videos/no.mp4",
    }


def test_a_run_that_broke_off_continues_after_its_last_shard(folder, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "videos").symlink_to(folder / "videos")
    path = table(tmp_path, *(f"videos/{i}.mp4" for i in range(4)), "videos/later.mp4")
    gone = tmp_path / "gone.csv"
    flags = (f"--in={path}", f"--in={gone}", "--shard_size=2")
    broken = run(out, *flags)
    assert broken.returncode == 1
    assert (
        broken.stderr.startswith(f"error: cannot read {gone}\n  found: ") and "No such file" in broken.stderr
    )
    assert not json.loads((out / "videos.json").read_text())["complete"]
    first = {path.name: path.stat().st_mtime_ns for path in out.glob("videos-*")}
    assert len(read(out)) == 4
    write_video(tmp_path / "videos" / "later.mp4", frames(), fps=8)
    gone.write_text(f"video_path,caption\n{tmp_path}/videos/4.mp4,the last\n")
    again = run(out, *flags)
    assert "2 videos written, 4 found written, 0 skipped" in again.stdout, again.stderr
    assert [len(ArrayRecordDataSource([str(p)])) for p in sorted(out.glob("*.array_record"))] == [2, 2, 2]
    assert first.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("videos-*")}.items()
    assert not (out / "skipped.csv").exists() and not list(out.glob(".*"))
    assert json.loads((out / "videos.json").read_text())["complete"]
    other = run(out, *flags, "--mode=decode")
    assert other.returncode == 1 and "holds the records of another run" in other.stderr


def test_buckets_that_cannot_be_reached_are_an_error_in_a_few_lines(folder, tmp_path):
    before, after = json.loads((folder / "schemes.json").read_text())
    assert {"gs", "s3", "http", "https"} <= set(after) and "s3" not in before
    done = run(tmp_path / "out", "--in=gs://no-such-bucket/part.tfrecord")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot read gs://no-such-bucket/part.tfrecord\n  found: ")
    assert len(done.stderr.splitlines()) <= 3
