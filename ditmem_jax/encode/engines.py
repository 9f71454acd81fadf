"""Engines that encode the shards of a run, or embed the captions of a bank: this process, or the workers of a Ray cluster.

An engine has `prepare(config)`, what records are to be made and the embeddings of the prompts that sampling needs,
`embed(config, texts)`, the embeddings of other texts, and `run(shards, job)`, which yields the parts of the shards in order as they are finished.

On a cluster each worker holds the networks, on an accelerator of its own if there are any, and has videos read by
tasks on any free CPU. Ray starts lost workers and tasks again elsewhere. Every machine must see the videos, weights and
records by the same paths, and have this package installed.
"""

import collections
import functools
import itertools
import logging
import os
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32

from ditmem_jax.bank.embedders import Embedder, load_embedder
from ditmem_jax.config import Config
from ditmem_jax.data.records import Meta
from ditmem_jax.data.sources import Row, read_row
from ditmem_jax.encode.shards import Job, Networks, Part, describe, embed, write_part
from ditmem_jax.errors import UserError
from ditmem_jax.progress import track
from ditmem_jax.storage.weights import load_umt5, load_vae

Prompts = dict[str, Any]
CAPTIONS_AT_ONCE = 4096


class Local:
    """This process: its accelerator encodes while threads read the next videos."""

    def __init__(self, networks: Networks):
        self.networks = networks

    def prepare(self, config: Config) -> tuple[Meta, Prompts]:
        prompts = ["", config.sample.negative_prompt]
        embeddings = embed(*self.networks[1], prompts)
        return describe(config, self.networks), dict(zip(prompts, embeddings, strict=True))

    def embed(self, config: Config, texts: Sequence[str]) -> list[np.ndarray]:
        return embed(*self.networks[1], texts)

    def run(self, shards: Sequence[list[Row]], job: Job) -> Generator[Part, None, None]:
        rows = list(itertools.chain(*shards))
        with ThreadPoolExecutor() as pool:
            start = functools.partial(pool.submit, read_row, options=job.reading)
            clips = (clip.result() for clip in _ahead(start, rows, 2 * job.batch))
            clips = iter(track(clips, "encoding", total=len(rows)))
            for shard in shards:
                yield write_part(shard, itertools.islice(clips, len(shard)), self.networks, job)
            next(clips, None)  # the bar counts a clip as done when the next one is asked for


class OnRay:
    """A Ray cluster.

    Args:
        address: of a running cluster; this machine with all its cores if empty.
        workers: how many hold the networks; one for each accelerator, or else one for each machine, if 0.
    Raises:
        UserError: if Ray is not installed or there is no such cluster.
    """

    def __init__(self, address: str = "", workers: int = 0):
        self.ray = _import_ray()
        try:
            if ":" in address:  # Ray itself would wait for minutes, and then end the process
                host, port = address.removeprefix("ray://").rsplit(":", 1)
                socket.create_connection((host, int(port)), timeout=10).close()
            self.ray.init(
                address or "local", include_dashboard=False, log_to_driver=False, logging_level="ERROR"
            )
        except (OSError, ValueError) as error:
            raise UserError(f"no Ray cluster at {address}", found=error, fix="ray start --head") from error
        resources = self.ray.cluster_resources()
        self.accelerator = next((kind for kind in ("GPU", "TPU") if resources.get(kind)), None)
        machines = sum(node["Alive"] for node in self.ray.nodes())
        self.workers = workers or int(resources.get(self.accelerator, machines))

    def prepare(self, config: Config) -> tuple[Meta, Prompts]:
        task = self.ray.remote(_prepare).options(max_retries=-1, **self._resources())
        return _value(self.ray.get(task.remote(config)))

    def embed(self, config: Config, texts: Sequence[str]) -> list[np.ndarray]:
        task = self.ray.remote(_embed).options(max_retries=-1, **self._resources())
        return _value(self.ray.get(task.remote(config, list(texts))))

    def run(self, shards: Sequence[list[Row]], job: Job) -> Generator[Part, None, None]:
        if shards:
            parts = self._map([{"shard": shard} for shard in shards], _Worker, job)
            for row in track(parts, "encoding shards", total=len(shards)):
                yield _value(row["part"])

    def documents(self, embedder: Embedder, captions: Sequence[str]) -> Float32[np.ndarray, "n D"]:
        """The vectors of the captions of a new bank by `embedder.documents`, a model on each worker."""
        made_by = embedder.describe(), dict(getattr(embedder, "frequency", {}))
        starts = range(0, len(captions), CAPTIONS_AT_ONCE)
        groups = [{"captions": captions[start : start + CAPTIONS_AT_ONCE]} for start in starts]
        found = self._map(groups, _TextWorker, *made_by)
        vectors = [_value(row["vectors"]) for row in track(found, "embedding", total=len(groups))]
        return np.concatenate(vectors) if vectors else np.zeros((0, embedder.dim), np.float32)

    def _map(self, items: list[dict[str, Any]], worker: type, *arguments: Any) -> Iterator[dict[str, Any]]:
        """The workers' results for the items, in order."""
        data = self.ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars, context.execution_options.preserve_order = False, True
        made = data.from_items(items, override_num_blocks=len(items)).map(
            worker,
            fn_constructor_args=arguments,
            compute=data.ActorPoolStrategy(size=self.workers, max_tasks_in_flight_per_actor=1),
            **self._resources(),
        )
        return iter(made.iter_rows())

    def _resources(self) -> dict[str, Any]:
        """The resources that a worker claims: no CPU, lest there be none left to read videos."""
        kinds: dict[str | None, dict[str, Any]] = {"GPU": {"num_gpus": 1}, "TPU": {"resources": {"TPU": 1}}}
        return {"num_cpus": 0, **kinds.get(self.accelerator, {})}


Engine = Local | OnRay


class _Worker:
    """The networks on one machine of a cluster, loaded when the first shard comes."""

    def __init__(self, job: Job):
        self.job = job

    @functools.cached_property
    def networks(self) -> Networks:
        networks = _load(self.job.config)
        if (found := describe(self.job.config, networks)) != self.job.meta:
            raise UserError(
                f"the weights in {self.job.config.weights.path} are not the same on all machines",
                expected=self.job.meta,
                found=found,
            )
        return networks

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"part": _or_error(self._write, row["shard"])}

    def _write(self, rows: list[Row]) -> Part:
        import ray

        task = ray.remote(read_row).options(max_retries=-1)
        start = functools.partial(task.remote, options=self.job.reading)  # pyright: ignore[reportCallIssue]  # of read_row
        clips = map(ray.get, _ahead(start, rows, 2 * self.job.batch))
        return write_part(rows, clips, self.networks, self.job)


class _TextWorker:
    """The embedder of a bank on one machine of a cluster."""

    def __init__(self, description: dict[str, Any], words: dict[str, int]):
        self._load = functools.partial(load_embedder, description, words)

    @functools.cached_property
    def embedder(self) -> Embedder:
        return self._load()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"vectors": _or_error(lambda: self.embedder.documents(list(row["captions"])))}


def _ahead(start: Callable, items: Iterable, count: int) -> Iterator:
    """`map(start, items)`, but `count` items ahead."""
    pending = collections.deque()
    for item in items:
        pending.append(start(item))
        if len(pending) > count:
            yield pending.popleft()
    yield from pending


def _load(config: Config) -> Networks:
    return load_vae(config), load_umt5(config)


def _prepare(config: Config) -> tuple[Meta, Prompts] | UserError:
    return _or_error(lambda: Local(_load(config)).prepare(config))


def _embed(config: Config, texts: Sequence[str]) -> list[np.ndarray] | UserError:
    return _or_error(lambda: embed(*load_umt5(config), texts))


def _or_error(function: Callable, *arguments: Any) -> Any:
    """The result of the function, or the UserError that it raises; Ray would bury that under its own."""
    try:
        return function(*arguments)
    except UserError as error:
        return error


def _value(result: Any) -> Any:
    if isinstance(result, UserError):
        raise result
    return result


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            "the engine ray needs Ray", found=error, fix="pip install 'ditmem_jax[ray]', or --engine=local"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of all that it does
    return ray
