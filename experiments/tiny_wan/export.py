"""Writes the trained networks in original Wan names: `python -m experiments.tiny_wan.export`.

The transformer goes to bfloat16, the dtype that it is frozen in; VAE and text encoder stay float32.
"""

import dataclasses
import json
import shutil

import ml_dtypes
from absl import app
from safetensors.numpy import load_file, save_file

from ditmem_jax.convert import dit, umt5, vae
from ditmem_jax.convert.original import original
from experiments.tiny_wan.common import BUILD, DIT_CONFIG, TEXT_CONFIG, VAE_CONFIG, WEIGHTS


def main(_) -> None:
    statistics = json.loads((BUILD / "latent_stats.json").read_text())
    vae_config = dataclasses.replace(VAE_CONFIG, **{key: tuple(value) for key, value in statistics.items()})
    WEIGHTS.mkdir(exist_ok=True)
    networks = {"dit": dit.table(DIT_CONFIG), "vae": vae.table(vae_config), "text": umt5.table()}
    for name, table in networks.items():
        tensors = original(table, load_file(BUILD / f"{name}.safetensors"))
        if name == "dit":
            tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}
        save_file(tensors, WEIGHTS / f"{name}.safetensors")
    shutil.copyfile(BUILD / "tokenizer.json", WEIGHTS / "tokenizer.json")
    config = {
        "model_type": "t2v",
        **dataclasses.asdict(DIT_CONFIG),
        "vae": dataclasses.asdict(vae_config),
        "text": dataclasses.asdict(TEXT_CONFIG),
    }
    (WEIGHTS / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for path in sorted(WEIGHTS.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")


if __name__ == "__main__":
    app.run(main)
