"""The set-up of a run: networks, data and compiled programs, checked, loaded and on the devices of the mesh."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ditmem_jax.bank import matches
from ditmem_jax.conditions.kinds import condition_layout
from ditmem_jax.config import Config, FreeTokensConfig, MemoryConfig, to_dict
from ditmem_jax.data.pipeline import training_data
from ditmem_jax.data.records import RecordReader
from ditmem_jax.data.references import References, majority_source
from ditmem_jax.diffusion import objective
from ditmem_jax.errors import UserError, warn
from ditmem_jax.evaluate.evaluator import Evaluator, HeldOut, Subject
from ditmem_jax.evaluate.kinds import check_evaluators, make_evaluators
from ditmem_jax.evaluate.others import others, relatives
from ditmem_jax.models.ditmem import Networks, compute_for
from ditmem_jax.models.free_tokens import source_numbers
from ditmem_jax.models.placement import place_on
from ditmem_jax.models.state import Arrays, split
from ditmem_jax.parallel import compilation, processes
from ditmem_jax.parallel.mesh import all_gather_to_host, batch_sharding, check_mesh, local_rows, make_mesh
from ditmem_jax.storage.encoders import encoder_metadata, load_encoder, save_encoder
from ditmem_jax.storage.weights import check_weights, load_dit, stored_dits
from ditmem_jax.train import folder as runs
from ditmem_jax.train.calibration import calibrate
from ditmem_jax.train.optimizer import check_updates, make_optimizer
from ditmem_jax.train.step import TrainState, init_state, jit_train_step, make_networks, state_layout
from ditmem_jax.types import Batch, Conditioning

SMALL = 2**28  # bytes of frozen weights: up to here memory goes to speed, beyond it is scarce


class Setup:
    """Everything of a run but its state: checked, loaded and on the devices of the mesh.

    Raises:
        UserError: for whatever does not fit together; nothing is left behind then.
    """

    def __init__(self, config: Config):
        check_evaluators(config.run)
        check_updates(config.optim, config.run.steps)
        check_weights(config, *stored_dits(config, config.experts.trains))
        self.mesh = make_mesh(config.mesh)
        self.optimizer = make_optimizer(config.optim, config.run.steps)
        records = RecordReader(config.data.records)
        held_out = self._records_held_out = (
            RecordReader(config.data.validation) if config.data.validation else None
        )
        begun = Path(config.run.out) / matches.FILE
        found = [matches.read(records, config.data.bank, config.data.references, begun)]
        if held_out:
            found.append(matches.read(held_out, config.data.bank, config.data.references))
        references = [each.references(config.data.references) for each in found]
        check(config, self.mesh, [videos for videos, _ in references], *filter(None, (records, held_out)))
        config, sources = with_sources(config, references)
        self.config = config
        self.networks, self.backbone = load_networks(config, self.mesh)
        if sum(x.nbytes for x in self.backbone.values()) <= SMALL:
            compilation.keep_freed_memory()
        self.fingerprint = runs.fingerprint(self.backbone)
        self.state_layout = state_layout(config, self.optimizer, self.mesh)
        with runs.claim(config, self.fingerprint) as (self.folder, self.changes):
            with processes.primary_first():
                if processes.is_primary():
                    found[0].save(self.folder / matches.FILE)
            options = dict(workers=config.data.workers, cache=config.data.cache, sources=sources[0])
            self._training_data = functools.partial(self._stream, records, *references[0], **options)
            self.batches()  # what it does not take is found here
            self._trained_before = self._read_init_from()
        for each in found:
            each.warn_if_stale()
        self.held_out = self._held_out(held_out, *references[1], sources[1]) if held_out else []
        self.batch_layout = batch_layout(config, self.mesh, records.meta.dtype)

    def compile(self) -> tuple[Callable, list[Evaluator]]:
        """The compiled step, and the evaluators if there is anything to measure on; under `jax.set_mesh`."""
        config, layout = self.config, self.state_layout
        step = jit_train_step(config, self.networks, self.optimizer, self.mesh)
        step = compilation.compile_for(step, layout, self.backbone, self.batch_layout)
        return step, make_evaluators(self.subject) if self.subject else []

    @functools.cached_property
    def subject(self) -> Subject | None:
        """The networks and held-out batches to evaluate; None without held-out records."""
        if self._records_held_out is None:
            return None
        return Subject(
            self.config,
            self.mesh,
            self.networks,
            self.backbone,
            (self.state_layout.params, self.state_layout.rest),
            self.held_out,
            self._records_held_out,
        )

    def batches(self, start: int = 0, **options: Any) -> grain.DatasetIterator[Batch]:
        """The batches after the first `start`, for ever.

        Args:
            options: of `training_data`, instead of those of the config.
        """
        return self._training_data(start=start, **options)

    def put(self, batch: Batch) -> Batch:
        """The arrays of a batch on the devices, divided among them."""
        return jax.tree.map(self._divide, batch._replace(ids=None))

    def _divide(self, x: np.ndarray) -> jax.Array:
        """One array on the devices from each process's part of an array of a batch."""
        shape = (self.config.data.batch_size, *x.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(self.mesh), x, shape)

    def initial_state(self) -> TrainState:
        """The state before the first step: with the encoder of `run.init_from`, or a new one, whose gate begins where
        the first batch says. Under `jax.set_mesh`.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.state_layout)
        state = jax.jit(lambda: init_state(self.config, self.optimizer), out_shardings=shardings)()
        memory = self.config.memory
        if self._trained_before is not None:
            params, rest = (
                {name: self._trained_before[name] for name in x} for x in (state.params, state.rest)
            )
            state = state.replace(params=params, rest=rest)
        elif isinstance(memory, MemoryConfig) and memory.gate != "none":
            batch = self.put(with_first_frames(next(self.batches(workers=0)), self.config))
            state = calibrate(self.config, self.networks, self.backbone, state, batch, self.mesh)
        return jax.device_put(state, shardings)

    def _read_init_from(self) -> Arrays | None:
        """The arrays of the encoder in `run.init_from`, if one is named and no checkpoint is there yet.

        Raises:
            UserError: if there is none, or its memory is not the one of the config.
        """
        path = self.config.run.init_from
        if not path or any((self.folder / "checkpoints").glob("[0-9]*")):
            return None
        memory, about = encoder_metadata(path)
        ours, theirs = to_dict(self.config.memory), to_dict(memory)
        # Of what does not show in the arrays' shapes these change nothing about what was learned.
        free = {"dropout", "strength", "gate_share", "latent_grid"}
        different = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        _, arrays = split(load_encoder(path))
        layout = self.state_layout.params | self.state_layout.rest
        shapes = {name: x.shape for name, x in arrays.items()} == {
            name: x.shape for name, x in layout.items()
        }
        if not shapes or set(different) - free:
            raise UserError(
                f"the encoder in {path}, which run.init_from names, is not of the config's memory",
                expected=", ".join(f"memory.{key} = {ours.get(key)}" for key in different),
                found=", ".join(f"memory.{key} = {theirs.get(key)}" for key in different),
                fix="the memory that it was trained with, or another encoder",
            )
        if (backbone := about.get("backbone")) != self.fingerprint and processes.is_primary():
            warn(
                f"the encoder in {path} was trained with another transformer",
                expected=f"one of fingerprint {self.fingerprint}",
                found=backbone,
            )
        return jax.tree.map(np.asarray, arrays)

    def export(self, name: str, state: TrainState, step: int, gains: dict[str, float]) -> Path:
        """Writes the encoder to the run's folder."""
        extra = {"step": step, "gains": gains, "backbone": self.fingerprint}
        video = self.config.video
        extra |= {"expert": self.config.experts.trains}
        extra |= {"video": {"frames": video.frames, "height": video.height, "width": video.width}}
        arrays = all_gather_to_host(state.params | state.rest, self.mesh)
        if processes.is_primary():
            save_encoder(self.folder / name, arrays, self.config.memory, extra)
        return self.folder / name

    def _held_out(
        self, records: RecordReader, bank: References, matches: np.ndarray, sources: np.ndarray | None
    ) -> list[HeldOut]:
        """The batches to validate on, with their own references and with another's."""

        def batches(matches: np.ndarray, sources: np.ndarray | None) -> list[Batch]:
            stream = self._stream(records, bank, matches, epochs=1, sources=sources)
            return list(itertools.islice(stream, self.config.run.validation_batches))

        right = batches(matches, sources)
        places = {entry.id: number for number, entry in enumerate(records.entries)}
        numbers = [[places[id] for id in batch.ids] for batch in right]  # those of this process
        ours, family = list(itertools.chain(*numbers)), relatives(records, bank, matches)
        if sources is not None:  # samples of one source have one memory
            family = np.column_stack([family, len(bank) + sources])
        data, seed = self.config.data, self.config.run.seed
        found = others(records.entries, family, ours, seed, data.kind, data.group)
        of_others = np.full_like(matches, -1)
        of_others[ours] = np.where(found[:, None] >= 0, matches[found], -1)
        if sources is not None:
            sources = sources.copy()
            sources[ours] = sources[found]
        held_out = []
        for batch, other, local in zip(right, batches(of_others, sources), numbers, strict=True):
            batch, other = self.put(with_first_frames(batch, self.config)), self.put(other)
            other = batch._replace(references=other.references, present=other.present, source=other.source)
            whole = all_gather_to_host(self._divide(np.array(local, np.int32)), self.mesh)
            held_out.append(HeldOut(batch, other, [records.entries[number] for number in whole]))
        return held_out

    def _stream(
        self, records: RecordReader, bank: References, index: np.ndarray, **options: Any
    ) -> grain.DatasetIterator[Batch]:
        options |= dict(seed=self.config.run.seed, text_len=self.config.dit.text_len, bank=bank)
        options |= dict(rows=local_rows(self.mesh, self.config.data.batch_size))
        return iter(training_data(records, index, self.config.data.batch_size, **options))


def batch_layout(config: Config, mesh: Mesh, dtype: DTypeLike) -> Batch:
    """Shapes, dtypes and shardings of the arrays of a batch whose records are stored in `dtype`."""
    data, latents, sharding = config.data, config.latent_shape, batch_sharding(mesh)

    def array(*shape: int, dtype: DTypeLike = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((data.batch_size, *shape), dtype, sharding=sharding)

    condition = {name: array(*shape) for name, shape in condition_layout(config).items()}
    return Batch(
        array(*latents),
        Conditioning(array(config.dit.text_len, config.dit.text_dim), **condition),
        array(data.references, *latents),
        array(data.references, dtype=bool),
        source=array(dtype=np.int32) if isinstance(config.memory, FreeTokensConfig) else None,
    )


def with_first_frames(batch: Batch, config: Config) -> Batch:
    """A batch on the host whose samples are given their first frame by chance; its records and the seed decide."""
    probability = config.objective.first_frame
    if probability == 0:
        return batch
    given = np.zeros(batch.latents.shape[:2], bool)
    for row, id in zip(given, batch.ids, strict=True):
        row[0] = np.random.default_rng([config.run.seed, zlib.crc32(id.encode())]).random() < probability
    return batch._replace(conditioning=batch.conditioning._replace(clean=batch.latents, given=given))


def with_sources(
    config: Config, references: Sequence[tuple[References, np.ndarray]]
) -> tuple[Config, list[np.ndarray | None]]:
    """The config with the names of the sources that are to have tokens, if its memory is of such a kind, and numbers.

    Args:
        references: of the records to train on, and of others, as `Matches.references` gives them.
    Returns:
        Also for each set of records the number of each record's source, in `memory.sources`; None without sources.
    Raises:
        UserError: for records of another source than those, or whose references name none.
    """
    memory = config.memory
    if not isinstance(memory, FreeTokensConfig):
        return config, [None] * len(references)
    named = []
    for videos, index in references:
        entries = videos.entries
        named.append([majority_source([entries[place] for place in row], memory.column) for row in index])
    if not memory.sources:
        memory = dataclasses.replace(memory, sources=tuple(sorted(set(named[0]))))
    numbers = [np.array(source_numbers(memory, names), np.int32) for names in named]
    return dataclasses.replace(config, memory=memory), numbers


def load_networks(config: Config, mesh: Mesh) -> tuple[Networks, Arrays]:
    """Structures of the networks, and the frozen weights on the mesh."""
    dit, backbone = split(
        load_dit(
            config, place_on(mesh, "dit"), config.experts.trains, compute_for(config, mesh, training=True)
        )
    )
    return make_networks(config, dit), backbone


def check(config: Config, mesh: Mesh, references: Sequence[References], *streams: RecordReader) -> None:
    """Raises UserError for a mesh, references or records to read batches from that this config cannot train with."""
    check_mesh(config, mesh, config.data.batch_size)
    if config.objective.trains != "memory":
        raise UserError(
            "a run trains a memory: adapters have no validation and no file of their own yet",
            expected="objective.trains 'memory'",
            found=config.objective.trains,
            fix="train.step.jit_train_step, which takes them, in a loop of your own",
        )
    if config.experts.boundary is not None:
        below = objective.share_below(config.objective, config.experts)
        if {"high": 1 - below, "low": below, "both": 1.0}[config.experts.trains] == 0:
            raise UserError(
                "no noise level of objective.density falls to the expert that trains",
                expected=f"some on the {config.experts.trains} side of {config.experts.boundary}",
                fix="another objective.sigma_range, or the other expert",
            )
    expected = (config.latent_shape, config.text.dim)
    for records in (*references, *streams):
        if (found := (records.meta.latents, records.meta.text_dim)) != expected:
            raise UserError(
                f"the records in {records.folder} do not fit the config",
                expected=f"latents {list(expected[0])}, text width {expected[1]}",
                found=f"latents {list(found[0])}, text width {found[1]}",
                fix="encode the videos with this config",
            )
    wanted = condition_layout(config).keys()
    for records in streams:
        if wanted and (found := records[0].condition.keys()) != wanted:
            raise UserError(
                f"the records in {records.folder} lack what the transformer is told of given frames",
                expected=", ".join(sorted(wanted)),
                found=", ".join(sorted(found)) or "latents and text alone",
                fix="encode the videos with this config",
            )
    for records in streams:
        if len(records) < config.data.batch_size:
            raise UserError(
                f"the records in {records.folder} do not fill a batch",
                expected=f"at least data.batch_size = {config.data.batch_size}",
                found=len(records),
                fix="a smaller data.batch_size, or more videos",
            )
