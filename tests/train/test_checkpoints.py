"""Checkpoints of a run: exact, sealed, the last and the best kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditmem_jax.errors import UserError
from ditmem_jax.train.checkpoints import TrainingCheckpoints


def state_at(step):
    """Something with the variety of a training state."""
    weights = jax.random.normal(jax.random.key(step), (300, 40))
    return {
        "params": {"a.kernel": weights, "a.bias": jnp.full(3, step, jnp.bfloat16)},
        "step": jnp.int32(step),
    }


def layout(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_all(folder, gains, keep=2):
    with TrainingCheckpoints(folder, keep) as checkpoints:
        for step, gain in enumerate(gains, start=1):
            checkpoints.save(step, state_at(step), gain, {"best": gain})


def test_the_newest_comes_back_exactly(tmp_path):
    save_all(tmp_path, [0.1, None, 0.2])
    with TrainingCheckpoints(tmp_path, 2) as checkpoints:
        restored = checkpoints.restore(layout(state_at(0)))
    assert (restored.step, restored.extra) == (3, {"best": 0.2})
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_at(3))


def test_the_last_two_and_the_best_are_kept(tmp_path):
    save_all(tmp_path, [0.1, 0.9, 0.2, None, 0.3, None])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]


def test_a_state_that_is_donated_at_once_is_saved_as_it_was(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    with TrainingCheckpoints(tmp_path, 2) as checkpoints:
        state = state_at(1)
        checkpoints.save(1, state, None, {})
        for _ in range(20):
            state = overwrite(state)
    with TrainingCheckpoints(tmp_path, 2) as checkpoints:
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(layout(state)).state, state_at(1))


def test_every_damaged_file_is_found_and_named(tmp_path):
    save_all(tmp_path, [None])
    files = [
        path
        for part in ("state", "run")
        for path in (tmp_path / "1" / part).rglob("*")
        if path.stat().st_size > 9
    ]
    files = [path for path in files if path.is_file()] + [tmp_path / "1" / "seal.json"]
    assert len(files) > 4
    for path in files:
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for broken in (flipped, content[:middle], None):
            path.unlink() if broken is None else path.write_bytes(broken)
            with pytest.raises(UserError, match=f"{tmp_path}/1 is damaged"):
                TrainingCheckpoints(tmp_path, 2)
            path.write_bytes(content)
    with TrainingCheckpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.restore(layout(state_at(0))).step == 1


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), UserError),
        (RuntimeError("No space left"), UserError),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Connection reset by peer"), jax.errors.JaxRuntimeError),
    ],
)
def test_a_disk_is_only_blamed_for_its_own_errors(tmp_path, monkeypatch, error, raised):
    def fail(*_, **__):
        raise error

    with TrainingCheckpoints(tmp_path, 2) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(raised, match=r"checkpoint 7 |reset by peer"):
            checkpoints.save(7, state_at(7), None, {})
        monkeypatch.undo()
