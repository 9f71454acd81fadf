"""The page served: what it refuses, and used in a headless Chromium as a person would."""

import http.client
import shutil
import socket
import sys
from urllib.parse import quote, urlsplit

import pytest

from ditmem_jax.bank.search import Bank
from ditmem_jax.errors import UserError
from ditmem_jax.gallery import server
from tests.gallery.small import COUNT, NASTY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
WAIT = 120_000  # milliseconds: the machine may be busy


def ask(address, path, method="GET", **headers):
    """Status, headers and body of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request(method, path, headers={"Host": address} | headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


@pytest.mark.slow
def test_a_clip_is_had_by_its_id_in_parts_too(address, gallery, folder):
    original = (folder / "videos" / "red zorvex.mp4").read_bytes()
    path = f"/clip?version={gallery.about().version}&id={quote('red zorvex.mp4')}"
    status, headers, body = ask(address, path)
    assert (status, body, headers["content-type"]) == (200, original, "video/mp4")
    assert headers["content-security-policy"].startswith("default-src 'self'")
    status, _, body = ask(address, path, Range="bytes=10-19")
    assert (status, body) == (206, original[10:20])


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/gradio_api/file={}",
            "/gradio_api/file/{}",
            "/file={}",
            "/gradio_api/proxy={}",
            "/{}",
            "/static/{}",
        ),
        *("/assets/{}", "/svelte/{}", "/clip?version=1&id={}", "/gradio_api/stream/{}", "/clip/{}"),
    ],
)
def test_no_path_leads_to_another_file(address, folder, path):
    secret = folder / "secret.txt"
    secret.write_text("root: secret")
    targets = [
        "/etc/passwd",
        "../../../../../../etc/passwd",
        "pyproject.toml",
        str(secret),
        "file:///etc/passwd",
    ]
    targets += [str(folder / "captions.csv"), "../" * 12 + str(secret)[1:], f"http://{address}/config"]
    for target in targets:
        for written in (target, quote(target), quote(target, safe=""), target.replace("..", "%2e%2e")):
            status, _, body = ask(address, path.format(written))
            assert status in (403, 404, 422), path.format(written)
            assert b"root:" not in body and b"zorvex" not in body and b"ditmem" not in body


@pytest.mark.parametrize(
    "path",
    [
        "/docs",
        "/openapi.json",
        "/gradio_api/info",
        "/gradio_api/runs",
        "/monitoring",
        "/gradio_api/vibe-code",
    ],
)
def test_what_the_page_does_not_need_is_closed(address, path):
    assert ask(address, path)[0] == 403


def test_only_the_page_itself_may_ask(address):
    port = address.rpartition(":")[2]
    assert ask(address, "/config")[0] == 200
    assert ask(address, "/config", Host=f"localhost:{port}")[0] == 200
    assert ask(address, "/config", Host=f"elsewhere.example:{port}")[0] == 403
    for origin in ("http://elsewhere.example", "null", f"http://127.0.0.1:{int(port) + 1}"):
        assert ask(address, "/gradio_api/queue/join", "POST", Origin=origin)[0] == 403
    assert (
        ask(address, "/gradio_api/queue/join", "POST", Origin=f"http://{address}")[0] == 400
    )  # nothing was said


def test_a_row_that_points_out_of_the_folder_is_not_played(address, gallery, folder):
    (folder / "secret.mp4").write_bytes(b"secret")
    bank = Bank.open(gallery.about().uri)
    row = bank.table.rows("id = 'red zorvex.mp4'").drop_columns(["records", "row", "checksum"])
    for number, source in enumerate(("../secret.mp4", str(folder / "secret.mp4"))):
        row = row.set_column(0, "id", [[f"bad {number}"]])
        bank.add(row.set_column(row.schema.get_field_index("source"), "source", [[source]]))
        status, _, body = ask(address, f"/clip?version={bank.version}&id=bad%20{number}")
        assert status == 404 and b"outside" in body and b"secret\n" not in body
    bank.remove(["bad 0", "bad 1"])


def test_what_keeps_the_server_from_starting_is_told(gallery, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--port"):
        server.serve(gallery, port=taken.getsockname()[1])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"ditmem_jax\[page\]"):
        server.application(gallery)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH (Debian's package is chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address, request):
    """The page in a tab of its own, which must ask nobody else for anything and report no error."""
    width = getattr(request, "param", 1280)
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.set_default_timeout(WAIT)
    asked, errors = [], []
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.goto(f"http://{address}/")
    page.wait_for_selector("article.clip")
    yield page
    page.close()
    assert {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))} == {address}
    assert errors == []


def ids(page):
    return page.eval_on_selector_all(
        ".cards:not(.alone) article", "found => found.map(one => one.dataset.id)"
    )


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()


def search(page, prompt="", where=""):
    """Searches and waits for the answer."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Filter").fill(where)
    with page.expect_response(lambda response: "queue/data" in response.url):
        page.get_by_role("button", name="Search", exact=True).click()


def test_search_filter_and_play(page):
    search(page, "a red ball on zorvex")
    page.wait_for_selector(".score")
    assert ids(page)[0] == "red zorvex.mp4"
    scores = [float(text) for text in page.locator(".score b").all_inner_texts()]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[1]
    page.wait_for_function(
        "[...document.querySelectorAll('video')].every(v => v.readyState >= 2 && v.duration > 1)"
    )
    page.wait_for_function("document.querySelector('video').currentTime > 0")  # it plays by itself

    search(page, "a red ball", "motion > 0.5")
    page.wait_for_function("document.querySelectorAll('article.clip').length == 2")
    assert ids(page) == ["red quindara.mp4", "blue quindara.mp4"]
    search(page, "a red ball", "motoin > 0.5")
    page.wait_for_selector(".notice.error")
    told = page.locator(".notice.error").inner_text()
    assert "motoin" in told and "motion" in told and "caption" in told and len(ids(page)) == 2  # as before
    search(page, "a red ball", "motion < 0")
    page.get_by_text("No video passes this filter.").wait_for()


def test_a_point_of_the_map_plays_its_clip(page):
    open_tab(page, "Map")
    page.wait_for_selector("svg.map circle")
    points = page.locator("svg.map circle")
    assert points.count() == COUNT
    box = points.nth(2).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2 + 6, box["y"] + box["height"] / 2)  # near is enough
    page.wait_for_selector(".cards.alone video")
    assert page.locator(".cards.alone article").get_attribute("data-id") == points.nth(2).get_attribute(
        "data-key"
    )
    page.wait_for_function("document.querySelector('.cards.alone video').readyState >= 2")
    page.get_by_role("combobox", name="Coloured by").click()
    page.get_by_role("option", name="planet").click()
    page.locator(".legend").get_by_text("quindara", exact=True).wait_for()


@pytest.mark.slow
def test_add_remove_and_go_back_to_an_old_version(page, gallery, folder):
    before = gallery.about()
    open_tab(page, "Add")
    page.locator("input[type=file]").set_input_files(folder / "videos" / "blue zorvex.mp4")
    page.get_by_label("Caption").fill("ein blauer Ball <b>fällt</b> 🪐")
    page.get_by_text("blue zorvex", exact=True).wait_for()  # it is uploaded
    page.get_by_role("button", name="Add to the bank").click()
    page.get_by_text("Added as blue zorvex.mp4#2.").wait_for()
    page.wait_for_function("document.querySelector('.cards.alone video')?.readyState >= 2")
    page.get_by_text(f"{before.rows + 1} videos").first.wait_for()

    open_tab(page, "Search")
    search(page, "ein blauer Ball fällt")
    page.wait_for_selector(".score")
    first = page.locator("article.clip").first
    first.get_by_text("ein blauer Ball <b>fällt</b> 🪐", exact=True).wait_for()
    assert first.get_by_role("button", name="Remove").count() == 0  # not before one is asked
    first.get_by_text("Remove …").click()
    first.get_by_role("button", name="Remove").click()
    page.get_by_text("Removed blue zorvex.mp4#2.").wait_for()
    assert "blue zorvex.mp4#2" not in ids(page) and gallery.about().rows == before.rows

    open_tab(page, "Versions")
    page.wait_for_selector(".versions tbody tr:nth-child(3)")
    rows = page.locator(".versions tbody tr")
    assert ["1 removed", "1 added"] == [rows.nth(i).locator("td").nth(2).inner_text() for i in (0, 1)]
    rows.nth(1).get_by_role("button", name="Open").click()
    page.get_by_text("read-only").wait_for()
    open_tab(page, "Search")
    page.wait_for_function(
        "[...document.querySelectorAll('.cards:not(.alone) article')].some(a => a.dataset.id == 'blue zorvex.mp4#2')"
    )
    page.wait_for_function(
        "document.querySelector('.cards:not(.alone) video').readyState >= 2"
    )  # plays though it is removed
    assert page.get_by_text("Remove …").count() == 0
    page.get_by_role("button", name="Back to the newest").click()
    page.get_by_text("Remove …").first.wait_for()
    assert "blue zorvex.mp4#2" not in ids(page)


def test_a_video_that_another_took_out_meanwhile(page, gallery):
    bank = Bank.open(gallery.about().uri)
    row = bank.table.rows("id = 'red quindara.mp4'")
    bank.add(row.set_column(0, "id", [["short-lived"]]))
    search(page, where="id = 'short-lived'")
    page.wait_for_function("document.querySelectorAll('article.clip').length == 1")
    bank.remove(["short-lived"])
    page.get_by_text("Remove …").click()
    page.get_by_role("button", name="Remove").click()
    page.wait_for_selector(".notice.error")
    assert "short-lived" in page.locator(".notice.error").inner_text()


def test_captions_are_text_in_the_browser(page, gallery):
    bank = Bank.open(gallery.about().uri)
    row = bank.table.rows("id = 'red quindara.mp4'")
    for number, caption in enumerate(NASTY):
        at = row.schema.get_field_index("caption")
        bank.add(
            row.set_column(0, "id", [[f"nasty {number} {caption[:60]}"]]).set_column(
                at, "caption", [[caption]]
            )
        )
    page.on("dialog", lambda dialog: pytest.fail("a caption was run"))
    search(page, "ball", "id LIKE 'nasty%'")
    page.wait_for_function(f"document.querySelectorAll('article.clip').length == {len(NASTY)}")
    shown = page.eval_on_selector_all("article.clip .caption", "all => all.map(one => one.textContent)")
    for caption in NASTY[:4]:
        assert any(" ".join(caption.split()) == " ".join(text.split()) for text in shown)
    assert page.locator("article script, article img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("article.clip", has_text="{{value}}").get_by_text("Remove …").click()
    page.get_by_role("button", name="Remove").click()
    page.get_by_text("Removed nasty 1").wait_for()
    bank.remove(where="id LIKE 'nasty%'")


@pytest.mark.slow
@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_nothing_is_wider_than_the_window(page):
    for name, content in (
        ("Search", "article"),
        ("Map", "svg.map"),
        ("Add", "textarea"),
        ("Versions", "table"),
    ):
        open_tab(page, name)
        page.locator(f"{content}:visible").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
