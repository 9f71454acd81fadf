"""Requests to the page made by hand: none names a file, a function or a host that is not its own."""

import contextlib
import json
import os
import re
import uuid

import httpx
import pytest

from ditmem_jax.errors import UserError
from ditmem_jax.gallery import server, uploads, views
from ditmem_jax.gallery.uploads import LIMIT

META = {"_type": "gradio.FileData"}


class Visitor(httpx.Client):
    """A browser session: it keeps cookies."""

    def __init__(self, address):
        super().__init__(base_url=f"http://{address}", timeout=120)
        functions = self.get("/config").json()["dependencies"]
        shapes = {
            function["id"]: (len(function["inputs"]), len(function["outputs"])) for function in functions
        }
        self.ids = {shape: number for number, shape in reversed(shapes.items())}

    def upload(self, video):
        response = self.post(
            "/gradio_api/upload", files={"files": (video.name, video.read_bytes(), "video/mp4")}
        )
        return response.json()[0]

    def join(self, inputs, outputs, data):
        """The answer of the function of so many inputs and outputs: a refusal, or what it would show."""
        session = uuid.uuid4().hex
        body = {"data": data, "fn_index": self.ids[inputs, outputs], "session_hash": session}
        response = self.post("/gradio_api/queue/join", json=body)
        if response.status_code != 200:
            return response
        with self.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
            for line in events.iter_lines():
                if line.startswith("data:") and "process_completed" in line:
                    return json.loads(line[5:])["output"]

    def add(self, file, caption="a ball stolen"):
        return self.join(3, 3, [file, caption, None])

    def search(self, prompt="", where=""):
        return self.join(4, 2, [prompt, where, 12, None])["data"]


@pytest.fixture
def visitor(address):
    visitor = Visitor(address)
    yield visitor
    visitor.close()


@pytest.fixture
def secret(folder, tmp_path):
    """A video of the machine that is not the page's."""
    path = tmp_path / "secret.mp4"
    path.write_bytes((folder / "videos" / "red zorvex.mp4").read_bytes())
    return path


def test_an_upload_is_added_by_the_token_that_stands_for_it(visitor, gallery, secret):
    token = visitor.upload(secret)
    assert re.fullmatch(r"[\w-]{43}", token)
    told, _, _ = visitor.add({"path": token, "meta": META, "orig_name": "/etc/passwd"})["data"]
    assert "Added as secret.mp4" in told
    assert (
        visitor.get(f"/clip?version={gallery.about().version}&id=secret.mp4").content == secret.read_bytes()
    )
    gallery.remove("secret.mp4")


def files(visitor, address, secret, uploads):
    """Names that a request may give a file: by the machine's names, addresses, others' tokens, in any place."""
    token = visitor.upload(secret)
    other = Visitor(address)
    yield {"path": other.upload(secret), "meta": META}
    other.close()
    names = [
        str(secret),
        f"../../../../../..{secret}",
        f"file://{secret}",
        f"http://{address}/config",
        "",
        "/dev/zero",
    ]
    names += [f"{token}/../{secret}", f"/gradio_api/file={secret}", *map(str, uploads.rglob("secret.mp4"))]
    for name in names:
        yield {"path": name, "meta": META}
    yield {"path": str(secret), "url": str(secret)}
    yield {"path": str(secret), "meta": META, "is_stream": True}
    yield {"path": None, "meta": META}
    yield {"path": [token], "meta": META}
    yield [{"path": token, "meta": META}, {"path": str(secret), "meta": META}]
    yield {"video": {"path": str(secret), "meta": META}}


def test_a_request_can_name_no_file_of_the_machine(visitor, address, folder, gallery, secret):
    before, count = gallery.about(), 0
    for file in files(visitor, address, secret, folder / "uploads"):
        for refused in (visitor.add(file), visitor.add(None, file), visitor.join(4, 2, [file, "", 12, None])):
            assert refused.status_code == 403 and str(secret.parent) not in refused.text, file
            assert "upload" in refused.json()["detail"]
            count += 1
    assert count >= 45 and gallery.about() == before and "zorvex" in visitor.search()[1]


def test_no_route_gives_an_upload_or_its_place_away(visitor, folder, secret):
    token = visitor.upload(secret)
    path = next((folder / "uploads").rglob("secret.mp4"))
    for route in (
        "/gradio_api/file=",
        "/gradio_api/file/",
        "/file=",
        "/gradio_api/stream/",
        "/gradio_api/proxy=",
    ):
        for name in (token, str(path), str(secret), f"file://{secret}"):
            assert visitor.get(route + name).status_code == 403
    assert str(folder) not in token + visitor.get("/config").text + visitor.get("/").text


def test_gradio_checks_files_itself_as_well(gallery, secret):
    from gradio.context import LocalContext
    from gradio.exceptions import InvalidPathError
    from gradio.processing_utils import _check_allowed

    page = server.application(gallery).routes[-1].app.get_blocks()
    mark = LocalContext.blocks.set(page)
    with pytest.raises(InvalidPathError):
        _check_allowed(secret, True)
    LocalContext.blocks.reset(mark)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"x" * (LIMIT + 1), 413),
        (b"[" * 100_000, 400),
        (b'{"data": ' * 50_000, 400),
        (b"\xff\x00", 400),
        (b"", 400),
    ],
    ids=["long", "deep", "deeper", "bytes", "empty"],
)
def test_requests_that_are_no_json_are_refused(visitor, body, status):
    response = visitor.post(
        "/gradio_api/queue/join", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == status and "zorvex" in visitor.search()[1]


def test_all_uploads_together_have_a_limit(visitor, secret, folder, monkeypatch):
    def held():
        return sum(path.stat().st_size for path in (folder / "uploads").rglob("*") if path.is_file())

    def refused(**request):
        response = visitor.post("/gradio_api/upload", **request)
        return response.status_code == 413 and "no room" in response.json()["detail"]

    monkeypatch.setattr(uploads, "LEAST", 0)
    monkeypatch.setattr(uploads, "VOLUME", held() + 100_000)
    assert refused(files={"files": ("a.mp4", b"x" * 200_000, "video/mp4")})
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    chunks = (part for part in [head, *[b"x" * 50_000] * 20])  # without a declared length
    with contextlib.suppress(httpx.TransportError):  # or the server hangs up while more is sent
        assert refused(content=chunks, headers={"content-type": "multipart/form-data; boundary=b"})
    assert held() <= uploads.VOLUME + 50_000
    for path in (folder / "uploads").rglob("*"):
        os.utime(path, (0, 0))
    assert visitor.upload(secret) and held() == secret.stat().st_size  # older ones went


@pytest.mark.parametrize("version", ["-1", "0", "99", str(2**64), "9" * 25])
def test_a_version_that_is_not_there_is_not_found(visitor, version):
    assert visitor.get(f"/clip?version={version}&id=red zorvex.mp4").status_code == 404


FILTERS = ["length(concat(repeat('a', 20000000), caption)) > 0", "regexp_like(caption, '(a*)*b')", "1 = ?"]
FILTERS += [
    "caption = (SELECT path FROM read_csv('/etc/passwd'))",
    "id IN ('a'); DROP TABLE videos",
    "(" * 900,
]
FILTERS += ["struct(" * 22, "NOT " * 900 + "true", f"caption LIKE '{'%a' * 900}'", f"id = '{'x' * 100_000}'"]
FILTERS += [
    " OR ".join(f"caption LIKE '%{number}%'" for number in range(99)),
    "row IN (" + "1," * 5000 + "1)",
]


@pytest.mark.parametrize("where", FILTERS, ids=lambda where: where[:20])
def test_no_filter_but_a_plain_one_is_run(visitor, folder, where):
    told, cards = visitor.search("a ball", where)
    assert 'role="alert"' in told and str(folder.parent) not in told and "caption" in told
    assert cards["__type__"] == "update" and "value" not in cards  # what was found before stays on the page
    assert "zorvex" in visitor.search("a ball", "motion > 0.1 AND caption LIKE '%zorvex%'")[1]


NAMES = ["127.0.0.1", "localhost", "bank.example"]


@pytest.mark.parametrize(
    ("host", "origin", "refusal"),
    [
        ("localhost:7860", None, ""),
        ("LOCALHOST", "http://LOCALHOST", ""),
        ("bank.example:80", "https://bank.example:80", ""),
        ("192.168.1.5:7860", "http://192.168.1.5:7860", ""),  # the address that was asked
        ("evil.example", None, "unknown host"),
        ("localhost.evil.example:7860", None, "unknown host"),
        ("192.168.1.6:7860", None, "unknown host"),
        ("localhost@evil.example", None, "unknown host"),
        ("[::1", None, "unknown host"),
        ("", None, "unknown host"),
        ("localhost:7860", "http://evil.example", "another site"),
        ("localhost:7860", "http://localhost:7861", "another site"),
        ("localhost:7860", "null", "another site"),
    ],
)
def test_hosts_and_origins_must_be_the_pages_own(host, origin, refusal):
    headers = [(b"host", host.encode())] + ([] if origin is None else [(b"origin", origin.encode())])
    scope = {"type": "http", "path": "/config", "headers": headers, "server": ("192.168.1.5", 7860)}
    found = server.Gate(None, NAMES)._refusal(scope)
    assert found.startswith(refusal) and bool(found) == bool(refusal)


@pytest.mark.parametrize("host", ["0.0.0.0", "0.0.0.0,Bank.example", "127.0.0.1"])
def test_a_server_for_other_machines_knows_its_names(gallery, monkeypatch, host):
    def told(_, names):
        raise UserError(" ".join(sorted(names)))

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which a server sets
    monkeypatch.setattr(server, "application", told)
    monkeypatch.setattr(server.socket, "gethostname", lambda: "Machine")
    with pytest.raises(UserError) as names:
        server.serve(gallery, host, port=0)
    expected = {"127.0.0.1", "localhost", "::1"}
    expected |= {"machine"} if host.startswith("0.") else set()
    assert set(str(names.value).split()) == expected | ({"bank.example"} if "," in host else set())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read /home/a b/videos/x.mp4", "cannot read x.mp4"),
        ("the bank '/srv/bank' has no video", "the bank 'bank' has no video"),
        ("s3://bucket/banks/one and file:///etc/passwd", "one and passwd"),
        ("found: 3 / 4 and/or video/mp4", "found: 3 / 4 and/or video/mp4"),
    ],
)
def test_errors_show_no_folders(text, shown):
    assert views.without_folders(text) == shown


def test_notices_and_the_heading_show_no_folders(gallery, folder):
    assert str(folder) not in views.notice(UserError("x", found=folder / "videos" / "a.mp4"))
    assert str(folder) not in views.heading(gallery.about(), 1, False)
