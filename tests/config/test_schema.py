"""Configurations are strict: keys, types and values."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from ditmem_jax.config import (
    Config,
    DataConfig,
    DiTConfig,
    ExpertsConfig,
    MemoryConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimConfig,
    SampleConfig,
    VAEConfig,
    VideoConfig,
    build,
    to_dict,
)
from ditmem_jax.config.files import load_config
from ditmem_jax.config.presets import DIT_PRESETS, VAE_PRESETS
from ditmem_jax.errors import UserError, nearest

SMALL = {
    "dit": {"dim": 48, "ffn_dim": 96, "num_heads": 4, "num_layers": 2},
    "memory": {"dim": 48, "num_heads": 4},
}


def small(**parts):
    return build(Config, ConfigDict(SMALL | parts))


def test_values_and_defaults():
    config = small(optim={"learning_rate": 1})
    assert config.dit.num_layers == 2
    assert config.optim == dataclasses.replace(OptimConfig(), learning_rate=1.0)
    assert isinstance(config.optim.learning_rate, float)
    assert config.vae == VAEConfig()


def test_lists_become_tuples():
    config = small(memory=SMALL["memory"] | {"stages": [[8, 7, 4, 2], [8, 3, 1, 2]], "tokens": [1, 2, 3]})
    assert config.memory.stages == ((8, 7, 4, 2), (8, 3, 1, 2))
    assert config.memory.tokens == (1, 2, 3)


def test_there_and_back_through_json():
    config = small(objective={"density": "spectrum", "spectrum": [1, 2]})
    assert build(Config, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("parts", "messages"),
    [
        ({"optm": {}}, ["unknown config key config.optm", "one of: optim"]),
        ({"optim": {"learning_rat": 1.0}}, ["config.optim.learning_rat", "one of: learning_rate"]),
        (
            {"optim": {"learning_rate": "fast"}},
            ["optim.learning_rate has the wrong type", "float", "str 'fast'"],
        ),
        ({"optim": {"warmup": 1.5}}, ["optim.warmup has the wrong type", "int", "float 1.5"]),
        ({"optim": {"warmup": True}}, ["optim.warmup has the wrong type", "bool True"]),
        ({"optim": {"schedule": "linear"}}, ["optim.schedule has an unknown value", "'cosine'", "'linear'"]),
        ({"memory": {"dim": 48, "num_heads": 4, "tokens": [1, 2]}}, ["memory.tokens has the wrong type"]),
        ({"optim": 3}, ["config.optim has the wrong type", "values by name", "3"]),
        ({"memory": {"num_heads": 4}}, ["config.memory lacks dim"]),
        ({"vae": {"mean": [0, "1"]}}, ["vae.mean has the wrong type", "str '1'"]),
    ],
)
def test_bad_keys_and_types(parts, messages):
    with pytest.raises(UserError) as error:
        small(**parts)
    for message in messages:
        assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiTConfig(dim=50, ffn_dim=1, num_heads=4, num_layers=1), "dit.dim"),
        (lambda: DiTConfig(dim=12, ffn_dim=1, num_heads=4, num_layers=1), "heads of even size"),
        (lambda: MemoryConfig(dim=50), "memory.dim"),
        (lambda: MemoryConfig(dim=48, dropout=1.0), "memory.dropout"),
        (lambda: MemoryConfig(dim=48, latent_grid=(21, 4, 4)), "pool the latents away"),
        (
            lambda: DiTConfig(dim=48, ffn_dim=1, num_heads=4, num_layers=1, in_dim=8),
            "at least dit.out_dim = 16",
        ),
        (lambda: VAEConfig(z_dim=8), "vae.mean and vae.std"),
        (lambda: VAEConfig(temporal_downsample=(True,)), "vae.temporal_downsample"),
        (lambda: DataConfig(references=0), "data.references"),
        (lambda: DataConfig(batch_size=0), "data.batch_size"),
        (lambda: ObjectiveConfig(sigma_range=(0.5, 0.5)), "objective.sigma_range"),
        (lambda: ObjectiveConfig(density="spectrum"), "objective.spectrum is no histogram"),
        (lambda: ObjectiveConfig(memory_dropout=1.0), "objective.memory_dropout"),
        (lambda: ExpertsConfig(boundary=875.0), "experts.boundary is a noise level"),
        (lambda: ExpertsConfig(trains="high"), "there is no experts.boundary"),
        (
            lambda: small(experts={"boundary": 0.99, "trains": "high"}),
            "none of run.validation_sigmas falls to the expert",
        ),
        (lambda: SampleConfig(steps=0), "sample.steps"),
        (lambda: SampleConfig(sigmas=(1.0, 1.0)), "sample.sigmas"),
        (lambda: SampleConfig(sigmas=(1.0, 0.0)), "sample.sigmas"),
        (lambda: SampleConfig(sigmas=(1.1,)), "sample.sigmas"),
        (lambda: SampleConfig(strength=-1.0), "sample.strength"),
        (lambda: small(memory={"dim": 64, "num_heads": 4}), "memory.dim must equal dit.dim"),
        (lambda: small(dit=SMALL["dit"] | {"out_dim": 8}), "dit.out_dim must equal vae.z_dim"),
        (lambda: ObjectiveConfig(first_frame=1.1), "objective.first_frame is a probability"),
        (lambda: small(objective={"first_frame": 0.5}), "a transformer that takes clean frames"),
        (
            lambda: small(dit=SMALL["dit"] | {"clean_frames": True, "in_dim": 36}),
            "clean_frames are given among the noisy ones",
        ),
        (lambda: small(dit=SMALL["dit"] | {"in_dim": 35}), "a mask and latents of given frames"),
        (lambda: small(dit=SMALL["dit"] | {"image_dim": 1280}), "as channels"),
        (lambda: small(dit=SMALL["dit"] | {"in_dim": 36, "image_dim": 16}), "the width of clip's tokens"),
        (
            lambda: small(dit=SMALL["dit"] | {"in_dim": 36, "image_dim": 1280, "image_positions": 257}),
            "the tokens of two pictures",
        ),
        (lambda: small(video={"frames": 80}), "4n + 1 frames"),
        (lambda: small(video={"height": 484}), "multiple of 8 pixels"),
        (lambda: small(video={"height": 488}), "patches of the transformer"),
    ],
)
def test_impossible_values(make, message):
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        make()


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("dit", {"num_heads": 0, "ffn_dim": 0, "num_layers": -1, "patch_size": (1, 0, 2), "eps": 0.0}),
        ("memory", {"latent_grid": (0, 4, 4), "tokens": 0, "strength": math.inf, "dropout": math.nan}),
        ("vae", {"std": (0.0,) * 16, "mean": (math.nan,) * 16, "dim": 0, "decoder_dim": -1}),
        ("text", {"num_heads": 7, "dim": 0}),
        ("video", {"fps": 0, "frames": -1, "height": 0, "width": -8}),
        ("data", {"workers": -1, "references": 0, "batch_size": 0}),
        ("objective", {"shift": 0.0, "sigma_range": (math.nan, 1.0), "memory_dropout": -0.1}),
        (
            "optim",
            {"learning_rate": 0.0, "warmup": -3, "weight_decay": -1.0, "clip": math.inf, "accumulate": 0},
        ),
        ("optim", {"learning_rate": math.nan, "b1": 1.0, "b2": 2.0}),
        ("mesh", {"data": 0, "fsdp": -2, "tensor": -1}),  # mesh.data is -1 as well
        ("sample", {"steps": 0, "shift": -2.0, "guidance": math.nan, "guidance_high": math.inf, "seed": -1}),
        ("run", {"steps": 0, "seed": -1, "validation_sigmas": (math.nan,), "keep": 0}),
        ("experts", {"boundary": math.nan}),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(part, values):
    for name, value in values.items():
        with pytest.raises(UserError, match=rf"{part}(\.| .*\b){name}\b"):
            small(**{part: SMALL.get(part, {}) | {name: value}})


def test_grids():
    assert VAEConfig().latent_grid(81, 480, 832) == (21, 60, 104)
    assert VAE_PRESETS["wan2.2"].latent_grid(121, 704, 1280) == (31, 44, 80)
    assert MemoryConfig(dim=1536).feature_grid == (1, 3, 6)  # what the released encoder leaves of it
    assert VideoConfig().frames == 81
    assert MeshConfig().data == -1


def test_a_wrong_number_of_frames_names_the_nearest():
    with pytest.raises(UserError, match="use 81 frames"):
        VAEConfig().latent_grid(80, 480, 832)


def test_presets_are_the_published_sizes():
    assert {config.head_dim for config in DIT_PRESETS.values()} == {128}
    conditions = {name: config.condition_dim for name, config in DIT_PRESETS.items() if config.condition_dim}
    assert conditions == {"wan2.1-i2v-14b": 20, "wan2.1-flf2v-14b": 20, "wan2.2-i2v-a14b": 20}
    assert [name for name, config in DIT_PRESETS.items() if config.clean_frames] == ["wan2.2-ti2v-5b"]
    assert VAE_PRESETS["wan2.1"] == VAEConfig()


WAN = sorted((Path(__file__).parents[2] / "configs").glob("wan*.py"))


@pytest.mark.parametrize("path", WAN, ids=[path.stem for path in WAN])
def test_configs_of_wan_fit_together(path):
    config = load_config(path)
    video = config.video
    assert config.memory.latent_grid == config.vae.latent_grid(video.frames, video.height, video.width)
    assert config.dit in DIT_PRESETS.values() and config.vae in VAE_PRESETS.values()


def test_nearest_names_come_first():
    assert nearest("optm", ["data", "optim", "mesh", "run", "video", "dit"], 2) == "optim, dit and 4 more"
