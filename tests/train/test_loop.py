"""The loop: when it validates, saves and logs, which encoder it keeps, and how it goes on after a stop or a crash."""

import csv
import json
import os
import signal
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.config import MeshConfig
from ditmem_jax.errors import UserError
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.state import abstract, split
from ditmem_jax.parallel.mesh import make_mesh, replicated, with_shardings
from ditmem_jax.storage.encoders import encoder_metadata, load_encoder, save_encoder
from ditmem_jax.train import folder as runs
from ditmem_jax.train import loop
from ditmem_jax.train.setup import Setup
from ditmem_jax.train.step import TrainState
from ditmem_jax.types import Batch, Conditioning
from tests.tiny import make_tiny, random_arrays, replace, tiny_config


class Numbers:
    """Batches that hold 1, 2, 3, ...; `at` may call something when a number is read."""

    open = 0  # of all such streams

    def __init__(self, at=None, start=0):
        self.next, self.at = start + 1, at or {}
        Numbers.open += 1

    def close(self):
        Numbers.open -= 1

    def __iter__(self):
        return self

    def __next__(self):
        number = self.next
        if number in self.at:
            self.at[number]()
        self.next += 1
        one = np.full((1, 1, 1, 1, 1), number, np.float32)
        return Batch(
            one, Conditioning(one[0, 0]), one[None], np.ones((1, 1), bool), np.array([f"id{number}"])
        )


class Scripted:
    """An evaluator that tells the scores that were written down for a step, which it knows by the weight."""

    about, scores = "what is written down", ("gain", "law_gain")

    def __init__(self, name, scores, steps):
        self.name, self.written, self.ends = name, scores, steps

    def __call__(self, params, rest):
        score = self.written[sum(end <= float(params["w"]) for end in self.ends) if params["w"] else 0]
        return {} if score is None else {self.name: score, f"{self.name}_0.5": score}

    def summary(self, numbers):
        return f"{self.name}: {numbers.get(self.name)}"


class FakeSetup(Setup):
    """A run whose weight w becomes w / 2 + the number in the batch: it tells which batches were seen, in order."""

    gains: ClassVar[dict[int, float]] = {}  # of validation, by step; without any nothing validates
    laws: ClassVar[dict[int, float]] = {}  # of a second evaluator
    at: ClassVar[dict] = {}  # what to call when a batch is read
    broken: int = -1  # step whose loss is not finite
    fingerprint: str | None = None
    changed: ClassVar[dict[str, tuple]] = {}

    def __init__(self, config):
        self.config, self.folder = config, runs.Path(config.run.out)
        self.folder.mkdir(exist_ok=True)
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self.backbone = {"weight": jnp.ones(3)}
        self.fingerprint = self.fingerprint or runs.fingerprint(self.backbone)
        self.changes = self.changed
        state = self.initial_state()
        self.state_layout = with_shardings(state, jax.tree.map(lambda _: replicated(self.mesh), state))

    def batches(self, start):
        return Numbers(self.at, start)

    def initial_state(self):
        return TrainState(jnp.int32(0), {"w": jnp.float32(0)}, {"mean": jnp.float32(0)}, (), {})

    def compile(self):
        @jax.jit
        def step(state, backbone, batch):
            number = batch.latents.reshape(())
            state = state.replace(step=state.step + 1, params={"w": state.params["w"] / 2 + number})
            return state, {"loss": jnp.where(state.step == self.broken, jnp.nan, number), "gain": number}

        scores = {name: found for name, found in (("gain", self.gains), ("law_gain", self.laws)) if found}
        return step, [Scripted(name, found, self.steps()) for name, found in scores.items()]

    @staticmethod
    def steps():
        """w after steps 1, 2, ..."""
        values = [0.0]
        for number in range(1, 30):
            values.append(values[-1] / 2 + number)
        return np.array(values[1:])

    def put(self, batch):
        return jax.device_put(batch._replace(ids=None))

    def export(self, name, state, step, gains):
        (self.folder / name).write_text(json.dumps([float(state.params["w"]), step, gains]))
        return self.folder / name


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Trains in `tmp_path / out`, with fake networks and data."""

    def train(out="run", warm=False, fake=None, **values):
        monkeypatch.setattr(loop, "Setup", type("Setup", (FakeSetup,), fake or {}))
        monkeypatch.setattr(loop, "check_weights", lambda *_: None)  # fakes have none
        options = dict(steps=7, log_every=2, validate_every=3, save_every=2, keep=10) | values
        config = replace(tiny_config(tmp_path), "run", out=str(tmp_path / out), **options)
        return loop.train_memory(config, warm=warm)

    return train


def rows(path):
    with open(path, newline="") as file:
        return [{name: x for name, x in row.items() if name != "step_ms"} for row in csv.DictReader(file)]


def steps_of(path):
    return [int(row["step"]) for row in rows(path)]


def saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


GAIN_COLUMNS = ("gain", "gain_wrong", "gain_0.1", "gain_0.2", "gain_0.4", "gain_0.6", "gain_0.8", "gain_0.95")
GAINS = {0: 0.0, 3: 0.5, 6: 0.2, 7: 0.1}


def test_it_validates_saves_and_logs_when_it_should(run, tmp_path):
    assert run(fake={"gains": GAINS}) == tmp_path / "run" / "encoder.safetensors"
    folder = tmp_path / "run"
    assert steps_of(folder / "validation.csv") == [0, 3, 6, 7]
    assert [float(row["gain"]) for row in rows(folder / "validation.csv")] == list(GAINS.values())
    assert saved(folder) == [2, 4, 6, 7]
    assert steps_of(folder / "metrics.csv") == [2, 3, 4, 6, 7]
    # the mean over the steps since the row before, whose losses are 1, 2, 3, ...
    assert [float(row["loss"]) for row in rows(folder / "metrics.csv")] == [1.5, 3, 4, 5.5, 7]


def test_the_best_encoder_and_the_last_are_kept(run, tmp_path):
    run(fake={"gains": GAINS}, save_every=3, keep=1)
    best, last = (
        json.loads((tmp_path / "run" / f"encoder{x}.safetensors").read_text()) for x in ("_best", "")
    )
    assert best == [FakeSetup.steps()[2], 3, {"gain": 0.5, "gain_0.5": 0.5}]
    assert last == [FakeSetup.steps()[6], 7, {"gain": 0.1, "gain_0.5": 0.1}]
    assert saved(tmp_path / "run") == [3, 7]  # the best and the last


def test_run_best_names_the_number_that_decides(run, tmp_path, capsys):
    """Of another evaluator than the first; where that measures nothing, the encoder is not the best."""
    laws = {0: None, 3: 0.1, 6: 0.4, 7: None}
    run(fake={"gains": GAINS, "laws": laws}, best="law_gain", save_every=3, keep=1)
    best = json.loads((tmp_path / "run" / "encoder_best.safetensors").read_text())
    assert best[1:] == [6, {"gain": 0.2, "gain_0.5": 0.2, "law_gain": 0.4, "law_gain_0.5": 0.4}]
    assert saved(tmp_path / "run") == [6, 7]
    columns = [(row["gain"], row["law_gain"]) for row in rows(tmp_path / "run" / "validation.csv")]
    assert columns == [("0", "nan"), ("0.5", "0.1"), ("0.2", "0.4"), ("0.1", "nan")]
    assert "step 6: gain: 0.2; law_gain: 0.4" in capsys.readouterr().out


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    signal.raise_signal(signal.SIGINT)


def crash():
    raise ConnectionError


@pytest.mark.parametrize(
    ("event", "raised", "saved_at", "seen"),
    [(terminate, SystemExit, 5, 5), (interrupt, SystemExit, 5, 5), (crash, ConnectionError, 4, 4)],
)
def test_a_run_that_stops_goes_on_with_the_next_batch(run, tmp_path, event, raised, saved_at, seen, capsys):
    run("whole", fake={"gains": GAINS})
    with pytest.raises(raised) as stop:
        run("broken", fake={"gains": GAINS, "at": {5: event}})
    if raised is SystemExit:
        assert stop.value.code == 128 + (signal.SIGTERM if event is terminate else signal.SIGINT)
        assert "stopped after step 5; the same command continues" in capsys.readouterr().out
    folder, read = tmp_path / "broken", []
    assert Numbers.open == 0
    assert max(saved(folder)) == saved_at and not (folder / "encoder.safetensors").exists()
    run("broken", fake={"gains": GAINS, "at": {n: lambda n=n: read.append(n) for n in range(1, 9)}})
    assert read == list(range(seen + 1, 8))
    assert f"continues from step {seen}\n" in capsys.readouterr().out
    for name in ("encoder.safetensors", "encoder_best.safetensors"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert steps_of(folder / "validation.csv") == [0, 3, 6, 7]
    metrics = steps_of(folder / "metrics.csv")
    assert metrics == sorted(set(metrics)) and metrics[-1] == 7


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    """It is left to the system, which does not wait for Python; where there are children, they end first."""
    before = signal.getsignal(signal.SIGINT)
    with loop._termination() as received:
        interrupt()
        assert received == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before
    ended = []
    child = types.SimpleNamespace(kill=lambda: ended.append("child"))
    monkeypatch.setattr("multiprocessing.active_children", lambda: [child])
    monkeypatch.setattr(os, "_exit", ended.append)
    with loop._termination():
        interrupt()
        terminate()  # a machine that is shut down may say so twice
        assert not ended
        interrupt()
    assert ended == ["child", 130]


def test_a_run_is_not_made_shorter_than_it_is(run, tmp_path):
    run(steps=6)
    before = (tmp_path / "run" / "encoder.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"past step 3\n.*run.steps of 6"):
        run(steps=3)
    assert (tmp_path / "run" / "encoder.safetensors").read_bytes() == before


@pytest.mark.parametrize("whole", [True, False])
def test_a_finished_run_is_left_alone_unless_its_encoder_is_gone(run, tmp_path, monkeypatch, capsys, whole):
    run()
    file = tmp_path / "run" / "encoder.safetensors"
    before = file.read_bytes()
    if not whole:
        file.unlink()
    monkeypatch.setattr(loop, "_is_whole", lambda path, step: (path, step) == (file, 7) and file.exists())
    fake = {"compile": crash} if whole else {}
    assert run(fake=fake) == file
    assert file.read_bytes() == before
    assert ("already finished: it stands at step 7" in capsys.readouterr().out) == whole


def test_an_encoder_is_whole_if_it_is_of_the_step_and_unaltered(tmp_path):
    file, memory = tmp_path / "encoder.safetensors", tiny_config(tmp_path).memory
    assert not loop._is_whole(file, 7)
    arrays = random_arrays(abstract(lambda: MemoryEncoder(memory, rngs=nnx.Rngs(0)))[1])
    save_encoder(file, arrays, memory, {"step": 7})
    assert loop._is_whole(file, 7) and not loop._is_whole(file, 8)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not loop._is_whole(file, 7)


def test_a_change_is_told_and_noted_with_its_step(run, tmp_path, capsys):
    run(steps=4)
    run(fake={"changed": {"optim.clip": (1.0, 0.5)}})
    assert "optim.clip: 1.0 until step 4, 0.5 from then on\n" in capsys.readouterr().out
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [(start["step"], start["changes"]) for start in starts] == [
        (0, {}),
        (4, {"optim.clip": {"before": 1.0, "now": 0.5}}),
    ]


def test_a_longer_run_goes_on_from_the_end_of_a_shorter(run, tmp_path):
    run(fake={"gains": GAINS}, steps=7)
    run(fake={"gains": GAINS | {9: 0.9}}, steps=9)
    assert json.loads((tmp_path / "run" / "encoder_best.safetensors").read_text())[1] == 9


def test_what_is_not_finite_stops_the_run_and_is_not_saved(run, tmp_path):
    with pytest.raises(UserError, match=r"at step 4(.|\n)*loss nan(.|\n)*id4"):
        run(fake={"broken": 4})
    assert saved(tmp_path / "run") == [2]
    assert steps_of(tmp_path / "run" / "metrics.csv") == [2, 3]


def test_warm_makes_no_step(run, tmp_path):
    assert run(warm=True, fake={"at": {1: crash}}) == tmp_path / "run"
    assert saved(tmp_path / "run") == []


def test_frozen_weights_that_change_are_found(run):
    with pytest.raises(RuntimeError, match="frozen weights have changed"):
        run(fake={"fingerprint": "that of others"})


# --- a real run of tiny networks --------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A config, on one device; a program is compiled once for all runs."""
    monkeypatch.setattr(
        "ditmem_jax.train.setup.make_mesh", lambda _: make_mesh(MeshConfig(), jax.devices()[:1])
    )
    ours = {"dir": str(tmp_path / "xla"), "min": 0}
    names = {"dir": "jax_compilation_cache_dir", "min": "jax_persistent_cache_min_compile_time_secs"}
    old = {key: getattr(jax.config, name) for key, name in names.items()}
    for key, name in names.items():
        jax.config.update(name, ours[key])
    yield replace(make_tiny(tmp_path / "tiny"), "run", steps=5, log_every=1, validate_every=3, save_every=2)
    for key, name in names.items():
        jax.config.update(name, old[key])


@pytest.mark.slow
def test_a_run_that_crashes_ends_as_one_that_does_not(tiny, tmp_path, monkeypatch):
    add, seen, crashes = runs.Monitor.add, [], [3]

    def watched(self, step, metrics, ids):
        seen.append((step, tuple(ids)))
        if [step] == crashes and "broken" in str(self.curves.folder):
            crashes.clear()
            raise ConnectionError
        add(self, step, metrics, ids)

    monkeypatch.setattr(runs.Monitor, "add", watched)

    def train(out):
        seen.clear()
        return loop.train_memory(replace(tiny, "run", out=str(tmp_path / out)))

    whole, batches = train("whole"), list(seen)
    with pytest.raises(ConnectionError):
        train("broken")
    broken = train("broken")
    assert seen == batches[2:]  # the checkpoint of step 2 was the last
    config, notes = encoder_metadata(whole)
    assert (config, notes["step"], list(notes["gains"])) == (tiny.memory, 5, list(GAIN_COLUMNS))
    assert [list(row) for row in rows(whole.with_name("validation.csv"))] == [["step", *GAIN_COLUMNS]] * 3
    assert list(whole.with_name("tensorboard").iterdir())
    for name in ("encoder.safetensors", "encoder_best.safetensors"):
        ours, theirs = (split(load_encoder(path.with_name(name)))[1] for path in (broken, whole))
        for path in theirs:
            np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-3, atol=1e-5)
