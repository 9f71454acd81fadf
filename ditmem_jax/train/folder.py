"""The folder of a training run: whose it is, what it is made from, and its curves.

config.json            the whole configuration: `ditmem train --config=RUN/config.json` repeats the run
run.json               a fingerprint of the frozen weights, and every start of the run: from which step, with which
                       command and versions, and what of the configuration changed then
matches.parquet        reference videos of every record, see `bank.matches`, as they were when the run began
checkpoints/           see `train.checkpoints.TrainingCheckpoints`
metrics.csv            one row per logged step; validation.csv one per validation; tensorboard/ the same
encoder.safetensors    the result; encoder_best.safetensors that of the best validation so far
"""

import contextlib
import csv
import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from ditmem_jax.config import Config, to_dict
from ditmem_jax.config.strict import dataclasses_of
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import Arrays
from ditmem_jax.parallel import compilation, processes
from ditmem_jax.progress import make_progress
from ditmem_jax.storage.digests import of_file
from ditmem_jax.storage.files import make_folder, replacing, write_text

# What must stay when a run is continued: the networks, what they minimise, and the order of the data. Of these parts
# all must but the keys listed. Records, references and frozen weights are told by their content and not by their
# paths (`bank.matches.read`, `fingerprint`), and with them the size of the videos.
MAY_CHANGE = {
    "dit": set(),
    "memory": set(),
    "adapter": set(),
    "experts": set(),
    "vae": set(),
    "text": set(),
    "clip": set(),
    "weights": {"path", "hub", "verify"},
    "data": {"records", "bank", "validation", "kind", "group", "workers", "cache"},
    "objective": set(),
    "optim": {"learning_rate", "schedule", "warmup", "weight_decay", "b1", "b2", "clip", "gate_rate"},
    "run": {
        "out",
        "steps",
        "log_every",
        "validate_every",
        "evaluators",
        "validation_batches",
        "validation_sigmas",
        "save_every",
        "keep",
        "remat",
    },
}
PACKAGES = ("ditmem_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

Changes = dict[str, tuple[Any, Any]]
"""The values of a configuration that differ, by dotted name: the value then, and now."""


def fingerprint(arrays: Arrays) -> str:
    """A checksum of arrays, computed where they live: it differs if any one bit does."""
    return f"{int(compilation.compile_for(jax.jit(_fingerprint), arrays)(arrays)):08x}"


def _fingerprint(arrays: Arrays) -> jax.Array:
    total = jnp.uint32(0)
    for name in sorted(arrays):
        x = arrays[name]
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        odd = 2 * jax.lax.iota(jnp.uint32, x.size) + jnp.uint32(1)  # an odd factor loses no bit modulo 2^32
        total = total * jnp.uint32(31) + (bits.reshape(-1).astype(jnp.uint32) * odd).sum(dtype=jnp.uint32)
    return total


@contextlib.contextmanager
def claim(config: Config, backbone: str) -> Iterator[tuple[Path, Changes]]:
    """The run's folder, made for this config or found to belong to it, and what has changed since.

    A folder that was made here disappears again if the block finds that the run cannot begin.

    Args:
        backbone: fingerprint of the frozen weights.
    Raises:
        UserError: if the folder holds something else, or a run that differs in what must stay.
    """
    folder = Path(config.run.out)
    with processes.primary_first():
        begun, changes = _claim(folder, config, backbone)
    try:
        yield folder, changes
    except UserError:
        if begun:
            shutil.rmtree(folder)
        raise


def _claim(folder: Path, config: Config, backbone: str) -> tuple[bool, Changes]:
    """True if the folder was made here; otherwise it holds this run, with these changes."""
    if (folder / "config.json").exists():
        then, now = _flat(_read_json(folder / "config.json")), _flat(to_dict(config))
        then = {key: value for key, value in _defaults().items() if key in now} | then
        about = _about(folder)
        then["backbone"], now["backbone"] = about.get("backbone", then.get("backbone")), backbone
        if then["run.init_from"] != now["run.init_from"]:  # told by its content, which may lie elsewhere now
            then["run.init_from"], now["run.init_from"] = about.get("init_from", ""), _init_from(config)
        keys = sorted(then.keys() | now.keys())
        changes = {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}
        if fixed := [key for key in changes if not may_change(key)]:
            raise UserError(
                f"{folder} holds another run",
                expected=", ".join(f"{key} = {changes[key][1]}" for key in fixed[:5]),
                found=", ".join(f"{key} = {changes[key][0]}" for key in fixed[:5]),
                fix="another run.out, or the configuration of that run; run.init_from begins a new run from its encoder",
            )
        return False, changes
    others = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if (folder.exists() and not folder.is_dir()) or set(others) - {"run.json"}:
        raise UserError(
            f"{folder} holds something else", expected="a new folder or a run's", fix="another run.out"
        )
    about = {"backbone": backbone, "init_from": _init_from(config), "starts": []}
    make_folder(folder)
    write_text(folder / "run.json", json.dumps(about, indent=1) + "\n")
    write_text(folder / "config.json", json.dumps(to_dict(config), indent=1) + "\n")
    return True, {}


def may_change(key: str) -> bool:
    """Return True if a run may be continued with another value of a dotted `key`."""
    part, _, name = key.partition(".")
    return bool(name) and name in MAY_CHANGE.get(part, {name})


def note_start(folder: Path, config: Config, step: int, changes: Changes) -> None:
    """Writes down that the run goes on after `step` with this config, which has changed so."""
    about = {"starts": []} | _about(folder)
    start = {
        "step": step,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "changes": {key: {"before": before, "now": now} for key, (before, now) in changes.items()},
    }
    about["starts"].append(start)
    write_text(folder / "run.json", json.dumps(about, indent=1) + "\n")
    write_text(folder / "config.json", json.dumps(to_dict(config), indent=1) + "\n")


def _about(folder: Path) -> dict[str, Any]:
    """The contents of run.json; a run of version 0.1 has none."""
    return _read_json(folder / "run.json") if (folder / "run.json").exists() else {}


def _init_from(config: Config) -> str:
    """A digest of the encoder that the run begins from, if it does."""
    return of_file(config.run.init_from) if config.run.init_from else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged", found=error, fix="another run.out") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged", found=type(values).__name__, fix="another run.out")
    return values


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration by dotted name; those of a run of version 0.1 have such names already."""
    flat = {}
    for part, values in config.items():
        flat |= (
            {f"{part}.{key}": x for key, x in values.items()} if isinstance(values, dict) else {part: values}
        )
    return flat


def _defaults() -> dict[str, Any]:
    """Defaults by dotted name: what a run was begun with that does not know a key yet."""
    named = {
        f"{part.name}.{field.name}": field.default
        for part in dataclasses.fields(Config)
        for kind in reversed(
            dataclasses_of(part.type)
        )  # of several kinds the first is meant where none is named
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }
    return json.loads(json.dumps(named))  # tuples become lists, as in the file


class Curves:
    """CSV and TensorBoard logs of a run that stands at `step`. What an earlier process logged after it is dropped."""

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        for path in folder.glob("*.csv"):
            header, *rows = _read_csv(path)
            kept = [row for row in rows if len(row) == len(header) and 0 < step >= int(row[0])]
            _write_csv(path, [header, *kept] if kept else [])
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Appends a row to `<kind>.csv`, and columns that it does not have; NaN where a row has no such value.

        Raises:
            UserError: if it cannot be written.
        """
        path = self.folder / f"{kind}.csv"
        row = {"step": str(step)} | {name: f"{value:.8g}" for name, value in values.items()}
        with self._writing(path):
            header, *rows = _read_csv(path)
            if new := [name for name in row if name not in header]:
                header += new
                _write_csv(path, [header, *(each + ["nan"] * len(new) for each in rows)])
            with open(path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([row.get(name, "nan") for name in header])
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Brings all to the disk; a UserError where that cannot be."""
        with self._writing(self.folder / "tensorboard"):
            self._board.close()

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {path}",
                found=error,
                fix="make room, or let the folder be written to; the same command continues from the last checkpoint in "
                f"{self.folder}",
            ) from error


def _read_csv(path: Path) -> list[list[str]]:
    """The header, empty for an empty file or none, and the rows."""
    if not path.exists():
        return [[]]
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file)) or [[]]


def _write_csv(path: Path, rows: list[list[str]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


class Monitor:
    """Collects the metrics of steps on the device, and fetches, checks and logs them together.

    On a terminal a bar shows the last of them; elsewhere each is a line. Of several processes all check, and the
    leading one logs.

    Args:
        start, steps: where the run goes on, and its length.
        rate: tells the learning rate of a step.
    """

    def __init__(self, folder: Path, start: int, steps: int, rate: Callable[[int], float]):
        self.folder, self.steps, self.rate = folder, steps, rate
        self.curves = Curves(folder, start) if processes.is_primary() else None
        self.console = Console(quiet=not processes.is_primary())
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self.progress = make_progress(
            *columns,
            console=self.console,
            disable=self.console.quiet or not self.console.is_terminal,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task("train", total=steps, completed=start, text="compiling")
        self._window: list[tuple[int, dict[str, jax.Array], np.ndarray]] = []
        self._since, self._score = time.perf_counter(), ""

    def __enter__(self) -> "Monitor":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.progress.stop()
        if self.curves:
            with (
                contextlib.suppress(UserError) if kind else contextlib.nullcontext()
            ):  # the first error is told
                self.curves.close()

    def print(self, text: object) -> None:
        """Prints a line, however long."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def start_clock(self) -> None:
        """Begins to measure the time of steps: what went before, a compilation or a validation, is not counted."""
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array], ids: np.ndarray) -> None:
        self._window.append((step, metrics, ids))

    def flush(self) -> None:
        """Logs the mean over the steps since the last call.

        Raises:
            UserError: at the first of them with a metric that is not finite.
        """
        if not self._window:
            return
        values = jax.device_get([metrics for _, metrics, _ in self._window])
        for (step, _, ids), found in zip(self._window, values, strict=True):
            if not all(map(math.isfinite, map(float, found.values()))):
                raise UserError(
                    f"training broke down at step {step}",
                    expected="finite numbers",
                    found=", ".join(f"{name} {value:.4g}" for name, value in found.items()),
                    fix="a smaller optim.learning_rate or optim.clip, with which the same run goes on from its last "
                    f"checkpoint; or look at the batch: {', '.join(map(str, ids))}",
                )
        now, step = time.perf_counter(), self._window[-1][0]
        mean = {name: float(np.mean([found[name] for found in values])) for name in values[0]}
        seconds = (now - self._since) / len(self._window)
        mean |= {"learning_rate": self.rate(step), "step_ms": 1000 * seconds}
        if self.curves:
            self.curves.write("metrics", step, mean)
        told = f"loss {mean['loss']:.4g}  gain {mean['gain']:+.2%}"
        text = f"{mean['step_ms']:.0f} ms  {told}{self._score}"
        self.progress.update(self.task, completed=step, text=text)
        if self.progress.disable:
            left = datetime.timedelta(seconds=round(seconds * (self.steps - step)))
            self.print(
                f"step {step}/{self.steps}  {told}  rate {mean['learning_rate']:.3g}  {mean['step_ms']:.0f} ms/step  "
                f"ETA {left}  memory {compilation.memory_in_use() / 1e9:.2f} GB"
            )
        self._window, self._since = [], now

    def validated(self, step: int, numbers: Mapping[str, float], summaries: Sequence[str], best: str) -> None:
        """Logs what evaluators measured; `best` is the name of the number that decides.

        Raises:
            UserError: for a gain that is not finite.
        """
        if not math.isfinite(numbers.get("gain", 0.0)):
            raise UserError(
                f"the validation after step {step} broke down",
                expected="finite numbers",
                found=f"gain {numbers['gain']}",
                fix="a smaller optim.learning_rate or optim.clip, with which the same run goes on from its last "
                "checkpoint; or look at the records of data.validation",
            )
        if self.curves:
            self.curves.write("validation", step, numbers)
        self._score = f"  validation {best} {numbers[best]:.4g}" if best in numbers else ""
        self.print(f"step {step}: {'; '.join(summaries)}")
