"""The state of a training run as orbax checkpoints, each sealed with the checksums of its files."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ditmem_jax.errors import UserError, warn
from ditmem_jax.storage.digests import of_file
from ditmem_jax.storage.files import write_text

SEAL = "seal.json"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: the state, and whatever else was saved."""

    step: int
    state: Any
    extra: dict[str, Any]


class TrainingCheckpoints:
    """The checkpoints of a run: saved in the background, the last `keep` and the one with the best score kept.

    Args:
        best: name of the score.

    Use as a context manager, so that the last one is on the disk at the end.

    Raises:
        UserError: if a file of the newest checkpoint is missing, cut off or altered. That is found before orbax
            opens the folder: its threads do not like a program that ends at once.
    """

    def __init__(self, folder: str | Path, keep: int, best: str = "gain"):
        self.folder, self._best = Path(folder).resolve(), best
        if steps := [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]:
            self._check_seal(max(steps))
        self._saving: int | None = None
        best_one = preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics[best], n=1, keep_checkpoints_without_metrics=False
        )
        policy = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), best_one])
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def __enter__(self) -> "TrainingCheckpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # it may wait for a process that has ended
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            warn(str(error))  # the error of the block is the one to raise

    def close(self) -> None:
        """Waits until everything is on the disk; errors as `save`."""
        with self._writing():
            self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, score: float | None, extra: dict[str, Any]) -> None:
        """Saves in the background; `extra` are JSON values. Waits for the save before this one.

        Raises:
            UserError: if this checkpoint, or the one before it, cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._saving = step
            saved = ocp.args.Composite(
                state=ocp.args.StandardSave(state), run=ocp.args.JsonSave({"extra": extra})
            )
            self._manager.save(step, args=saved, metrics=None if score is None else {self._best: score})

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in a UserError what of the checkpoints could not be written."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of devices and of other processes, not of the disk
            raise
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # orbax and its stores raise either for a full disk
            whole = [
                int(path.parent.name) for path in self.folder.glob(f"*/{SEAL}") if path.parent.name.isdigit()
            ]
            last = f"from step {max(whole)}" if whole else "from the beginning"
            raise UserError(
                f"cannot write checkpoint {self._saving} in {self.folder}",
                found=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
                fix=f"make room, or let the folder be written to; the same command then continues {last}",
            ) from error

    def restore(self, abstract_state: Any) -> Restored:
        """The newest checkpoint, its arrays laid out as `abstract_state` says.

        Raises:
            UserError: if it holds another state.
        """
        step = self.latest()
        wanted = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), run=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(step, args=wanted)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # orbax raises either for what does not fit
            raise UserError(
                f"cannot restore checkpoint {self.folder / str(step)}",
                expected="the state of this configuration and version",
                found=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
                fix="the version of ditmem_jax that wrote it (see run.json), or another run.out",
            ) from error
        return Restored(step, found["state"], found["run"]["extra"])

    def _seal(self) -> None:
        """Writes checksums into the checkpoint being finished, whether or not it has its final name yet."""
        if jax.process_index() > 0:
            return
        for folder in self.folder.glob(f"{self._saving}*"):
            if folder.name.split(".")[0] == str(self._saving):
                write_text(folder / SEAL, json.dumps(_checksums(folder)))

    def _check_seal(self, step: int) -> None:
        folder = self.folder / str(step)
        fix = f"delete {folder}; the same command then continues from the checkpoint before it"
        try:
            expected = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {folder} is damaged", found=f"{SEAL}: {error}", fix=fix) from error
        found = _checksums(folder)
        if broken := [name for name in expected if found.get(name) != expected[name]]:
            state = "altered or cut off" if broken[0] in found else "missing"
            raise UserError(
                f"checkpoint {folder} is damaged", found=f"{', '.join(broken[:3])}: {state}", fix=fix
            )


def _checksums(folder: Path) -> dict[str, str]:
    """Of the files that hold values, by relative path; what orbax notes beside them may still change."""
    files = sorted(
        path for part in ("state", "run", "metrics") for path in (folder / part).rglob("*") if path.is_file()
    )
    sums = {}
    for path in files:
        sums[str(path.relative_to(folder))] = of_file(path)
    return sums
