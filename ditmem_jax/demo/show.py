"""The demo's output: tables for the terminal, and the page."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ditmem_jax import report
from ditmem_jax.demo.score import AIM, Row, evidence, percent
from ditmem_jax.demo.trials import ALL, SAMPLED, Findings, Trial
from ditmem_jax.report import Html, tag
from ditmem_jax.worlds.laws import RANGES
from ditmem_jax.worlds.render import CAMERA
from ditmem_jax.worlds.track import track

TONES = {"real": "grey", "without": "orange", "right": "blue", "wrong": "pink", "stated": "green"}
SHOWN = ("real", "without", "right", "wrong")
PLANETS_SHOWN = 6
NAMES = {
    "real": "real",
    "without": "no memory",
    "right": "right memory",
    "wrong": "wrong memory",
    "stated": "law stated",
    "copy": "nearest copied",
}


# --- the terminal -----------------------------------------------------------------------------------------------


def print_tables(console: Console, rows: Sequence[Row]) -> None:
    """Print errors, with and without a model, and how well constants follow the true ones, in at most 80 columns."""
    ways = ["none", "right", "wrong", "stated"]  # as SAMPLED
    errors = _table("law error, |ln(measured/true)|, by memory", *ways, "right / none", "clips")
    for row in rows:
        errors.add_row(
            row.name, *(_error(row, way) for way in SAMPLED), _interval(row, row.ratio["right"]), _clips(row)
        )
    bare = _table("law error without a model", "guess", "copy", "right / guess")
    for row in rows:
        bare.add_row(
            row.name, *(_error(row, way) for way in ("guess", "copy")), _interval(row, row.over_guess)
        )
    follow = _table("correlation of measured with true, by memory", *ways, "wrong, with its own")
    for row in rows:
        follow.add_row(row.name, *(_number(row.correlation[way]) for way in (*SAMPLED, "other")))
    console.print("", errors, "", bare, "", follow, "")


def _table(title: str, *headings: str) -> Table:
    style = dict(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    found = Table(title=title, title_justify="left", **style)
    found.add_column(no_wrap=True)
    for heading in headings:
        found.add_column(heading, justify="right", no_wrap=True)
    return found


def _number(value: float) -> str:
    return f"{round(value, 2) + 0:.2f}" if np.isfinite(value) else "-"  # + 0 takes the sign off a zero


def _error(row: Row, way: str) -> str:
    mean, spread = row.error[way]
    return f"{mean:.2f}±{spread:.2f}" if np.isfinite(mean) else "-"


def _interval(row: Row, ratio: tuple[float, float, float]) -> str:
    value, low, high = ratio
    return f"{value:.2f} ({low:.2f}-{high:.2f})" if row.clips else "-"


def _clips(row: Row) -> str:
    return f"{row.clips}/{row.of}"


# --- the page ---------------------------------------------------------------------------------------------------


def make_page(
    result: dict[str, Any],
    rows: Sequence[Row],
    findings: Findings,
    trials: Sequence[Trial],
    clips: dict[str, np.ndarray],
    run: Path,
) -> str:
    """The whole report as one file of HTML.

    Args:
        result: what `results.json` holds.
        run: folder of the training run, for its curves.
    """
    planets, k = len({trial.number for trial in trials}), result["config"]["data"]["references"]
    lead = report.paragraph(
        "A video diffusion transformer learned to film made-up planets whose names it was never told, and was frozen. "
        "A small encoder learned, on other planets, to turn a few clips into a memory that all its layers can look "
        f"into. Here both meet {planets} planets that neither has seen: for the name in the prompt the bank finds "
        f"{k} of the planet's clips, and the law is measured in the clip that comes out.",
        lead=True,
    )
    return report.page(
        result["finding"],
        lead,
        report.paragraph(evidence(rows[0], planets)),
        report.section("Look", *_films(findings, trials, clips)),
        report.section("Measured against true", *_scatters(findings)),
        report.section("Every law", *_tables(rows)),
        report.section("How it learned", *_curves(run)),
        report.section("How to read this", *_reading(result, rows)),
        report.section("How it was made", *_making(result)),
        name="Memory for a frozen video transformer · demo",
    )


def _films(findings: Findings, trials: Sequence[Trial], clips: dict[str, np.ndarray]) -> list[Html]:
    """The first fall of planets from the lightest gravity to the heaviest, evenly spaced: none was picked by hand."""
    falls = {}
    for index, trial in enumerate(trials):
        if trial.phenomenon == "fall":
            falls.setdefault(trial.number, index)
    ordered = sorted(falls.values(), key=lambda index: trials[index].world.gravity)
    chosen = np.linspace(0, len(ordered) - 1, min(PLANETS_SHOWN, len(ordered))).round().astype(int)
    grid = report.film_grid(
        [(NAMES[way], TONES[way]) for way in SHOWN],
        [_film_row(ordered[place], findings, trials, clips) for place in chosen],
        fps=CAMERA.fps,
        aside="height of the ball, m",
    )
    caption = (
        "One prompt and one starting noise per row. Left the planet itself, simulated; then what the frozen model "
        "makes of the same prompt. Below each clip the gravity measured in it, beside them the tracked heights in the "
        "columns' colours, the real one dashed. Rows are the first fall of "
        "planets spread evenly from the weakest gravity to the strongest."
    )
    return [report.figure(grid, caption)]


def _film_row(
    index: int, findings: Findings, trials: Sequence[Trial], clips: dict[str, np.ndarray]
) -> report.FilmRow:
    trial = trials[index]
    place = np.flatnonzero((findings.trial == index) & (findings.constant == "gravity"))[0]
    label = tag(
        "div",
        tag("b", trial.world.name.capitalize()),
        f"gravity {trial.world.gravity:.1f} m/s²",
        tag("br"),
        tag("small", f"wrong: {trial.other.name.capitalize()}, {trial.other.gravity:.1f}"),
    )
    films, lines = [], []
    for way in SHOWN:
        frames = trial.clip.video if way == "real" else clips[way][index]
        value = findings.measured[way][place]
        note = Html(f"<b>{value:.1f}</b> m/s²") if np.isfinite(value) else "not measurable"
        films.append(report.Film(frames, note, f"{trial.prompt}, {NAMES[way]}"))
        found = track(frames.astype(np.float32), "fall", CAMERA)
        height = np.where(found.seen[:, 0] & np.isfinite(value), found.position[:, 0, 1], np.nan)
        mark = "dashed" if way == "real" else "line"
        lines.append(report.Series(list(CAMERA.times), height.tolist(), TONES[way], mark))
    axes = report.Axis(low=0, high=CAMERA.times[-1]), report.Axis(low=0, high=3)
    chart = report.plot(lines, *axes, size=(230, 140), cursor=True)
    return report.FilmRow(label, films, chart)


def _scatters(findings: Findings) -> list[Html]:
    """Gravity measured in falls over gravity of a planet, on equal logarithmic axes."""
    chosen = (findings.constant == "gravity") & (findings.phenomenon == "fall")
    span = RANGES["gravity"]
    planet, memory = "gravity of the planet, m/s²", "gravity of the memory's planet, m/s²"
    panels = [("", way, findings.true, planet) for way in ("without", "right", "wrong")]
    panels.append((", own planet", "wrong", findings.other, memory))
    plots = []
    for more, way, truth, label in panels:
        x, y = truth[chosen], findings.measured[way][chosen]
        notes = [f"true {a:.2f}, measured {b:.2f} m/s²" for a, b in zip(x, y, strict=True)]
        dots = report.Series(x.tolist(), y.tolist(), TONES[way], "dots", notes)
        axes = (
            report.Axis(label, span.low / 1.3, span.high * 1.3, log=True),
            report.Axis("measured, m/s²", span.low / 1.8, span.high * 1.8, log=True),
        )
        plots.append(report.plot([dots], *axes, title=NAMES[way] + more, size=(250, 235), diagonal=True))
    caption = (
        "Each dot is a generated fall. On the dashed line the clip has exactly the planet's gravity; a cloud without a "
        "slope knows nothing of it. Last: the clips with another planet's memory once more, over the gravity of the "
        "planet that the memory is from. If they lie on the line there, the memory alone decides."
    )
    return [report.figure(report.side_by_side(*plots), caption)]


def _tables(rows: Sequence[Row]) -> list[Html]:
    ratios = [
        (row.name, [report.Interval(*row.ratio[way], tone=TONES[way]) for way in ("right", "wrong")])
        for row in rows
    ]
    chart = report.intervals(
        ratios, report.Axis("law error over that without memory", low=0, percent=True), marks=(AIM, 1.0)
    )
    legend = report.legend(*((TONES[way], NAMES[way]) for way in ("right", "wrong")))
    caption = (
        f"Law error with memory as a share of that without, and 95 % intervals. Dashed: 100 %, nothing gained; "
        f"{AIM:.0%}".replace("%", " %")
        + ", the aim."
    )
    errors = report.table(
        [
            "law error",
            *(NAMES[way] for way in SAMPLED),
            "guess",
            "copy",
            "right / none",
            "wrong / none",
            "right / guess",
        ],
        [
            (
                row.name,
                *(_error(row, way) for way in SAMPLED),
                _error(row, "guess"),
                _error(row, "copy"),
                *(
                    _interval(row, ratio)
                    for ratio in (row.ratio["right"], row.ratio["wrong"], row.over_guess)
                ),
            )
            for row in rows
        ],
        strong=(0, len(rows) - 1),
        caption="Law error: mean of |ln(measured / true)| ± its standard error",
    )
    follow = report.table(
        ["correlation", *(NAMES[way] for way in SAMPLED), "wrong, with its own planet"],
        [(row.name, *(_number(row.correlation[way]) for way in (*SAMPLED, "other"))) for row in rows],
        strong=(0, len(rows) - 1),
        caption="Correlation of measured and true constants (logarithms)",
    )
    counts = report.table(
        ["clips", *(NAMES[way] for way in ALL), "compared", "of"],
        [(row.name, *(row.measured[way] for way in ALL), row.clips, row.of) for row in rows],
        caption="How many clips tell the constant; compared are those that tell it in every version",
    )
    return [report.figure(tag("div", chart, legend), caption), errors, follow, counts]


def _curves(run: Path) -> list[Html]:
    """Gain and loss over the steps of training."""
    training, validation = (_columns(run / name) for name in ("metrics.csv", "validation.csv"))
    gains = [_smooth(training["step"], training["gain"])]
    for column, tone in (("gain", "blue"), ("gain_wrong", "pink")):
        if column in validation:
            gains.append(report.Series(validation["step"], validation[column], tone))
    best = max(value for one in gains for value in one.y)
    ends = (-best, 1.1 * best) if best > 0 else (None, None)  # cuts off how an untrained memory harms
    loss = [_smooth(training["step"], training["loss"])]
    legend = report.legend(
        ("grey", "planets in training"),
        ("blue", "unseen planets, right memory"),
        ("pink", "unseen planets, wrong memory"),
    )
    step = report.Axis("step", low=0)
    caption = (
        "Gain: 1 - mean error with memory / mean error without, of denoising, at each noise level, and the mean over "
        "levels. It stays small: most of the error is noise that nobody can predict. The wrong memory is another "
        "planet's, of the same phenomenon. Training draws clips and noise levels anew at each step and is "
        "shown smoothed; unseen planets keep theirs."
    )
    plots = report.side_by_side(
        report.plot(
            gains,
            step,
            report.Axis("gain", *ends, percent=True),
            title="gain from the memory",
            size=(420, 250),
        ),
        report.plot(loss, step, report.Axis("squared error"), title="loss", size=(420, 250)),
    )
    return [report.figure(tag("div", plots, legend), caption)]


def _smooth(steps: list[float], values: list[float]) -> report.Series:
    """Means over a twentieth of the run."""
    width = max(1, len(values) // 20)
    window = np.full(width, 1 / width)
    return report.Series(
        *(np.convolve(column, window, "valid").tolist() for column in (steps, values)), tone="grey"
    )


def _columns(path: Path) -> dict[str, list[float]]:
    """The columns of a table of numbers; none if there is no such file."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def _reading(result: dict[str, Any], rows: Sequence[Row]) -> list[Html]:
    first = rows[0]
    items = [
        (
            "Law error",
            "is |ln(measured / true)| of a constant: 0.1 is about 10 % off, 0.7 a factor of two.",
        ),
        (
            "Guess and copy",
            "need no model. Always naming the middle of a constant's range would err by "
            f"{_number(first.guess)} on average. Showing the nearest reference itself, whatever the prompt asks for "
            f"beside its planet, errs by {_number(first.error['copy'][0])}: what measuring and the choice of the "
            "reference cost.",
        ),
        (
            "Four versions",
            "of each clip start from the same noise. Those with no, right and wrong memory share the prompt, which "
            "names the planet and states no law. The fourth has the constants in the prompt and no memory: about "
            "as far as this frozen model can follow a law at all.",
        ),
        (
            "Wrong memory",
            "is what the bank finds for the same prompt with another planet's name: clips of the same kind, wrong law.",
        ),
        (
            "Measuring",
            "tracks the body in the pixels and fits the law's motion. Where a clip does not show its law, it is left "
            "out, in all versions alike, so each row compares the same clips. How many are lost is in the last table.",
        ),
        (
            "Spreads",
            "come from drawing planets anew, not clips, since clips of one planet are alike; intervals hold 95 %.",
        ),
        (
            "The bank",
            "holds clips of all planets, those in training among them. "
            + references(result)
            + " "
            + relevance(result)
            + " "
            + (
                f"{result['leaked']} clips of unseen planets served as memory in training."
                if result["leaked"]
                else "None of an unseen planet was memory in training."
            ),
        ),
    ]
    return [tag("ul", *(tag("li", tag("b", name), f" {text}") for name, text in items))]


def references(result: dict[str, Any]) -> str:
    """Tell how references are found in training and for prompts, and how far the two differ in what they find."""
    training, prompts = (result["references"][name] for name in ("training", "prompts"))
    out = [f"{reason} {count:,} times" for reason, count in training["left_out"].items() if count]
    return (
        "References are found by the same search in training and for the prompts: the nearest captions among clips with "
        f"a record. Training leaves out what would give a record away ({', '.join(out) or 'nothing here'}); a prompt "
        f"has nothing to leave out. Of the planet were {percent(training['planet'], 1)} of them in training and "
        f"{percent(prompts['planet'], 1)} for the prompts; of planet and phenomenon "
        f"{percent(training['planet and phenomenon'], 1)} and {percent(prompts['planet and phenomenon'], 1)}."
    )


def relevance(result: dict[str, Any]) -> str:
    """Tell what `sample.min_score` leaves out of right and wrong memory, and what that does to their errors."""
    right, wrong = (result["relevance"][name] for name in ("right", "wrong"))
    return (
        f"References that score below {result['config']['sample']['min_score']:g} for the prompt itself are not read when "
        f"one samples: that leaves {percent(right['read'])} of the right planet's and {percent(wrong['read'])} of the wrong "
        f"one's. So set, the wrong memory errs by {wrong['shipped']:.2f} ({wrong['without']:.2f} without memory, "
        f"{wrong['all read']:.2f} if it is read all the same, as in the tables), the right one by {right['shipped']:.2f} "
        f"({right['all read']:.2f})."
    )


def _making(result: dict[str, Any]) -> list[Html]:
    total = sum(result["seconds"].values())
    times = report.table(
        ["step", "seconds"],
        [*((name, f"{value:.0f}") for name, value in result["seconds"].items()), ("all", f"{total:.0f}")],
    )
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["settings"].items())
    return [
        report.paragraph(
            f"{settings}. Everything random comes from the seed. On {machine}. The numbers of this page are in "
            "results.json beside it."
        ),
        times,
        report.details("the commands", report.code("\n".join(result["commands"]))),
        report.details("the configuration", report.code(json.dumps(result["config"], indent=1))),
    ]
