"""A run's folder: whom it belongs to, its curves, and what is told of steps and validations."""

import contextlib
import csv
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.config import to_dict
from ditmem_jax.config.files import load_config
from ditmem_jax.errors import UserError
from ditmem_jax.train import folder as runs
from tests.tiny import replace, tiny_config


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "tiny")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def claim(config, backbone="abc"):
    """The values that changed since the folder was first claimed, by name."""
    with runs.claim(config, backbone) as (folder, changes):
        assert str(folder) == config.run.out
    return {key: now for key, (_, now) in changes.items()}


def test_what_decides_what_is_learned_stays_and_the_rest_may_change(config, tmp_path):
    config = replace(config, "run", out=str(tmp_path / "run"))
    assert claim(config) == {}
    free = (
        ("run", dict(steps=99, log_every=1, remat="blocks")),
        ("mesh", dict(fsdp=2)),
        ("data", dict(workers=2, records="elsewhere", bank="elsewhere")),
        ("optim", dict(learning_rate=0.5, schedule="cosine", warmup=3, clip=0.5)),
        ("weights", dict(path="elsewhere")),
    )
    for part, values in free:
        named = {f"{part}.{key}": value for key, value in values.items()}
        assert claim(replace(config, part, **values)) == named
    fixed = (
        ("data", dict(batch_size=4)),
        ("data", dict(references=1)),
        ("run", dict(seed=1)),
        ("memory", dict(num_heads=2)),
        ("objective", dict(kind="released")),
        ("optim", dict(kind="muon")),
        ("optim", dict(accumulate=2)),
    )
    for part, values in fixed:
        ((key, value),) = values.items()
        with pytest.raises(UserError, match=rf"another run(.|\n)*{part}.{key} = {value}"):
            claim(replace(config, part, **values))
    with pytest.raises(UserError, match=r"backbone = xyz"):
        claim(config, "xyz")


def test_another_folder_is_left_alone(config, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="holds something else"):
        claim(replace(config, "run", out=str(tmp_path / "other")))


def test_every_value_stays_but_those_that_may_change(config):
    every = {f"{part}.{key}" for part, values in to_dict(config).items() for key in values}
    run = "out steps log_every validate_every evaluators validation_batches validation_sigmas save_every keep remat"
    expected = {
        "run": run,
        "data": "records bank validation kind group workers cache",
        "optim": "learning_rate schedule warmup weight_decay b1 b2 clip gate_rate",
        "weights": "path hub verify",
    }
    expected = {f"{part}.{key}" for part, keys in expected.items() for key in keys.split()}
    expected |= {key for key in every if key.startswith(("sample.", "mesh.", "video."))}
    assert {key for key in every if runs.may_change(key)} == expected


def test_a_run_begun_before_a_key_existed_has_its_default(config, tmp_path):
    """As version 0.1 wrote it, in one file by dotted name."""
    config = replace(config, "run", out=str(tmp_path))
    parts = to_dict(config).items()
    stored = {f"{part}.{key}": value for part, values in parts for key, value in values.items()}
    for name in ("vae.patch_size", "optim.kind", "experts.trains", "objective.sigma_range", "run.init_from"):
        del stored[name]
    (tmp_path / "config.json").write_text(json.dumps(stored | {"backbone": "abc"}))
    assert claim(config) == {}
    with pytest.raises(UserError, match=r"optim.kind = muon(.|\n)*optim.kind = adamw"):
        claim(replace(config, "optim", kind="muon"))
    with pytest.raises(UserError, match=r"backbone = xyz"):
        claim(config, "xyz")


def test_the_encoder_that_a_run_began_from_is_told_by_its_content(config, tmp_path):
    for name, text in (("first", "a"), ("same", "a"), ("other", "b")):
        (tmp_path / name).write_text(text)

    def begun_from(name):
        return replace(config, "run", out=str(tmp_path / "run"), init_from=str(tmp_path / name))

    assert claim(begun_from("first")) == {}
    assert claim(begun_from("same")) == {}
    (tmp_path / "first").unlink()
    assert claim(begun_from("first")) == {}  # the run has begun: nobody reads it
    with pytest.raises(UserError, match=r"another run(.|\n)*run.init_from"):
        claim(begun_from("other"))


def test_a_run_is_repeated_from_what_its_folder_says(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "ditmem_jax.train", "--config=a b.py"])
    config = replace(config, "run", out=str(tmp_path / "run"))
    claim(config)
    runs.note_start(tmp_path / "run", config, 0, {})
    changed = replace(config, "optim", learning_rate=0.5)
    with runs.claim(changed, "abc") as (folder, changes):
        runs.note_start(folder, changed, 4, changes)
    assert load_config(tmp_path / "run" / "config.json") == changed
    first, second = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert (first["step"], first["changes"]) == (0, {})
    assert (second["step"], second["changes"]) == (
        4,
        {"optim.learning_rate": {"before": 1e-3, "now": 0.5}},
    )
    assert first["command"] == "python -m ditmem_jax.train '--config=a b.py'"
    assert first["versions"]["jax"] == jax.__version__


def test_a_fingerprint_sees_one_bit():
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": jnp.ones(3, jnp.bfloat16)}
    first = runs.fingerprint(arrays)
    bits = arrays["a"].view(np.uint32).copy()
    bits[2, 1] ^= 1
    assert runs.fingerprint(arrays | {"a": bits.view(np.float32)}) != first
    assert runs.fingerprint(dict(reversed(arrays.items()))) == first


def test_numbers_that_are_not_finite_stop_the_run(tmp_path):
    with runs.Monitor(tmp_path, 0, 10, lambda step: step / 100) as monitor:
        monitor.add(4, {"loss": jnp.float32(1)}, np.array(["a", "b"]))
        monitor.add(5, {"loss": jnp.float32(jnp.nan)}, np.array(["c", "d"]))
        with pytest.raises(UserError, match=r"at step 5(.|\n)*loss nan(.|\n)*c, d"):
            monitor.flush()


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    curves = runs.Curves(tmp_path, 0)
    for step in (10, 20, 30):
        curves.write("metrics", step, {"loss": float(step)})
    curves.close()
    runs.Curves(tmp_path, 20).close()
    assert rows(tmp_path / "metrics.csv") == [{"step": "10", "loss": "10"}, {"step": "20", "loss": "20"}]


def test_a_row_with_other_values_widens_the_table(tmp_path):
    curves = runs.Curves(tmp_path, 0)
    for step, values in ((1, {"a": 1.0}), (2, {"b": 2.0, "a": 3.0}), (3, {"b": 4.0})):
        curves.write("validation", step, values)
    curves.close()
    runs.Curves(tmp_path, 3).close()
    found = [list(row.values()) for row in rows(tmp_path / "validation.csv")]
    assert found == [["1", "1", "nan"], ["2", "3", "2"], ["3", "nan", "4"]]


def test_curves_that_cannot_be_written_say_how_the_run_goes_on(tmp_path):
    """A folder in the place of a file stands in for a full disk."""
    curves = runs.Curves(tmp_path, 0)
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(
        UserError, match=r"cannot write .*metrics.csv(.|\n)*continues from the last checkpoint"
    ):
        curves.write("metrics", 1, {"loss": 1.0})
    curves.close()


@pytest.mark.parametrize(("result", "broken"), [({"gain": 0.1}, False), ({"gain": float("nan")}, True)])
def test_a_validation_that_is_not_finite_stops_the_run(result, broken, tmp_path):
    with (
        runs.Monitor(tmp_path, 0, 10, float) as monitor,
        pytest.raises(UserError, match="validation after step 4") if broken else contextlib.nullcontext(),
    ):
        monitor.validated(4, result, ["a summary"], "gain")


def test_without_a_terminal_each_logged_step_is_a_line(tmp_path, capsys):
    with runs.Monitor(tmp_path, 0, 10, lambda step: step / 100) as monitor:
        monitor.start_clock()
        for step in (1, 2):
            monitor.add(step, {"loss": jnp.float32(0.25), "gain": jnp.float32(0.5)}, np.array(["a"]))
        monitor.flush()
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"step 2/10  loss 0.25  gain \+50.00%  rate 0.02  \d+ ms/step  ETA 0:00:\d\d  memory \d+\.\d\d GB",
        line,
    )
    assert rows(tmp_path / "metrics.csv")[0]["learning_rate"] == "0.02"


def test_metrics_are_the_mean_over_the_steps_since_the_last_row(tmp_path):
    with runs.Monitor(tmp_path, 0, 10, lambda step: step / 100) as monitor:
        for step, loss in enumerate((1.0, 3.0, 8.0), start=1):
            monitor.add(step, {"loss": jnp.float32(loss), "gain": jnp.float32(-loss)}, np.array(["a"]))
            if step > 1:
                monitor.flush()
        monitor.flush()  # nothing new: no row
    found = [(row["step"], float(row["loss"]), float(row["gain"])) for row in rows(tmp_path / "metrics.csv")]
    assert found == [("2", 2, -2), ("3", 8, -8)]
