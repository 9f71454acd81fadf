"""`python -m experiments.demo`: does a memory teach a frozen video model the laws of planets it never saw?

Makes clips of made-up planets, encodes them, trains a memory encoder, makes clips of unseen planets with and
without memory, measures their physics, and writes a table and a page. A step whose result is there is not repeated.
"""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console

from ditmem_jax.bank import Table
from ditmem_jax.bank.matches import FILE, Matches
from ditmem_jax.config import Config, to_dict
from ditmem_jax.config import flags as cli
from ditmem_jax.data.records import RecordReader
from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import replacing, write_text
from ditmem_jax.worlds import PHENOMENA, splits
from experiments.demo import score, show, trials

CONFIG_FILE = "configs/tiny.py"
CONFIG = cli.define_config(CONFIG_FILE)
OUT = flags.DEFINE_string("out", "demo", "Folder for everything that is made.")
STEPS = flags.DEFINE_integer("steps", None, "Training steps, instead of config.run.steps.", lower_bound=1)
QUICK = flags.DEFINE_bool(
    "quick", False, "A few planets and steps: shows that all parts work, finds nothing."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything. `falls` and `others` are trials per unseen planet and phenomenon."""

    steps: int
    train_planets: int = 96
    train_clips: int = 18
    unseen_planets: int = 24
    bank_clips: int = 18
    falls: int = 2
    others: int = 1
    seed: int = 0


FEW = Settings(steps=20, train_planets=8, train_clips=6, unseen_planets=4, bank_clips=12, falls=1)


class Demo:
    """The steps of the demo in a folder of their own.

    Args:
        options: `--config` flags that the commands are given.
    Raises:
        UserError: if the folder holds a demo of other settings.
    """

    def __init__(self, out: Path, config: Config, settings: Settings, options: list[str], console: Console):
        self.out, self.settings, self.options, self.console = out, settings, options, console
        self.encoder, self.bank = out / "run" / "encoder.safetensors", out / "bank"
        self.config = dataclasses.replace(config, data=dataclasses.replace(config.data, bank=str(self.bank)))
        self.commands: list[str] = []
        self.seconds: dict[str, float] = {}
        self._claim()

    def run(self) -> None:
        size = self.settings
        self._step(
            "worlds", lambda: self._worlds("train", size.train_planets, size.train_clips),
            lambda: self._worlds("unseen", size.unseen_planets, size.bank_clips),
        )  # fmt: skip
        self._step("encode", lambda: self._encode("train"), lambda: self._encode("unseen"), self._build_bank)
        self._step("train", self._train)
        known = set(Table.open(self.bank).rows(columns=["caption"])["caption"].to_pylist())
        worlds = splits(size.seed, unseen=size.unseen_planets).unseen
        counts = {phenomenon: size.falls if phenomenon == "fall" else size.others for phenomenon in PHENOMENA}
        self.trials = trials.draw(worlds, counts, known, size.seed)
        self._step("sample", self._sample)
        self._step("measure", self._measure)
        self._step("report", self._report)
        self.console.print(self._result()["finding"], style="bold")
        self.console.print(f"Look at {self.out / 'report.html'}", highlight=False)

    def _claim(self) -> None:
        path = self.out / "settings.json"
        ours = dataclasses.asdict(self.settings) | {"config": to_dict(self.config)}
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) != ours:
                raise UserError(
                    f"{self.out} holds a demo of other settings", fix="another --out, or delete that folder"
                )
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(ours, indent=1) + "\n")

    def _step(self, name: str, *actions: Callable[[], None]) -> None:
        """Takes a step unless its note says that it was taken; the note holds commands and seconds."""
        note = self.out / f"{name}.json"
        if note.exists():
            self.console.print(f"[bold]{name}[/] done before")
        else:
            self.console.print(f"[bold]{name}[/]")
            before, start = len(self.commands), time.perf_counter()
            for action in actions:
                action()
            done = {"commands": self.commands[before:], "seconds": time.perf_counter() - start}
            del self.commands[before:]
            write_text(note, json.dumps(done) + "\n")
        done = json.loads(note.read_text(encoding="utf-8"))
        self.commands += done["commands"]
        self.seconds[name] = done["seconds"]

    def _command(self, module: str, *arguments: str) -> None:
        """Runs one of the library's tools as a user would."""
        self.commands.append(shlex.join(["python", "-m", module, *arguments]))
        self.console.print(f"$ {self.commands[-1]}", style="dim", highlight=False, soft_wrap=True)
        done = subprocess.run([sys.executable, "-m", module, *arguments])
        if done.returncode:
            raise UserError(f"{module} ended with exit status {done.returncode}", fix="see its message above")

    def _worlds(self, split: str, worlds: int, clips: int) -> None:
        folder = self.out / "worlds" / split
        if not (folder / "captions.csv").exists():
            counts = f"--worlds={worlds}", f"--clips={clips}", f"--seed={self.settings.seed}"
            self._command("ditmem_jax.worlds", f"--split={split}", *counts, f"--out={folder}")

    def _encode(self, split: str) -> None:
        videos = self.out / "worlds" / split
        places = f"--table={videos / 'captions.csv'}", f"--videos={videos / 'videos'}"
        self._command("ditmem_jax.encode", *self.options, *places, f"--out={self.out / 'records' / split}")

    def _build_bank(self) -> None:
        """All clips in one bank. Unseen planets are here only: no caption of training asks for them."""
        folders = [self.out / "records" / split for split in ("train", "unseen")]
        bank = f"--bank={self.bank}"
        if not Table.exists(self.bank):
            self._command("ditmem_jax.bank", "build", bank, f"--records={','.join(map(str, folders))}")
        for folder in folders:  # captions are few words: equal ones are no sign of equal clips
            k = f"--k={self.config.data.references}"
            self._command("ditmem_jax.bank", "match", str(folder), bank, k, "--threshold=1")

    def _train(self) -> None:
        records = self.out / "records"
        places = {
            "data.records": records / "train",
            "data.bank": self.bank,
            "data.validation": records / "unseen",
        }
        values = places | {"run.out": self.encoder.parent, "run.steps": self.settings.steps}
        self._command(
            "ditmem_jax.train", *self.options, *(f"--config.{name}={value}" for name, value in values.items())
        )

    def _sample(self) -> None:
        clips, retrieved = trials.make(self.config, str(self.encoder), self.trials)
        with replacing(self.out / "clips.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, retrieved=retrieved, **clips)

    def _measure(self) -> None:
        trials.examine(self.trials, self._clips()).save(self.out / "findings.npz")

    def _report(self) -> None:
        findings = trials.Findings.load(self.out / "findings.npz")
        rows = score.rows(findings)
        show.print_tables(self.console, rows)
        config = to_dict(self.config)
        config["weights"]["path"] = os.path.relpath(config["weights"]["path"])
        result = {
            "finding": score.finding(rows[0], self.config.data.references),
            "rows": [_rounded(dataclasses.asdict(row)) for row in rows],
            "retrieved": self._retrieved(),
            "leaked": self._leaked(),
            "settings": dataclasses.asdict(self.settings),
            "seconds": _rounded(self.seconds),
            "machine": {
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "device": jax.devices()[0].device_kind,
                "python": platform.python_version(),
                "jax": jax.__version__,
            },
            "commands": self.commands,
            "config": config,
        }
        page = show.make_page(result, rows, findings, self.trials, self._clips(), self.encoder.parent)
        write_text(self.out / "report.html", page)
        write_text(self.out / "results.json", json.dumps(result, indent=1) + "\n")

    def _clips(self) -> dict[str, np.ndarray]:
        with np.load(self.out / "clips.npz", allow_pickle=False) as stored:
            return {way: stored[way] for way in trials.SAMPLED}

    def _retrieved(self) -> float:
        with np.load(self.out / "clips.npz", allow_pickle=False) as stored:
            return float(stored["retrieved"])

    def _leaked(self) -> int:
        """How many references of training are clips of unseen planets."""
        unseen = {entry.id for entry in RecordReader(self.out / "records" / "unseen").entries}
        matches = Matches.load(self.encoder.parent / FILE).table["matches"].combine_chunks().flatten()
        return sum(id in unseen for id in matches.to_pylist())

    def _result(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text(encoding="utf-8"))


def _rounded(value: Any) -> Any:
    """Numbers with four digits; those that are not finite, which JSON does not have, become None."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value


def main() -> None:
    config = cli.load_config(CONFIG)
    settings = FEW if QUICK.value else Settings(config.run.steps)
    if STEPS.value:
        settings = dataclasses.replace(settings, steps=STEPS.value)
    options = [argument for argument in sys.argv[1:] if argument.startswith("--config")]
    if not any(option.startswith("--config=") for option in options):
        options.insert(0, f"--config={CONFIG_FILE}")
    Demo(Path(OUT.value), config, settings, options, Console()).run()


if __name__ == "__main__":
    cli.run(main)
