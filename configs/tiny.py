"""The tiny Wan that ships with the project: trains on a laptop. Its weights are converted on first use."""

from importlib.resources import files

from ml_collections import ConfigDict

from ditmem_jax.convert.folder import converted
from ditmem_jax.storage.weights import read_networks


def get_config() -> ConfigDict:
    weights = converted(files("ditmem_jax.tiny_weights"))
    config = ConfigDict(read_networks(weights))  # dit, vae and text, as they were trained
    config.weights = ConfigDict(dict(path=weights, dtype="float32"))
    config.video = ConfigDict(dict(frames=25, height=32, width=32, fps=16, trained=(25, 32, 32)))
    config.memory = ConfigDict(
        dict(
            dim=config.dit.dim,
            in_dim=config.vae.z_dim,
            stages=((64, 3, 1, 2), (96, 3, 1, 1)),
            latent_grid=(7, 4, 4),
            filter="radial",
            tokens=(3, 1, 1),
            norm="group",
            dropout=0.1,
            num_layers=config.dit.num_layers,
            gate="learned",
            reading=16,
        )
    )
    config.data = ConfigDict(
        dict(
            records="demo/records/train",
            bank="demo/bank",
            kind="phenomenon",
            group="world",
            references=3,
            batch_size=32,
            cache=True,
        )
    )
    config.objective = ConfigDict(
        dict(kind="running", density="uniform", sigma_range=(0.5, 1.0), memory_dropout=0.1)
    )
    config.optim = ConfigDict(
        dict(kind="muon", learning_rate=3e-3, schedule="cosine", warmup=50, b2=0.99, gate_rate=10.0)
    )
    config.sample = ConfigDict(
        dict(
            steps=30,
            shift=3.0,
            guidance=2.0,
            memory_in_negative=False,
            memory_range=(0.5, 1.0),
            min_score=0.5,  # clips of the planet in the prompt score above 0.8, those of others below 0.2
        )
    )
    config.run = ConfigDict(
        dict(
            out="runs/tiny",
            steps=3000,
            remat="products",
            validation_sigmas=(0.1, 0.2, 0.4, 0.6, 0.8, 0.95),
        )
    )
    return config
