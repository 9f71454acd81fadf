"""Compile the real programs of training or sampling for TPUs that are not there: do they fit, how fast can they be?

    ditmem aot --config wan_14b --topology v5p:2x2x1 --mesh fsdp=4
    ditmem aot --config wan --program sample --topology v5e:2x4 --sweep
    ditmem aot --config wan --program decode --topology v5e:1x1 --batch 1

The TPU compiler (extra tpu) runs on any x86-64 Linux. Nothing is loaded: shapes stand for all arrays. Memory is the
compiler's own statement about one chip; operations, bytes and collectives are read from the compiled program.
"""

import json
import os

from absl import flags

from ditmem_jax.config import flags as cli
from ditmem_jax.errors import UserError


def main() -> None:
    config, program, topology = CONFIG(), PROGRAM.value, TOPOLOGY.value
    if MESH.value and SWEEP.value:
        raise UserError("--sweep tries meshes of its own", found=f"--mesh={MESH.value}", fix="one of the two")

    import jax
    from rich.console import Console

    from ditmem_jax.aot.compile import ENVIRONMENT, examine, parse_mesh, sweep, with_batch
    from ditmem_jax.aot.tables import as_json, as_rows, as_table, mesh_flags

    jax.config.update("jax_platforms", "cpu")  # nothing runs, and a TPU that is here may be in use
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if MESH.value:
        config = parse_mesh(MESH.value, config)
    if SWEEP.value:
        reports = sweep(program, config, topology, BATCH.value)
        if not reports:
            raise UserError(f"no mesh of {topology} takes this config", fix="another --batch or topology")
    else:
        reports = [examine(program, with_batch(config, topology, BATCH.value), topology)]
    if JSON.value:
        print(json.dumps([as_json(report) for report in reports], indent=1))
        return
    console = Console()
    if SWEEP.value:
        console.print(as_rows(reports))
        fits = f"recommended: --mesh {mesh_flags(reports[0]).replace(' ', ',')}" + (
            f" --config.run.remat={reports[0].remat}" if reports[0].remat else ""
        )
        console.print(fits if reports[0].fits else "none fits: more chips, weights in int8, or smaller clips")
    else:
        console.print(as_table(reports[0]))


if __name__ == "__main__":
    CONFIG = cli.define_config()
    PROGRAM = flags.DEFINE_enum(
        "program", "train", ["train", "text", "encode", "memory", "sample", "decode"], "What to compile."
    )
    TOPOLOGY = flags.DEFINE_string(
        "topology", None, "Chips, such as v5e:2x4, v5p:2x2x1, v6e:4x4.", required=True
    )
    MESH = flags.DEFINE_string(
        "mesh", None, "Axes and sizes, such as fsdp=4,context=2, instead of config.mesh."
    )
    BATCH = flags.DEFINE_integer(
        "batch", None, "Clips of a step; by default data.batch_size, or the next that divides over the mesh."
    )
    SWEEP = flags.DEFINE_bool("sweep", False, "Try meshes and remat policies, and recommend one.")
    JSON = flags.DEFINE_bool("json", False, "For programs: a list of reports, best first.")
    cli.run(main)
