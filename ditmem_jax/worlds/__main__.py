"""Write clips of made-up worlds whose laws are known: mp4 files and a table of captions.

ditmem worlds --out planets
ditmem worlds --out unseen --split unseen --worlds 24 --clips 6
"""

from pathlib import Path

from absl import flags

from ditmem_jax.config import flags as cli


def main() -> None:
    from ditmem_jax.worlds.make import make

    count = make(Path(OUT.value), split=SPLIT.value, worlds=WORLDS.value, clips=CLIPS.value, seed=SEED.value)
    print(f"{count} clips of {WORLDS.value} worlds in {OUT.value}")


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", None, "Folder for videos/*.mp4 and captions.csv.", required=True)
    SPLIT = flags.DEFINE_enum(
        "split",
        "train",
        ["backbone", "train", "unseen"],
        "Which worlds; backbone worlds are never named in captions.",
    )
    WORLDS = flags.DEFINE_integer("worlds", 32, "Number of worlds.", lower_bound=1)
    CLIPS = flags.DEFINE_integer("clips", 12, "Clips per world, the phenomena in turn.", lower_bound=1)
    SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same worlds and clips.", lower_bound=0)
    cli.run(main)
