"""Make clips from prompts, with and without memory, and beside each a JSON file about its making.

    ditmem sample --config tiny --config.data.bank=bank --encoder runs/tiny/encoder.safetensors \\
        --prompt "on planet Zorvex a ball drops" --count 2 --out clips
    ditmem sample --config tiny --memory none --prompt "on planet Zorvex a ball drops" --out clips/plain.mp4
    ditmem sample --config wan22_5b --memory none --first_frame ball.jpg --prompt "the ball falls"

The memory is made of the videos that the bank finds for the prompt, or of those that --memory names.
"""

import dataclasses

from absl import flags

from ditmem_jax.config import flags as cli
from ditmem_jax.errors import UserError


def main() -> None:
    config = CONFIG()
    given = {"strength": STRENGTH.value, "seed": SEED.value}
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, **given))
    memory = MEMORY.value
    if memory not in ("auto", "none"):
        memory = [name.strip() for name in memory.split(",")]
    seeds = range(config.sample.seed, config.sample.seed + COUNT.value)

    from ditmem_jax.conditions.files import read_frames
    from ditmem_jax.parallel import compilation, processes
    from ditmem_jax.sample.clips import make_clips
    from ditmem_jax.sample.requests import read_requests

    prompts = [*(PROMPT.value or ()), *(read_requests(PROMPTS.value) if PROMPTS.value else ())]
    if not prompts:
        raise UserError("nothing is asked for", expected="--prompt=TEXT, or --prompts=FILE")
    compilation.enable_cache(CACHE.value)
    with processes.Program(**PROCESSES()):
        frames = read_frames(config, FIRST_FRAME.value, LAST_FRAME.value, CONTINUE.value, GIVEN_FRAMES.value)
        options = dict(features=FEATURES.value, frames=frames, warm=WARM.value)
        make_clips(config, prompts, OUT.value, ENCODER.value or None, memory, seeds, **options)
        if WARM.value and processes.is_primary():
            print("all is compiled")


if __name__ == "__main__":
    CONFIG = cli.define_config()
    CACHE, PROCESSES = cli.define_compile_cache(), cli.define_processes()
    ENCODER = flags.DEFINE_list(
        "encoder",
        None,
        "File of a trained memory encoder; FILE,FILE for one of each expert; --memory=none needs none.",
    )
    PROMPT = flags.DEFINE_multi_string("prompt", None, "What the clip shows; may be given more than once.")
    PROMPTS = flags.DEFINE_string(
        "prompts",
        None,
        "File of prompts: a text with one a line, CSV or JSON lines with prompt, seed, memory, strength.",
    )
    MEMORY = flags.DEFINE_string(
        "memory", "auto", "auto: what the bank finds for the prompt; none; or ids as ID,ID."
    )
    FEATURES = flags.DEFINE_string(
        "features",
        None,
        "What ditmem bank tokens made of the bank with this encoder; saves reading latents.",
    )
    FIRST_FRAME = flags.DEFINE_string("first_frame", None, "Picture that the clips begin with.")
    LAST_FRAME = flags.DEFINE_string("last_frame", None, "Picture that the clips end with.")
    CONTINUE = flags.DEFINE_string("continue", None, "Video whose first frames the clips begin with.")
    GIVEN_FRAMES = flags.DEFINE_integer(
        "given_frames",
        None,
        "Frames of --continue, at the rate of config.video.fps; 5 by default.",
        lower_bound=1,
    )
    COUNT = flags.DEFINE_integer(
        "count", 1, "Number of clips of a prompt, with seeds from the first on.", lower_bound=1
    )
    SEED = flags.DEFINE_integer(
        "seed", None, "Seed of the first clip, instead of sample.seed.", lower_bound=0
    )
    STRENGTH = flags.DEFINE_float(
        "strength", None, "Weight of the memory, instead of sample.strength; 0 is none."
    )
    WARM = flags.DEFINE_bool("warm", False, "Compile everything, into --compile_cache, and make no clip.")
    OUT = flags.DEFINE_string("out", "samples", "Folder for the clips, or one clip.mp4.")
    cli.run(main)
