"""A page in one file: nothing is loaded from elsewhere, in light or dark, from a phone's width up."""

from collections.abc import Sequence
from pathlib import Path

from ditmem_jax.report.html import Html, escape, tag

_STYLE = Path(__file__).with_name("page.css")
_SCRIPT = Path(__file__).with_name("page.js")


def page(title: str, *parts: object, name: str = "") -> str:
    """The whole document.

    Args:
        title: the first thing one reads: what was found.
        name: stands small above the title, and names the tab.
    """
    style, script = (Html(path.read_text(encoding="utf-8")) for path in (_STYLE, _SCRIPT))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", name or title),
        tag("style", style),
    )
    kicker = tag("p", name, class_="kicker") if name else ""
    main = tag("main", tag("header", kicker, tag("h1", title)), *parts)
    return f"<!doctype html>\n{tag('html', head, tag('body', main, tag('script', script)), lang='en')}\n"


def section(heading: str, *parts: object) -> Html:
    return tag("section", tag("h2", heading), *parts)


def paragraph(*content: object, lead: bool = False) -> Html:
    return tag("p", *content, class_="lead" if lead else None)


def figure(content: object, caption: object = "") -> Html:
    """Anything to look at, with what it shows written below."""
    return tag("figure", content, tag("figcaption", caption) if caption else "")


def side_by_side(*parts: object) -> Html:
    """Parts in a row, which breaks where the page is narrow."""
    return tag("div", *parts, class_="side-by-side")


def legend(*keys: tuple[str, str]) -> Html:
    """The legend: pairs of a tone (or tone and mark, "grey dashed") and a name."""
    items = [tag("span", tag("i", class_=f"key tone-{tone}"), name) for tone, name in keys]
    return tag("div", *items, class_="legend")


def table(
    columns: Sequence[object],
    rows: Sequence[Sequence[object]],
    strong: Sequence[int] = (),
    caption: object = "",
) -> Html:
    """A table whose first column is text and whose others are numbers; `strong` lists rows that matter most."""
    head = tag("thead", tag("tr", *(tag("th", column, scope="col") for column in columns)))
    lines = []
    for number, (first, *rest) in enumerate(rows):
        cells = [tag("th", first, scope="row"), *(tag("td", value) for value in rest)]
        lines.append(tag("tr", *cells, class_="strong" if number in strong else None))
    written = tag("table", tag("caption", caption) if caption else "", head, tag("tbody", *lines))
    return tag("div", written, class_="wide")


def details(summary: str, *parts: object) -> Html:
    """Parts that show once one asks for them."""
    return tag("details", tag("summary", summary), *parts)


def code(text: str) -> Html:
    """Preformatted text, such as commands or a configuration."""
    return tag("pre", escape(text))
