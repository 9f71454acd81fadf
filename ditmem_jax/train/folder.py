"""The folder of a training run: whose it is, which references it trains on, and its curves.

config.json            what decides the result, and a fingerprint of the frozen weights
matches.parquet        reference videos of every record, see `bank.matches`, as they were when the run began
checkpoints/           see `checkpoint.TrainingCheckpoints`
metrics.csv            one row per logged step; validation.csv one per validation; tensorboard/ the same
encoder.safetensors    the result; encoder_best.safetensors that of the best validation so far
"""

import contextlib
import csv
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from ditmem_jax.config import Config, to_dict
from ditmem_jax.config.strict import dataclasses_of
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import Arrays
from ditmem_jax.parallel import compilation, processes
from ditmem_jax.storage.files import make_folder, replacing, write_text

# What may change when a run is continued: nothing here enters the arithmetic of a step. The number of steps does
# where the learning rate follows a cosine; that is the user's choice.
FREE = {
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
    },
    "data": {"validation", "kind", "group", "workers", "cache"},
    "weights": {"path", "hub", "verify"},  # their fingerprint is what counts
    "sample": None,
    "mesh": None,
}


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
def claim(config: Config, backbone: str) -> Iterator[Path]:
    """The run's folder, made for this config or found to belong to it.

    A folder that was made here disappears again if the block finds that the run cannot begin.

    Args:
        backbone: fingerprint of the frozen weights.
    Raises:
        UserError: if the folder holds something else, or a run of another configuration.
    """
    folder = Path(config.run.out)
    ours = identity(config) | {"backbone": backbone}
    with processes.primary_first():
        begun = _claim(folder, ours)
    try:
        yield folder
    except UserError:
        if begun:
            shutil.rmtree(folder)
        raise


def _claim(folder: Path, ours: dict[str, Any]) -> bool:
    """Whether the folder was made here for a run of configuration `ours`; otherwise it holds that run."""
    path = folder / "config.json"
    if path.exists():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged", found=error, fix="another run.out") from error
        theirs = {key: value for key, value in _defaults().items() if key in ours} | theirs
        if different := sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key)):
            raise UserError(
                f"{folder} holds another run",
                expected=", ".join(f"{key} = {ours.get(key)}" for key in different[:5]),
                found=", ".join(f"{key} = {theirs.get(key)}" for key in different[:5]),
                fix="another run.out, or the configuration of that run",
            )
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} holds something else", expected="a new folder or a run's", fix="another run.out"
        )
    make_folder(folder)
    write_text(path, json.dumps(ours, indent=1) + "\n")
    return True


def identity(config: Config) -> dict[str, Any]:
    """Every value of the configuration that decides the result, by dotted name."""
    named = {}
    for part, values in to_dict(config).items():
        free = FREE.get(part, set())
        if free is not None:
            named |= {f"{part}.{key}": value for key, value in values.items() if key not in free}
    return named


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
        """Appends a row to `<kind>.csv`, and columns that it does not have; NaN where a row has no such value."""
        path = self.folder / f"{kind}.csv"
        header, *rows = _read_csv(path)
        if new := [name for name in ("step", *values) if name not in header]:
            header += new
            _write_csv(path, [header, *(row + ["nan"] * len(new) for row in rows)])
        row = {"step": str(step)} | {name: f"{value:.8g}" for name, value in values.items()}
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([row.get(name, "nan") for name in header])
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._board.close()


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

    Of several processes all check, and the leading one logs.
    """

    def __init__(self, folder: Path, start: int, steps: int):
        self.curves = Curves(folder, start) if processes.is_primary() else None
        self.console = Console(quiet=not processes.is_primary())
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(
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

    def __exit__(self, *_) -> None:
        self.progress.stop()
        if self.curves:
            self.curves.close()

    def add(self, step: int, metrics: dict[str, jax.Array], ids: np.ndarray) -> None:
        self._window.append((step, metrics, ids))

    def flush(self) -> None:
        """Logs the mean over the steps since the last call.

        Raises:
            UserError: at the first of them whose loss or gradient is not finite.
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
                    fix=f"a smaller optim.learning_rate or optim.clip; or look at the batch: {', '.join(map(str, ids))}",
                )
        now, step = time.perf_counter(), self._window[-1][0]
        mean = {name: float(np.mean([found[name] for found in values])) for name in values[0]}
        mean["step_ms"] = 1000 * (now - self._since) / len(self._window)
        if self.curves:
            self.curves.write("metrics", step, mean)
        text = f"{mean['step_ms']:.0f} ms  loss {mean['loss']:.4g}  gain {mean['gain']:+.2%}{self._score}"
        self.progress.update(self.task, completed=step, text=text)
        self._window, self._since = [], now

    def validated(self, step: int, numbers: Mapping[str, float], summaries: Sequence[str], best: str) -> None:
        """Logs what evaluators measured; `best` is the name of the number that decides."""
        if self.curves:
            self.curves.write("validation", step, numbers)
        self._score = f"  validation {best} {numbers[best]:.4g}" if best in numbers else ""
        self.console.print(f"step {step}: {'; '.join(summaries)}", highlight=False)
        self._since = time.perf_counter()
