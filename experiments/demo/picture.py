"""The moving picture of the README, from the folder of a demo: `python -m experiments.demo.picture --demo=demo`.

Rows are planets, columns the planet itself, simulated, and what the frozen model makes of one prompt and one noise.
"""

from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image, ImageDraw, ImageFont

from ditmem_jax.bank.table import Table
from ditmem_jax.config import flags as cli
from ditmem_jax.demo import trials
from ditmem_jax.demo.trials import Findings, Trial
from ditmem_jax.worlds.laws import PHENOMENA, splits
from ditmem_jax.worlds.render import CAMERA

COLUMNS = {"real": "the planet", "without": "no memory", "right": "its clips", "wrong": "another's clips"}
SHOWN = ("fall", "pendulum", "slide")  # the first trial of each, on planets spread evenly over the constant
SCALE, GAP, HEAD, LABEL = 4, 8, 24, 18


def chosen(drawn: list[Trial], found: Findings) -> list[tuple[int, str]]:
    """For each phenomenon shown a trial and its constant: planets low, middle and high in it, none picked by hand."""
    rows = []
    for place, phenomenon in zip((0.1, 0.5, 0.9), SHOWN, strict=True):
        constant = next(iter(PHENOMENA[phenomenon]))
        of_it = [i for i, trial in enumerate(drawn) if trial.phenomenon == phenomenon]
        ordered = sorted(of_it, key=lambda i: getattr(drawn[i].world, constant))
        rows.append((ordered[round(place * (len(ordered) - 1))], constant))
    return rows


def picture(demo: Path, out: Path) -> None:
    """Write the picture as an animated GIF."""
    known = set(Table.open(demo / "bank").rows(columns=["caption"])["caption"].to_pylist())
    found = Findings.load(demo / "findings.npz")
    worlds = splits(0, unseen=24).unseen
    counts = {phenomenon: 2 if phenomenon == "fall" else 1 for phenomenon in PHENOMENA}
    drawn = trials.draw(worlds, counts, known, 0)
    with np.load(demo / "clips.npz", allow_pickle=False) as stored:
        clips = {way: stored[way] for way in COLUMNS if way != "real"}
    clips["real"] = np.stack([trial.clip.video for trial in drawn])
    rows, font = chosen(drawn, found), ImageFont.load_default(13)
    side = SCALE * clips["real"].shape[2]
    size = GAP + len(COLUMNS) * (side + GAP), HEAD + len(rows) * (side + LABEL + GAP)
    frames = []
    for time in range(clips["real"].shape[1]):
        frame = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(frame)
        for column, (way, name) in enumerate(COLUMNS.items()):
            x = GAP + column * (side + GAP)
            draw.text((x + side / 2, HEAD / 2), name, "black", font, anchor="mm")
            for row, (trial, constant) in enumerate(rows):
                y = HEAD + row * (side + LABEL + GAP)
                film = Image.fromarray(clips[way][trial, time]).resize((side, side), Image.Resampling.NEAREST)
                frame.paste(film, (x, y))
                place = (found.trial == trial) & (found.constant == constant)
                value = found.true[place] if way == "real" else found.measured[way][place]
                told = f"{constant} {value[0]:.2g}" if np.isfinite(value[0]) else "not measurable"
                draw.text((x + side / 2, y + side + LABEL / 2), told, "black", font, anchor="mm")
        frames.append(frame.quantize(32, dither=Image.Dither.NONE))
    out.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(
        out, save_all=True, append_images=frames[1:], duration=round(1500 / CAMERA.fps), loop=0, optimize=True
    )


def main() -> None:
    picture(Path(DEMO.value), Path(OUT.value))


if __name__ == "__main__":
    DEMO = flags.DEFINE_string("demo", "demo", "Folder of a demo that has run.")
    OUT = flags.DEFINE_string("out", "docs/pictures/demo.gif", "File to write.")
    cli.run(main)
