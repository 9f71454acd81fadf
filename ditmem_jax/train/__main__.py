"""Trains a memory encoder against a frozen transformer: `python -m ditmem_jax.train --config configs/tiny.py`.

One jitted step for any mesh. The encoder's weights are float32 and its optimiser's state lies beside them; the
transformer's are an argument of their own that is neither differentiated nor given away. Everything random in a
step comes from the seed and the number of the step, and the data's position is in every checkpoint, so a run
that was killed and started again ends bit for bit where it would have ended.
"""

from absl import flags

from ditmem_jax.config import flags as cli
from ditmem_jax.parallel import compilation, processes
from ditmem_jax.train.loop import train_memory


def main() -> None:
    config = cli.load_config(CONFIG)
    compilation.enable_cache(CACHE.value)
    with processes.Program(**PROCESSES()):
        path = train_memory(config, warm=WARM.value)
        if processes.is_primary():
            print(f"all is compiled for the run in {path}" if WARM.value else f"the encoder is in {path}")


if __name__ == "__main__":
    CONFIG = cli.define_config()
    CACHE, PROCESSES = cli.define_compile_cache(), cli.define_processes()
    WARM = flags.DEFINE_bool("warm", False, "Compile everything, into --compile_cache, and make no step.")
    cli.run(main)
