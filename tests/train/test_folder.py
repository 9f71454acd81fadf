"""A run's folder: whom it belongs to, its curves, and what is told of steps and validations."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.config import to_dict
from ditmem_jax.errors import UserError
from ditmem_jax.train import folder as runs
from tests.tiny import replace, tiny_config


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "tiny")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_belongs_to_one_run(config, tmp_path):
    config = replace(config, "run", out=str(tmp_path / "run"))
    with runs.claim(config, "abc") as folder:
        assert folder == tmp_path / "run"
    for same in (replace(config, "run", steps=99, log_every=1), replace(config, "mesh", fsdp=2)):
        runs.claim(same, "abc").__enter__()
    with pytest.raises(UserError, match=r"another run(.|\n)*optim.learning_rate = 0.5"):
        runs.claim(replace(config, "optim", learning_rate=0.5), "abc").__enter__()
    with pytest.raises(UserError, match=r"backbone = xyz"):
        runs.claim(config, "xyz").__enter__()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="holds something else"):
        runs.claim(replace(config, "run", out=str(tmp_path / "other")), "abc").__enter__()


def test_every_value_decides_but_those_that_enter_no_step(config):
    every = {f"{part}.{key}" for part, values in to_dict(config).items() for key in values}
    free = every - runs.identity(config).keys()
    run = "out steps log_every validate_every evaluators validation_batches validation_sigmas save_every keep"
    data = "validation kind group workers cache"
    expected = {f"run.{key}" for key in run.split()} | {f"data.{key}" for key in data.split()}
    expected |= {"weights.path", "weights.hub", "weights.verify"} | {
        key for key in every if key.startswith(("sample.", "mesh."))
    }
    assert free == expected


def test_a_run_begun_before_a_key_existed_has_its_default(config, tmp_path):
    config = replace(config, "run", out=str(tmp_path))
    stored = runs.identity(config) | {"backbone": "abc"}
    for name in ("vae.patch_size", "optim.kind", "experts.trains", "objective.sigma_range"):
        del stored[name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    runs.claim(config, "abc").__enter__()
    with pytest.raises(UserError, match=r"optim.kind = muon(.|\n)*optim.kind = adamw"):
        runs.claim(replace(config, "optim", kind="muon"), "abc").__enter__()


def test_a_fingerprint_sees_one_bit():
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": jnp.ones(3, jnp.bfloat16)}
    first = runs.fingerprint(arrays)
    bits = arrays["a"].view(np.uint32).copy()
    bits[2, 1] ^= 1
    assert runs.fingerprint(arrays | {"a": bits.view(np.float32)}) != first
    assert runs.fingerprint(dict(reversed(arrays.items()))) == first


def test_numbers_that_are_not_finite_stop_the_run(tmp_path):
    with runs.Monitor(tmp_path, 0, 10) as monitor:
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


def test_metrics_are_the_mean_over_the_steps_since_the_last_row(tmp_path):
    with runs.Monitor(tmp_path, 0, 10) as monitor:
        for step, loss in enumerate((1.0, 3.0, 8.0), start=1):
            monitor.add(step, {"loss": jnp.float32(loss), "gain": jnp.float32(-loss)}, np.array(["a"]))
            if step > 1:
                monitor.flush()
        monitor.flush()  # nothing new: no row
    found = [(row["step"], float(row["loss"]), float(row["gain"])) for row in rows(tmp_path / "metrics.csv")]
    assert found == [("2", 2, -2), ("3", 8, -8)]
