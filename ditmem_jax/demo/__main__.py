"""Made-up planets from clips to a page: does a memory teach a frozen video model the laws of planets it never saw?

    ditmem demo
    ditmem demo --quick --out quick

Makes clips of made-up planets, encodes them, trains a memory encoder, makes clips of unseen planets with and
without memory, measures their physics, and writes a table and a page. The same command goes on where it was stopped.
"""

import dataclasses
from pathlib import Path

from absl import flags

from ditmem_jax.config import flags as cli


def main() -> None:
    config = CONFIG()

    from rich.console import Console

    from ditmem_jax.demo.stages import FEW, Demo, Settings

    settings = FEW if QUICK.value else Settings(config.run.steps)
    if STEPS.value:
        settings = dataclasses.replace(settings, steps=STEPS.value)
    options = [f"--config={flags.FLAGS.config}", *(f"--config.{value}" for value in flags.FLAGS.set)]
    Demo(Path(OUT.value), config, settings, options, Console()).run()


if __name__ == "__main__":
    CONFIG = cli.define_config("tiny")
    OUT = flags.DEFINE_string("out", "demo", "Folder for everything that is made.")
    STEPS = flags.DEFINE_integer("steps", None, "Training steps, instead of run.steps.", lower_bound=1)
    QUICK = flags.DEFINE_bool(
        "quick", False, "A few planets and steps: shows that all parts work, finds nothing."
    )
    cli.run(main)
