"""The widgets of the page and which action answers each."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import gradio as gr

from ditmem_jax.gallery.actions import Actions
from ditmem_jax.gallery.gallery import Gallery
from ditmem_jax.gallery.views import notice

STYLE = Path(__file__).with_name("page.css")
_SCRIPT = Path(__file__).with_name("page.js")
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
_QUIET = dict(api_visibility="private", show_progress="hidden")
_html = partial(gr.HTML, apply_default_css=False, padding=False)


def theme() -> gr.themes.Base:
    """Fonts of the system, so that none is loaded."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="md",
        font=_FONTS,
        font_mono=["ui-monospace", "monospace"],
    )


def _choices(columns: Sequence[str]) -> list[tuple[str, str]]:
    return [("nothing", ""), *((name, name) for name in columns)]


def blocks(gallery: Gallery) -> gr.Blocks:
    """The page of a bank."""
    actions = Actions(gallery)
    script = _SCRIPT.read_text(encoding="utf-8")
    columns = list(actions.columns(None))

    title = f"{Path(gallery.about().uri).name} · memory bank"
    hourly = (600, 3600)  # seconds: how often uploads are looked at, and how long they are kept
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=hourly) as page:
        version = gr.State(None)
        heading = _html(js_on_load=script)
        with gr.Tabs():
            with gr.Tab("Search"):
                with gr.Row(elem_classes="ask"):
                    prompt = gr.Textbox(
                        label="Prompt", placeholder="what the clips should show", scale=5, min_width=240
                    )
                    where = gr.Textbox(
                        label="Filter", placeholder=f"{columns[0]} > 0.5", scale=3, min_width=180
                    )
                    k = gr.Slider(1, 60, 12, step=1, label="Clips", scale=2, min_width=140, buttons=[])
                    go = gr.Button("Search", variant="primary", scale=1, min_width=100)
                message = _html()
                results = _html(js_on_load=script)
            with gr.Tab("Map") as map_tab:
                with gr.Column(elem_classes="narrow"):
                    column = gr.Dropdown(_choices(columns), value=columns[0], label="Coloured by")
                with gr.Row():
                    with gr.Column(scale=7, min_width=320):
                        chart = _html(js_on_load=script)
                    with gr.Column(scale=3, min_width=260):
                        point = _html('<div class="placeholder">Click a point to play its clip.</div>')
            with gr.Tab("Add"):
                if gallery.can_add:
                    _html(notice(gallery.can_add))
                with gr.Row(visible=not gallery.can_add):
                    video = gr.File(label="Video", file_types=["video"], height=180, scale=1, min_width=260)
                    with gr.Column(scale=1, min_width=260):
                        caption = gr.Textbox(label="Caption", placeholder="what the video shows", lines=4)
                        add = gr.Button("Add to the bank", variant="primary")
                added = _html()
            with gr.Tab("Versions") as versions_tab:
                versions = _html(js_on_load=script)

        asked = [prompt, where, k, version]
        head, search = dict(fn=actions.heading, inputs=version, outputs=heading), [message, results]
        page.load(**head, **_QUIET)

        def kept(told: str, cards: str | None) -> tuple:
            return told, gr.skip() if cards is None else cards

        def found(*asked: object) -> tuple:
            return kept(*actions.search(*asked))

        asking = [page.load, go.click, prompt.submit, where.submit, k.release]
        gr.on(asking, found, asked, search, concurrency_limit=4, **_QUIET)

        def changed(event: gr.EventData, *asked: object) -> tuple:
            return kept(*actions.remove(str(event.key), *asked))

        results.select(changed, asked, search, **_QUIET).then(**head, **_QUIET)

        def known(version: int | None) -> gr.Dropdown:
            return gr.Dropdown(_choices(actions.columns(version)))

        map_tab.select(known, version, column, **_QUIET)
        gr.on([map_tab.select, column.input], actions.map, [column, version], chart, **_QUIET)

        def shown(event: gr.EventData, version: int | None) -> str:
            return actions.point(str(event.key), version)

        chart.select(shown, version, point, **_QUIET)

        def added_now(video: str | None, caption: str, version: int | None) -> tuple:
            told, worked = actions.add(video, caption, version)
            if worked:
                Path(video or "").unlink(missing_ok=True)  # the bank has its own; uploads have little room
            return (told, None, "") if worked else (told, gr.skip(), gr.skip())

        (
            add.click(lambda: gr.Button("Encoding …", interactive=False), None, add, **_QUIET)
            .then(added_now, [video, caption, version], [added, video, caption], **_QUIET)
            .then(lambda: gr.Button("Add to the bank", interactive=True), None, add, **_QUIET)
            .then(**head, **_QUIET)
        )

        def opened(event: gr.EventData) -> int | None:
            return int(event.key) if event.key else None

        versions_tab.select(actions.versions, version, versions, **_QUIET)
        for place in (heading, versions):
            after = place.select(opened, None, version, **_QUIET)
            after.then(**head, **_QUIET).then(actions.versions, version, versions, **_QUIET).then(
                found, asked, search, **_QUIET
            )
            after.then(actions.map, [column, version], chart, **_QUIET)
    return page
