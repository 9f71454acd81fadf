"""Pages: escaping, charts by hand, films without loss, and no page that needs anything but itself."""

import html.parser
import io
import re

import av
import numpy as np
import pytest

from ditmem_jax import report
from ditmem_jax.report.films import png
from ditmem_jax.report.html import escape


def test_text_is_escaped_once():
    inner = report.tag("b", "1 < 2 & 3")
    assert inner == "<b>1 &lt; 2 &amp; 3</b>"
    assert report.tag("p", inner, class_="a", data_x='"', hidden=True, id=None) == (
        '<p class="a" data-x="&quot;" hidden><b>1 &lt; 2 &amp; 3</b></p>'
    )
    assert escape(escape("&")) == "&amp;"
    assert report.tag("br") == "<br>"


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (report.Axis(low=0, high=1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (report.Axis(low=-3, high=12), [0, 5, 10]),
        (report.Axis(low=1.5, high=16, log=True), [2, 5, 10]),
        (report.Axis(low=0.02, high=0.1, log=True), [0.02, 0.05, 0.1]),
    ],
)
def test_ticks(axis, ticks):
    np.testing.assert_allclose(axis.ticks(), ticks, atol=1e-12)


def test_axis_fits_its_numbers_and_writes_them():
    axis = report.Axis(log=True).fitted([1.0, 100.0, float("nan"), -1.0])
    assert axis.low < 1 and axis.high > 100
    assert axis.place(10.0) == pytest.approx(0.5)
    assert report.Axis(low=0).fitted([]).high > 0
    assert report.Axis(percent=True).write(0.07) == "7 %"
    assert report.Axis().write(-1e-17) == "0"


def test_plot_leaves_out_what_is_not_finite_or_beyond_the_axes():
    dots = report.Series(
        [1, 2, float("nan"), 4, 5], [1, float("inf"), 3, 0, 1.1], mark="dots", notes=list("abcde")
    )
    line = report.Series([0, 1], [0.5, 1.0], "pink", "dashed")
    axes = report.Axis("x", 0, 10), report.Axis("y", 0, 1)
    chart = report.plot([dots, line], *axes, title="a < b", size=(120, 110), diagonal=True)
    assert re.findall('<circle cx="([^"]*)" cy="([^"]*)"', chart) == [("52.2", "10.0"), ("70.8", "72.0")]
    assert 'points="46.0,41.0 52.2,10.0" class="line tone-pink dashed"' in chart
    assert "<title>a</title>" in chart and "<title>b</title>" not in chart
    assert "<h4>a &lt; b</h4>" in chart and 'class="diagonal"' in chart and 'class="now"' not in chart


def test_intervals_skip_what_is_unknown():
    nan = float("nan")
    rows = [
        ("one", [report.Interval(0.5, 0.25, 1.0), report.Interval(nan, nan, nan)]),
        ("none", [report.Interval(nan, nan, nan)]),
    ]
    chart = report.intervals(rows, report.Axis("ratio", 0, 2), marks=(1.0,))
    assert chart.count("<circle") == 1 and ">one</text>" in chart and ">none</text>" in chart
    assert 'cx="200.5"' in chart  # a quarter of the way from 112 to 466


def test_an_animation_plays_clips_side_by_side_without_loss():
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 256, (3, 4, 6, 3), np.uint8) for _ in range(2)]
    with av.open(io.BytesIO(report.animation(clips, fps=8)), format="apng") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    np.testing.assert_array_equal([frame[:, :6] for frame in frames], clips[0])
    np.testing.assert_array_equal([frame[:, 8:] for frame in frames], clips[1])
    assert all((frame[:, 6:8] == 255).all() for frame in frames)


def test_an_animation_leaves_out_pixels_of_large_clips():
    clip = np.arange(5 * 7, dtype=np.uint8).reshape(1, 5, 7, 1).repeat(3, axis=3)
    with av.open(io.BytesIO(report.animation([clip], fps=8, width=3)), format="apng") as container:
        (frame,) = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
    np.testing.assert_array_equal(frame, clip[0, ::3, ::3])


def test_png_is_lossless():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    pixels[2:5] = pixels[1]
    with av.open(io.BytesIO(png(pixels)), format="png_pipe") as container:
        decoded = next(container.decode(video=0)).to_ndarray(format="rgb24")
    np.testing.assert_array_equal(decoded, pixels)


def small_page() -> str:
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    row = report.FilmRow("a & b", [report.Film(frames, "note", 'says "x"'), report.Film(frames[:2])], "aside")
    chart = report.plot([report.Series([0, 1], [0, 1])], report.Axis("x"), report.Axis("y"), cursor=True)
    return report.page(
        "What was found",
        report.section("Films", report.film_grid([("left", "blue"), ("right", "pink")], [row], fps=8)),
        report.section("Chart", report.figure(report.side_by_side(chart), "caption")),
        report.legend(("blue", "left")),
        report.table(["name", "value"], [("a", 1), ("b", 2)], strong=[1], caption="numbers"),
        report.details("more", report.code("x < y"), report.paragraph("text", lead=True)),
        name="tab",
    )


class Balance(html.parser.HTMLParser):
    """Fails for elements that are not closed in the order in which they were opened."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, name, attributes):
        self.seen.add(name)
        if name not in ("meta", "input", "br"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name


def test_page_is_whole_and_needs_nothing_else():
    text = small_page()
    parser = Balance()
    parser.feed(text)
    assert not parser.open
    assert {"canvas", "svg", "table", "details", "style", "script"} <= parser.seen
    assert text.startswith("<!doctype html>") and "<title>tab</title>" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"https?:|<link|@import|url\(", text)
    assert 'data-fps="8"' in text and 'data-frames="3"' in text and 'data-count="2"' in text
    assert '<tr class="strong"><th scope="row">b</th><td>2</td></tr>' in text
    assert "x &lt; y" in text and "a &amp; b" in text
