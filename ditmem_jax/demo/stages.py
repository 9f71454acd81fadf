"""The stages of the demo, each taken once: a note in the demo's folder says that a stage is done and how long it took.

A demo that was stopped goes on with the stage that has no note. Deleting a note repeats its stage.
"""

import csv
import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from ditmem_jax.bank.matches import FILE, Matches
from ditmem_jax.bank.table import Table
from ditmem_jax.config import Config, to_dict
from ditmem_jax.data.records import RecordReader
from ditmem_jax.data.video import read_video
from ditmem_jax.demo import score, show, trials
from ditmem_jax.demo.trials import Kind
from ditmem_jax.errors import UserError
from ditmem_jax.storage.files import make_folder, read_json, replacing, write_text
from ditmem_jax.worlds.laws import PHENOMENA, splits

SPLITS = ("train", "unseen")


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

    @property
    def typical_seconds(self) -> dict[str, float]:
        """Roughly how long each stage takes with the config `tiny` on two idle CPU cores."""
        clips = self.train_planets * self.train_clips + self.unseen_planets * self.bank_clips
        count = self.unseen_planets * (self.falls + self.others * (len(PHENOMENA) - 1))
        return {
            "worlds": 10 + clips / 50,
            "encode": 15 + clips / 50,
            "train": 40 + self.steps / 5.6,
            "sample": 20 + count / 4,
            "measure": 2 + count / 25,
            "report": 5,
        }


FEW = Settings(steps=20, train_planets=8, train_clips=6, unseen_planets=4, bank_clips=12, falls=1)


class Demo:
    """The stages of the demo in a folder of their own.

    Args:
        options: `--config` flags that the commands are given.
    Raises:
        UserError: if the folder holds a demo of other settings.
    """

    def __init__(
        self, out: Path, config: Config, settings: Settings, options: Sequence[str], console: Console
    ):
        self.out, self.settings, self.options, self.console = out, settings, options, console
        self.encoder, self.bank = out / "run" / "encoder.safetensors", out / "bank"
        self.config = dataclasses.replace(config, data=dataclasses.replace(config.data, bank=str(self.bank)))
        self.commands: list[str] = []
        self.seconds: dict[str, float] = {}
        self._claim()

    def run(self) -> None:
        """Take every stage that was not taken before, and print what was found."""
        size = self.settings
        if left := [name for name in size.typical_seconds if not self._note(name).exists()]:
            total = sum(self._expected(name)[0] for name in left)
            self.console.print(
                f"{len(left)} stages, about {_duration(total)}; stopped, the same command goes on from there"
            )
        self._stage(
            "worlds", lambda: self._worlds("train", size.train_planets, size.train_clips),
            lambda: self._worlds("unseen", size.unseen_planets, size.bank_clips),
        )  # fmt: skip
        self._stage("encode", lambda: self._encode("train"), lambda: self._encode("unseen"), self._build_bank)
        self._stage("train", self._train)
        known = set(Table.open(self.bank).rows(columns=["caption"])["caption"].to_pylist())
        worlds = splits(size.seed, unseen=size.unseen_planets).unseen
        counts = {phenomenon: size.falls if phenomenon == "fall" else size.others for phenomenon in PHENOMENA}
        self.trials = trials.draw(worlds, counts, known, size.seed)
        self._stage("sample", self._sample)
        self._stage("measure", self._measure)
        self._stage("report", self._report)
        self.console.print(self._result()["finding"], style="bold")
        self.console.print(f"Look at {self.out / 'report.html'}", highlight=False, soft_wrap=True)

    def _claim(self) -> None:
        path = self.out / "settings.json"
        ours = dataclasses.asdict(self.settings) | {"config": to_dict(self.config)}
        if path.exists():
            if read_json(path) != ours:
                raise UserError(
                    f"{self.out} holds a demo of other settings", fix="another --out, or delete that folder"
                )
        else:
            make_folder(self.out)
            write_text(path, json.dumps(ours, indent=1) + "\n")

    def _note(self, stage: str) -> Path:
        return self.out / f"{stage}.json"

    def _stage(self, name: str, *actions: Callable[[], None]) -> None:
        """Take a stage unless its note says that it was taken; the note holds commands and seconds."""
        note = self._note(name)
        if note.exists():
            done = read_json(note, f"delete {note}; the stage is then taken again")
            self.console.print(f"[bold]{name}[/]: done before, in {_duration(done['seconds'])}")
        else:
            self.console.print(f"[bold]{name}[/]: {self._expected(name)[1]}")
            before, start = len(self.commands), time.perf_counter()
            for action in actions:
                action()
            done = {"commands": self.commands[before:], "seconds": time.perf_counter() - start}
            del self.commands[before:]
            write_text(note, json.dumps(done) + "\n")
        self.commands += done["commands"]
        self.seconds[name] = done["seconds"]

    def _expected(self, stage: str) -> tuple[float, str]:
        """How long the stage will take in seconds, and the same in words: as last time here, or as is typical."""
        last = self._result()["seconds"] if (self.out / "results.json").exists() else {}
        if stage in last:
            return last[stage], f"took {_duration(last[stage])} last time"
        typical = self.settings.typical_seconds[stage]
        return typical, f"about {_duration(typical)} on two idle CPU cores"

    def _command(self, command: str, *arguments: str) -> None:
        """Run one of the library's commands as a user would, from the folder that the demo was started in."""
        self.commands.append(shlex.join(["ditmem", command, *arguments]))
        self.console.print(f"$ {self.commands[-1]}", style="dim", highlight=False, soft_wrap=True)
        done = subprocess.run([sys.executable, "-m", f"ditmem_jax.{command}", *arguments], check=False)
        if done.returncode:
            raise UserError(
                f"ditmem {command} ended with exit status {done.returncode}", fix="see its message above"
            )

    def _worlds(self, split: str, worlds: int, clips: int) -> None:
        folder = self.out / "worlds" / split
        if not (folder / "captions.csv").exists():
            counts = f"--worlds={worlds}", f"--clips={clips}", f"--seed={self.settings.seed}"
            self._command("worlds", f"--split={split}", *counts, f"--out={folder}")

    def _encode(self, split: str) -> None:
        videos = self.out / "worlds" / split
        places = f"--table={videos / 'captions.csv'}", f"--videos={videos / 'videos'}"
        self._command("encode", *self.options, *places, f"--out={self.out / 'records' / split}")

    def _build_bank(self) -> None:
        """All clips in one bank. Unseen planets are here only: no caption of training asks for them."""
        folders = [self.out / "records" / split for split in SPLITS]
        bank = f"--bank={self.bank}"
        if not Table.exists(self.bank):
            records = f"--records={','.join(map(str, folders))}"
            self._command("bank", "build", bank, records, "--embedder=lexical")
        for folder in folders:  # captions are few words, and clips of one planet alike: no signs of copies
            k = f"--k={self.config.data.references}"
            self._command("bank", "match", str(folder), bank, k, "--threshold=1", "--duplicate_latents=1")

    def _train(self) -> None:
        records = self.out / "records"
        places = {
            "data.records": records / "train",
            "data.bank": self.bank,
            "data.validation": records / "unseen",
        }
        values = places | {"run.out": self.encoder.parent, "run.steps": self.settings.steps}
        self._command("train", *self.options, *(f"--config.{name}={value}" for name, value in values.items()))

    def _sample(self) -> None:
        clips, found = trials.make(self.config, str(self.encoder), self.trials)
        with replacing(self.out / "clips.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **found, **clips)

    def _measure(self) -> None:
        clips = self._clips(*trials.SAMPLED)
        nearest = [self._video(ids[0]) for ids in self._clips("references")["references"].tolist()]
        trials.examine(self.trials, clips | {"copy": nearest}).save(self.out / "findings.npz")

    def _report(self) -> None:
        findings = trials.Findings.load(self.out / "findings.npz")
        rows, references = score.rows(findings), self._references()
        scores = {way: self._clips(f"scores.{way}")[f"scores.{way}"] for way in ("right", "wrong")}
        show.print_tables(self.console, rows)
        config = to_dict(self.config)
        config["weights"]["path"] = os.path.relpath(config["weights"]["path"])
        result = {
            "finding": score.finding(rows[0], self.config.data.references),
            "rows": [_rounded(dataclasses.asdict(row)) for row in rows],
            "retrieved": _rounded(references["prompts"]["planet"]),
            "leaked": self._leaked(),
            "references": _rounded(references),
            "relevance": _rounded(score.relevance(findings, scores, self.config.sample.min_score)),
            "validation": _rounded(self._validation()),
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
        self.console.print(show.references(result), soft_wrap=True)
        self.console.print(show.relevance(result), soft_wrap=True)
        clips = self._clips(*trials.SAMPLED)
        page = show.make_page(result, rows, findings, self.trials, clips, self.encoder.parent)
        write_text(self.out / "report.html", page)
        write_text(self.out / "results.json", json.dumps(result, indent=1) + "\n")

    def _validation(self) -> dict[str, float]:
        """The last row of the run's gains."""
        with open(self.encoder.parent / "validation.csv", newline="", encoding="utf-8") as file:
            *_, last = csv.DictReader(file)
        return {name: float(value) for name, value in last.items()}

    def _clips(self, *names: str) -> dict[str, np.ndarray]:
        with np.load(self.out / "clips.npz", allow_pickle=False) as stored:
            return {name: stored[name] for name in names}

    def _video(self, id: str) -> np.ndarray:
        """The pixels [T, H, W, 3] of a clip of the bank."""
        (path,) = (self.out / "worlds").glob(f"*/videos/{id}")
        return read_video(path).frames

    def _references(self) -> dict[str, Any]:
        """How well references fit what asked for them: records in training, and the prompts of the trials."""
        kinds = self._kinds()
        matches = Matches.load(self.encoder.parent / FILE)
        asked, found = (matches.table[name].to_pylist() for name in ("id", "matches"))
        training = (
            (kinds[id], [kinds[video] for video in ids]) for id, ids in zip(asked, found, strict=True)
        )
        prompts = (
            (Kind(trial.world.name, trial.phenomenon), [kinds[video] for video in ids])
            for trial, ids in zip(self.trials, self._clips("references")["references"].tolist(), strict=True)
        )
        return {
            "training": trials.alike(training) | {"left_out": dict(matches.left_out)},
            "prompts": trials.alike(prompts),
        }

    def _kinds(self) -> dict[str, Kind]:
        """Planet and phenomenon of every clip of the bank, by id."""
        kinds = {}
        for split in SPLITS:
            with open(self.out / "worlds" / split / "captions.csv", newline="", encoding="utf-8") as file:
                kinds |= {row["video"]: Kind(row["world"], row["phenomenon"]) for row in csv.DictReader(file)}
        return kinds

    def _leaked(self) -> int:
        """How many references of training are clips of unseen planets."""
        unseen = {entry.id for entry in RecordReader(self.out / "records" / "unseen").entries}
        matches = Matches.load(self.encoder.parent / FILE).table["matches"].combine_chunks().flatten()
        return sum(id in unseen for id in matches.to_pylist())

    def _result(self) -> dict[str, Any]:
        return read_json(self.out / "results.json")


def _duration(seconds: float) -> str:
    """Seconds in words: 9 s, 9 min 34 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _rounded(value: Any) -> Any:
    """Numbers with four digits; those that are not finite, which JSON does not have, become None."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value
