"""Train a memory encoder against a frozen transformer.

    ditmem train --config tiny --config.data.records=records --config.data.bank=bank
    ditmem train --config wan --config.optim.learning_rate=1e-4 --config.mesh.fsdp=8

The records must have been matched with the bank, see ditmem bank match --help. The folder of a run, config.run.out,
gets its curves, checkpoints and the trained encoder. The same command continues a run that was stopped, and ends bit
for bit where it would have ended. On several hosts each runs the same command.
"""

from absl import flags

from ditmem_jax.config import flags as cli


def main() -> None:
    config = CONFIG()

    from ditmem_jax.parallel import compilation, processes
    from ditmem_jax.train.loop import train_memory

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
