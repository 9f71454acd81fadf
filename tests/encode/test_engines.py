"""A Ray cluster makes the records that one process makes, though it loses a machine on the way."""

import os
import signal

import numpy as np
import psutil
import pytest

from ditmem_jax.bank.embedders import make_embedder
from ditmem_jax.data.sources import Videos, read_table
from ditmem_jax.encode import engines
from ditmem_jax.encode.dataset import encode_dataset
from ditmem_jax.encode.engines import Local, OnRay
from ditmem_jax.errors import UserError
from tests.encode.test_dataset import (  # noqa: F401 - `folder` is a fixture
    assert_same_folders,
    folder,
    networks,
    write_weights,
)


@pytest.fixture
def cluster():
    """Two machines, the second one to be lost. A machine is missed after three seconds."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    from ray.cluster_utils import Cluster

    quick = {"health_check_failure_threshold": 3, "health_check_period_ms": 1000}
    machine = dict(num_cpus=1, object_store_memory=100 * 2**20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(True, head_node_args=machine | dict(include_dashboard=False, _system_config=quick))
        cluster.lost = cluster.add_node(**machine)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def kill(node):
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        os.kill(process.pid, signal.SIGKILL)


class Losing(OnRay):
    """Loses a machine once the first shard is there."""

    def run(self, shards, job):
        parts = super().run(shards, job)
        yield next(parts)
        kill(self.lost)
        yield from parts


@pytest.mark.slow
def test_a_cluster_that_loses_a_machine_makes_the_same_records(folder, cluster, tmp_path):  # noqa: F811
    settings = write_weights(folder)
    rows = Videos([folder / "videos"]).rows(read_table(folder / "captions.csv"))
    options = dict(batch=2, shard_size=2)
    one = encode_dataset(rows, tmp_path / "one", settings, Local(networks(folder)), **options)
    engine = Losing(cluster.address)
    assert engine.workers == 2
    engine.lost = cluster.lost
    many = encode_dataset(rows, tmp_path / "many", settings, engine, **options)
    assert (many.made, many.skipped) == (one.made, one.skipped) and one.skipped
    assert_same_folders(tmp_path / "many", tmp_path / "one")


def test_a_cluster_that_is_not_there_is_named():
    pytest.importorskip("ray")
    with pytest.raises(UserError, match="no Ray cluster at localhost:1"):
        OnRay("localhost:1")


@pytest.mark.slow
def test_a_cluster_embeds_captions_as_one_process_does(monkeypatch):
    ray = pytest.importorskip("ray")
    captions = [f"ball {i} falls on planet {i % 7}" for i in range(50)]
    embedder = make_embedder("lexical", captions)
    monkeypatch.setattr(engines, "CAPTIONS_AT_ONCE", 16)
    try:
        vectors = OnRay().documents(embedder, captions)
    finally:
        ray.shutdown()
    np.testing.assert_array_equal(vectors, embedder.documents(captions))
