"""`python -m experiments.evidence`: what a memory is worth on planets that it never saw.

    python -m experiments.evidence --quick                            # every part in minutes, finds nothing
    python -m experiments.evidence --arms="reading,as released"   # some ways to train, three seeds each

Settings are chosen on planets of their own, by a rule; the planets to report are then opened for the best. Another
`--opening` takes fresh ones.
"""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from ditmem_jax.config import Config, to_dict
from ditmem_jax.config import flags as cli
from ditmem_jax.errors import UserError, nearest
from ditmem_jax.parallel import compilation
from ditmem_jax.storage.files import write_text
from ditmem_jax.worlds.captions import caption
from experiments import provenance
from experiments.evidence import claims, pixels, worlds
from experiments.evidence.arms import ARMS
from experiments.evidence.study import LEVELS, Arm, Study, held_out_references
from experiments.provenance import ROOT, folder_digests


class Evaluation:
    """Planets with trials, and everything that needs no memory: made once for all arms."""

    def __init__(self, study: Study, split: str, count: int, seeds: int, opening: int = 0):
        self.study, self.seeds = study, range(seeds)
        bank = worlds.planets(split, count, 3, opening)
        self.bank = worlds.encode(study.codec, bank)
        self.trials = worlds.draw_trials(bank, self.bank, study.base.data.references)
        self.rows = worlds.constants(self.trials)
        self.planet = self.trials.number[[row[0] for row in self.rows]]
        names = [self.trials.world(index).name for index in range(len(self.trials.clips))]
        pairs = list(zip(self.trials.clips, names, strict=True))
        self.texts = study.codec.text([caption(*pair) for pair in pairs])
        stated = study.codec.text([caption(*pair, "numbers") for pair in pairs])
        phenomena = [clip.scene.phenomenon for clip in self.trials.clips]
        self._tell = lambda videos: [pixels.tell_all(video, phenomena) for video in videos]
        self.told = {
            "none": self._tell(study.videos(study.base, None, self.texts, None, self.seeds)),
            "stated": self._tell(study.videos(study.base, None, stated, None, self.seeds)),
        }
        flat = [clip for _, clip in bank.flat]
        copies = [flat[first] for first in self.trials.references["right"][:, 0]]
        kinds = [clip.scene.phenomenon for clip in copies]
        copied = pixels.tell_all(np.stack([clip.video for clip in copies]), kinds)
        self.told["copy"] = [copied] * seeds
        self.told["believed"] = [worlds.believed(self.trials, self.bank)] * seeds

    def summary(self) -> dict[str, float]:
        """Mean law error by way, of what needs no memory."""
        found = claims.errors(self.rows, self.told)
        return {way: round(float(np.nanmean(x)), 3) for way, x in found.items()}

    def of(
        self,
        arm: Arm,
        encoders: Any,
        ways: tuple[str, ...] = ("right", "wrong", "other kind"),
        *,
        losses: bool = True,
    ) -> dict[str, Any]:
        """Claims about a trained arm, and what its memory does to the loss at every noise level."""
        config, told = arm.config(self.study.base), dict(self.told)
        for way in ways:
            references = self.bank.latents[self.trials.references[way]]
            told[way] = self._tell(self.study.videos(config, encoders, self.texts, references, self.seeds))
        found = claims.errors(self.rows, told)
        made = claims.claims(self.rows, self.planet, found)
        if losses:
            references = held_out_references(self.bank, config.data.references)
            made.append(claims.harm(self.study.losses(config, encoders, self.bank, references), LEVELS))
        return {
            "claims": made,
            "mean error": {way: round(float(np.nanmean(x)), 4) for way, x in found.items()},
        }


def prepare(base: Config, planets: int, per_phenomenon: int) -> Study:
    codec = worlds.Codec(base)
    train = worlds.encode(codec, worlds.planets("train", planets, per_phenomenon))
    return Study(base, train, codec)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sources() -> dict[str, str]:
    """Digests of the files that the numbers depend on, by folder."""
    found = folder_digests(
        "ditmem_jax/diffusion", "ditmem_jax/models", "ditmem_jax/worlds", "experiments/evidence"
    )
    train = [ROOT / "ditmem_jax/train" / f"{name}.py" for name in ("step", "optimizer", "calibration")]
    weights = sorted((ROOT / "experiments/tiny_wan/weights").glob("*.safetensors"))
    return found | {"ditmem_jax/train": provenance.digest(train), "weights": provenance.digest(weights)}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def collect(folder: Path) -> dict[str, Any]:
    """The claims of every arm in a folder of results as one list, each with what it was measured on."""
    rows = [
        json.loads(path.read_text(encoding="utf-8")) | {"file": path.stem}
        for path in sorted(folder.glob("*-*.json"))
    ]
    openings = [row for row in rows if "chosen" in row]
    found = []
    for row in rows:
        if "claims" in row:
            where = row["file"].removesuffix("-" + row["arm"].replace(" ", "-"))
            about = {"arm": row["arm"], "planets": where, "steps": row["steps"], "seeds": row["seeds"]}
            about |= {"commit": row["commit"], "device": row["device"], "settings": row["digest"]}
            about |= {"digests": row["digests"]}
            found += [claim | about for claim in row["claims"]]
    arms = {
        row["file"]: {"training": row["training"], "mean error": row["mean error"]}
        for row in rows
        if "claims" in row
    }
    return {"claims": found, "openings": openings, "arms": arms}


def run(
    base: Config, arms: list[Arm], seeds: int, out: Path, *, quick: bool, opening: int, minutes: float
) -> None:
    """Train every arm, evaluate it on the planets to choose with, then open the planets to report for the best one.

    The best has the lowest mean law error with the right memory on the planets to choose with; it is written down with
    the digest of its settings before the others are rendered. Beside it stands the memory as released.
    """
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - start:4.0f} s  {text}", flush=True)

    study = prepare(base, max(arm.planets for arm in arms), 1 if quick else 3)
    say("training planets rendered and encoded")
    count = 3 if quick else worlds.CHOOSE
    evaluation, trained = Evaluation(study, "choose", count, seeds), {}
    say(f"planets to choose with; errors {evaluation.summary()}")
    about = {"quick": quick, "seeds": seeds, "device": jax.devices()[0].device_kind, "digests": sources()}
    about["commit"] = provenance.commit()

    def note(name: str, arm: Arm, curve: dict, result: dict) -> None:
        config = arm.config(base)
        row = {"arm": arm.name, "steps": config.run.steps, "settings": dataclasses.asdict(arm)} | about
        row |= {"digest": digest(to_dict(config)), "training": curve} | result
        write_text(
            out / f"{name}-{arm.name.replace(' ', '-')}.json", json.dumps(rounded(row), indent=1) + "\n"
        )
        for claim in result["claims"]:
            aim = f"  aim {claim['target']:g}" if "target" in claim else ""
            span = (
                f" ({claim['low']:.3f} to {claim['high']:.3f})" if "low" in claim else f"  {claim['levels']}"
            )
            print(f"        {claim['name']:28} {claim['value']:.3f}{span}{aim}", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        if trained and time.perf_counter() - start > 60 * minutes:
            say(f"no time left for {arm.name}")
            continue
        encoders, curve = study.fit(arm, range(seeds), say)
        result = evaluation.of(arm, encoders, ("right", "wrong"), losses=False)
        trained[arm.name] = arm, encoders, curve, result["mean error"]["right"]
        note("choose", arm, curve, result)
        say(f"{arm.name} evaluated")
    best = min(trained, key=lambda name: trained[name][3])
    opened = {"opening": opening, "chosen": best, "digest": digest(to_dict(trained[best][0].config(base)))}
    write_text(out / f"opening-{opening}.json", json.dumps(opened) + "\n")
    say(f"chosen: {best}; planets to report are opened")
    evaluation = Evaluation(study, "report", 3 if quick else worlds.REPORT, seeds, opening)
    for name in dict.fromkeys([best, *(n for n in ("as released",) if n in trained)]):
        arm, encoders, curve, _ = trained[name]
        note(f"report-{opening}", arm, curve, evaluation.of(arm, encoders))
        say(f"{name} reported")
    write_text(out / "results.json", json.dumps(collect(out), indent=1) + "\n")


def main() -> None:
    compilation.enable_cache(CACHE.value)
    base = CONFIG()
    # Read at every noise level, also where nothing trained: the harm there is a finding, not to be hidden.
    base = dataclasses.replace(base, sample=dataclasses.replace(base.sample, memory_range=(0.0, 1.0)))
    if QUICK.value:
        base = dataclasses.replace(
            base,
            run=dataclasses.replace(base.run, steps=100),
            sample=dataclasses.replace(base.sample, steps=4),
        )
    names = NAMED.value or list(ARMS)
    if unknown := [name for name in names if name not in ARMS]:
        raise UserError(f"no arm {unknown[0]!r}", expected=f"one of: {nearest(unknown[0], ARMS)}")
    arms = [ARMS[name] for name in names]
    if QUICK.value:
        arms = [dataclasses.replace(arm, planets=4) for arm in arms]
    options = dict(quick=QUICK.value, opening=OPENING.value, minutes=MINUTES.value)
    run(base, arms, SEEDS.value, Path(OUT.value), **options)


if __name__ == "__main__":
    CONFIG = cli.define_config("tiny")
    CACHE = cli.define_compile_cache()
    NAMED = flags.DEFINE_list("arms", [], "Arms by name, with commas between them; by default all.")
    SEEDS = flags.DEFINE_integer("seeds", 3, "Training seeds, side by side in one program.", lower_bound=1)
    MINUTES = flags.DEFINE_float("minutes", 1e6, "After these no further arm is begun.")
    OPENING = flags.DEFINE_integer("opening", 0, "Number of a report: each has fresh planets.", lower_bound=0)
    OUT = flags.DEFINE_string("out", "evidence", "Folder for the results.")
    QUICK = flags.DEFINE_bool("quick", False, "A few planets and steps: all parts work, nothing is found.")
    cli.run(main)
