"""Training of memories, seeds side by side in one program, and what their clips and losses show."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ditmem_jax.config import Config
from ditmem_jax.diffusion import flow
from ditmem_jax.diffusion.guidance import guided
from ditmem_jax.models.ditmem import Networks, encode, per_sample_mse
from ditmem_jax.models.state import Arrays, abstract, split
from ditmem_jax.storage.weights import load_dit, new_dit
from ditmem_jax.train.calibration import make_start
from ditmem_jax.train.optimizer import make_optimizer
from ditmem_jax.train.step import init_state, make_encoder, make_train_step
from ditmem_jax.types import Batch, Compute, Conditioning
from experiments.evidence.worlds import Codec, Encoded

AT_ONCE = 100  # steps that one call of the device takes
LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train a memory: changes of the base configuration, and of the data.

    Args:
        changes: values by dotted name, such as {"memory.reading": 16}.
        planets: how many of the training planets.
        mixed: share of samples whose references are any clips of their planet; those of the others are of their own
            phenomenon first, as a search by caption finds them.
        fewest: references per sample are drawn from this number up to `data.references`.
    """

    name: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    planets: int = 96
    mixed: float = 0.0
    fewest: int | None = None

    def config(self, base: Config) -> Config:
        parts = {}
        for name, value in self.changes.items():
            part, field = name.split(".")
            parts.setdefault(part, {})[field] = value
        changed = {part: dataclasses.replace(getattr(base, part), **values) for part, values in parts.items()}
        return dataclasses.replace(base, **changed)


class Study:
    """The frozen transformer, the training clips on the device, and programs that several arms share."""

    def __init__(self, base: Config, train: Encoded, codec: Codec):
        self.base, self.codec = base, codec
        self.empty = jnp.asarray(codec.text([base.sample.negative_prompt]))
        self._dit, self.backbone = split(load_dit(base))
        self.train = {name: jnp.asarray(x) for name, x in vars(train).items()}
        self._compiled: dict[str, Callable] = {}

    def networks(self, config: Config) -> Networks:
        compute = Compute(memory_blocks=config.memory.blocks)
        dit, _ = abstract(lambda: new_dit(config, compute=compute))
        return Networks(dit, abstract(lambda: make_encoder(config))[0])

    # --- training -----------------------------------------------------------------------------------------------

    def fit(
        self, arm: Arm, seeds: Sequence[int], progress: Callable[[str], None] = print
    ) -> tuple[Arrays, dict]:
        """The encoders [seeds, ...] after `run.steps` steps, and the curves of gain by hundred steps."""
        config = arm.config(self.base)
        optimizer, networks = make_optimizer(config.optim, config.run.steps), self.networks(config)
        step, draw = make_train_step(config, networks, optimizer), self._draw(config)

        def begin(seed, data, backbone):
            seeded = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
            # Everything random in a step follows from the number of the step: seeds are far apart.
            state = init_state(seeded, optimizer).replace(step=1_000_000 * seed)
            if config.memory.gate == "none":
                return state
            batch = draw(data, -1 - seed, arm.planets, arm.mixed, self._fewest(arm, config))
            gate = make_start(seeded, networks)(backbone, state.params | state.rest, batch)
            if config.memory.gate == "learned":
                return state.replace(params=state.params | {"reader.gate": gate})
            return state.replace(rest=state.rest | {"reader.fixed_gate": gate})

        start, curve = time.perf_counter(), []
        over_seeds = jax.jit(lambda seeds, *given: jax.lax.map(lambda seed: begin(seed, *given), seeds))
        state = over_seeds(jnp.asarray(seeds, jnp.int32), self.train, self.backbone)
        jax.block_until_ready(state)
        begun = time.perf_counter() - start

        def steps(state, backbone, data, planets, mixed, fewest):
            def one(state, _):
                batch = draw(data, state.step, planets, mixed, fewest)
                state, metrics = step(state, backbone, batch)
                return state, metrics["gain"]

            state, gains = jax.lax.scan(one, state, length=AT_ONCE)
            return state, gains.mean()

        key = repr((dataclasses.replace(config, run=dataclasses.replace(config.run, seed=0)), len(seeds)))
        if key not in self._compiled:
            over = jax.vmap(steps, in_axes=(0, None, None, None, None, None))
            self._compiled[key] = jax.jit(over, donate_argnums=0)
        for _ in range(config.run.steps // AT_ONCE):
            given = jnp.int32(arm.planets), jnp.float32(arm.mixed), jnp.int32(self._fewest(arm, config))
            state, gains = self._compiled[key](state, self.backbone, self.train, *given)
            curve.append(np.asarray(gains))
            if len(curve) == 1:
                first = time.perf_counter() - start
        seconds = time.perf_counter() - start
        if not np.isfinite(curve).all():
            raise RuntimeError(f"{arm.name} broke down")
        each = 1000 * (seconds - first) / max(1, config.run.steps - AT_ONCE)
        progress(
            f"{arm.name}: {config.run.steps} steps x {len(seeds)} seeds in {seconds:.0f} s ({begun:.0f} to begin, "
            f"{first:.0f} to the first hundred, then {each:.1f} ms each), gain {curve[-1].round(3)}"
        )
        gain = np.array(curve).T.round(4).tolist()
        return state.params | state.rest, {"seconds": seconds, "step_ms": each, "gain": gain}

    def _fewest(self, arm: Arm, config: Config) -> int:
        return config.data.references if arm.fewest is None else arm.fewest

    def _draw(self, config: Config) -> Callable[..., Batch]:
        """The pure program (data, number of the step, planets, mixed, fewest) -> batch."""
        size, count = config.data.batch_size, config.data.references

        def draw(data, number, planets, mixed, fewest) -> Batch:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(17), number), 5)
            per_planet = data["members"].shape[1]
            clip = jax.random.randint(keys[0], (size,), 0, planets * per_planet)
            members = data["members"][data["planet"][clip]]
            order = jax.random.uniform(keys[1], members.shape)
            own = data["kind"][members] == data["kind"][clip][:, None]
            apart = jax.random.bernoulli(keys[2], mixed, (size,))
            order = (
                order
                + jnp.where(own | apart[:, None], 0.0, 1.0)
                + jnp.where(members == clip[:, None], 9.0, 0.0)
            )
            chosen = jnp.take_along_axis(members, jnp.argsort(order, axis=1)[:, :count], axis=1)
            given = jax.random.randint(keys[3], (size, 1), fewest, count + 1)
            present = jnp.arange(count)[None] < given
            references = jnp.where(present[:, :, None, None, None, None], data["latents"][chosen], 0)
            return Batch(data["latents"][clip], Conditioning(data["text"][clip]), references, present)

        return draw

    # --- clips --------------------------------------------------------------------------------------------------

    def videos(
        self,
        config: Config,
        encoders: Arrays | None,
        texts: np.ndarray,
        references: np.ndarray | None,
        seeds: Sequence[int],
        present: np.ndarray | None = None,
    ) -> np.ndarray:
        """Clips [seeds, n, T, H, W, 3] of prompts, all at once; without references without memory.

        Args:
            encoders: one for each seed of noise, or None.
            texts: embeddings [n, L, E].
            references: latents [n, R, T, H, W, C].
        """
        networks, settings = self.networks(config), config.sample
        count = len(texts)
        sigmas = np.float32(flow.shifted_sigmas(settings.steps, settings.shift))
        changes = np.float32(flow.euler_steps(np.float64(sigmas)))
        low, high = settings.memory_range

        def clips(backbone, encoder, texts, references, present, noise):
            dit, memory = networks.dit.merge(backbone), None
            if references is not None:
                memory = encode(
                    networks.encoder.merge(encoder), Batch(noise, Conditioning(texts), references, present)
                )
            negative = Conditioning(jnp.repeat(self.empty, count, axis=0))

            def step(x, level):
                sigma, change = level
                read = memory
                if memory is not None:
                    closed = (sigma < low) | (sigma > high)
                    read = memory._replace(bias=jnp.where(closed, -jnp.inf, memory.bias))
                velocity = guided(
                    dit, Conditioning(texts), negative, read, settings.guidance,
                    memory_in_negative=settings.memory_in_negative,
                )  # fmt: skip
                return x + change * velocity(x, sigma), None

            return jax.lax.scan(step, noise, (sigmas, changes))[0]

        key = repr(("clips", config.memory, config.sample, count, references is None))
        if key not in self._compiled:
            self._compiled[key] = jax.jit(clips)
        made = []
        if references is not None:
            references = jnp.asarray(references)
            present = jnp.ones(references.shape[:2], bool) if present is None else jnp.asarray(present)
        for row, seed in enumerate(seeds):
            noise = jax.random.normal(jax.random.key(seed), (count, *config.latent_shape))
            encoder = None if encoders is None else jax.tree.map(lambda x, row=row: x[row], encoders)
            latents = self._compiled[key](
                self.backbone, encoder, jnp.asarray(texts), references, present, noise
            )
            made.append(self.codec.videos(np.asarray(latents)))
        return np.stack(made)

    # --- losses -------------------------------------------------------------------------------------------------

    def losses(
        self, config: Config, encoders: Arrays, data: Encoded, references: np.ndarray, batch: int = 48
    ) -> np.ndarray:
        """Squared errors [seeds, levels, clips, (without, with)] of held-out clips under fixed noise."""
        networks = self.networks(config)
        low, high = config.sample.memory_range

        def errors(backbone, encoder, latents, text, references, key):
            dit = networks.dit.merge(backbone)
            given = Batch(latents, Conditioning(text), references, jnp.ones(references.shape[:2], bool))
            memory = encode(networks.encoder.merge(encoder), given)

            def at_level(level):
                sigma, key = level
                noise = jax.random.normal(key, latents.shape)
                levels = jnp.full((len(latents),), sigma)
                closed = (sigma < low) | (sigma > high)
                read = memory._replace(bias=jnp.where(closed, -jnp.inf, memory.bias))
                return jnp.stack(
                    [per_sample_mse(dit, m, given, levels, noise) for m in (None, read)], axis=-1
                )

            return jax.lax.map(at_level, (jnp.asarray(LEVELS), jax.random.split(key, len(LEVELS))))

        key = repr(("losses", config.memory, config.sample.memory_range, data.latents.shape))
        if key not in self._compiled:
            self._compiled[key] = jax.jit(errors)
        run, found = self._compiled[key], []
        for row in range(len(jax.tree.leaves(encoders)[0])):
            encoder = jax.tree.map(lambda x, row=row: x[row], encoders)
            parts = []
            for start in range(0, len(references) - batch + 1, batch):
                chosen = np.arange(start, start + batch)
                parts.append(
                    run(
                        self.backbone, encoder, data.latents[chosen], data.text[chosen],
                        data.latents[references[chosen]], jax.random.key(start),
                    )
                )  # fmt: skip
            found.append(np.concatenate(parts, axis=1))
        return np.stack(found)


def held_out_references(data: Encoded, count: int, seed: int = 0) -> np.ndarray:
    """For each clip others of its planet, those of its phenomenon first."""
    rng, found = np.random.default_rng(seed), []
    for clip, planet in enumerate(data.planet):
        members = rng.permutation(data.members[planet])
        order = sorted((m for m in members if m != clip), key=lambda m: data.kind[m] != data.kind[clip])
        found.append(order[:count])
    return np.array(found)
