"""Fakes to evaluate: an untrained encoder with held-out batches, and a sampler of clips whose laws are known."""

import dataclasses

import jax
import numpy as np

from ditmem_jax.config import MeshConfig
from ditmem_jax.data.record import Entry
from ditmem_jax.data.records import RecordReader
from ditmem_jax.evaluate.evaluator import HeldOut, Subject
from ditmem_jax.parallel.mesh import make_mesh
from ditmem_jax.sample.sampler import Sampler
from ditmem_jax.worlds.laws import World
from ditmem_jax.worlds.simulate import sample_clip
from tests.fakes import FakeDiT, batch, networks
from tests.tiny import replace, tiny_config

WORLD = World("zorvex", gravity=5.0, bounciness=0.6, drag=1.2, friction=2.0, stiffness=30.0)
BLANK = np.full((25, 32, 32, 3), 128, np.uint8)


class FakeSampler(Sampler):
    """Makes a pendulum's clip whose gravity is the mean of the references, 8 without any; nothing moves for 0."""

    def __init__(self):
        self.asked, self.encoders = [], []
        self.clips = {0.0: BLANK}
        for gravity in (2.0, 4.0, 8.0):
            world = dataclasses.replace(WORLD, gravity=gravity)
            self.clips[gravity] = sample_clip(np.random.default_rng(1), world, "pendulum").video

    def with_encoder(self, encoder):
        self.encoders.append(float(encoder.factor[...]))
        return self

    def generate(self, prompts, seeds, references=None, sources=None):
        self.asked.append((list(prompts), list(seeds), sources))
        given = [8.0] * len(prompts) if references is None else references.mean(axis=(1, 2, 3, 4, 5)).tolist()
        return np.stack([self.clips[gravity] for gravity in given])


def entry(id, **extra):
    return Entry(id, f"a rod swings, take {id}", "", extra={"phenomenon": "pendulum", "gravity": "4"} | extra)


def held_out(videos, of_others, entries, numbers=None):
    """Samples by the means of their videos and of another's, nan for none."""
    numbers = range(len(entries)) if numbers is None else numbers
    right, wrong = (batch(numbers, given) for given in (videos, of_others))
    return HeldOut(right, right._replace(references=wrong.references, present=wrong.present), entries)


def subject(batches, dit=None, run=None, **parts):
    """The subject of evaluators: an untrained encoder and `dit`."""
    structures, backbone, encoder = networks(dit or FakeDiT())
    arrays = {"factor": encoder["factor"]}, {"calls": encoder["calls"]}
    config = replace(tiny_config("nowhere", **parts), "sample", seed=7, steps=2)
    config = replace(config, "run", **run or {})
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Subject(config, mesh, structures, backbone, arrays, batches, RecordReader.__new__(RecordReader))
