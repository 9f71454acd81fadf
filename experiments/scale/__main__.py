"""The table of this folder: `python -m experiments.scale [MODEL]` compiles what results.json does not hold yet.

Each program is compiled by a command of its own, so that its compile time can be compared. All of them take more than
an hour on two cores; results.json and the table are written after each.
"""

import json
import subprocess
import sys
from pathlib import Path

from ditmem_jax.storage.files import write_text

FOLDER = Path(__file__).parent
SMALL = ("video.height=480", "video.width=832", "memory.latent_grid=(21,60,104)")
INT8 = ("weights.dtype=int8",)
MODELS = {  # config and overrides
    "1.3B, 480p": ("configs/wan.py",),
    "5B, 704p": ("configs/wan22_5b.py",),
    "14B, 480p": ("configs/wan_14b.py", *SMALL),
    "14B int8, 480p": ("configs/wan_14b.py", *SMALL, *INT8),
    "14B, 720p": ("configs/wan_14b.py",),
    "2 x 14B, 720p": ("configs/wan22_a14b.py",),
}
PLACES = (  # model, topology, mesh
    ("14B, 480p", "v5p:2x2x1", "fsdp=4"),
    ("14B, 720p", "v5p:2x4x4", "fsdp=8,context=4"),
    ("1.3B, 480p", "v5e:2x4", "fsdp=8"),
    ("14B int8, 480p", "v5e:4x4", "fsdp=4,context=4"),
    ("14B, 480p", "v6e:4x4", "fsdp=4,context=4"),
    ("1.3B, 480p", "v5p:2x2x1", "fsdp=4"),
    ("1.3B, 480p", "v6e:2x4", "fsdp=8"),
    ("5B, 704p", "v5e:4x4", "fsdp=4,context=4"),
    ("5B, 704p", "v5p:2x2x1", "fsdp=4"),
    ("5B, 704p", "v6e:2x4", "fsdp=8"),
    ("14B, 720p", "v5e:8x8", "fsdp=4,context=16"),
    ("14B, 720p", "v6e:4x8", "fsdp=4,context=8"),
    ("2 x 14B, 720p", "v5e:8x8", "fsdp=4,context=16"),
    ("2 x 14B, 720p", "v5p:2x4x4", "fsdp=8,context=4"),
    ("2 x 14B, 720p", "v6e:4x8", "fsdp=4,context=8"),
)
HEADER = (
    "| model | chips | mesh | program | batch | GiB a chip | at best, s | by | compile, s |\n"
    + "|---" * 9
    + "|"
)


def command(model: str, topology: str, mesh: str, program: str) -> list[str]:
    config, *overrides = MODELS[model]
    values = [f"--config.{value}" for value in overrides]
    return ["--config", config, *values, "--topology", topology, "--mesh", mesh, "--program", program]


def row(model: str, topology: str, mesh: str, program: str, report: dict) -> str:
    cells = [model, topology, mesh.replace(",", " "), program, report["batch"]]
    if report["fits"]:
        best = report["at_best"]
        used = f"{report['total_memory'] / 2**30:.1f} of {report['hbm'] / 2**30:.1f}"
        cells += [used, f"{best['seconds']:.2f}", best["limit"]]
    else:
        cells += ["does not fit", "", ""]
    return "| " + " | ".join(map(str, [*cells, round(report["compile_seconds"])])) + " |"


def write_table(results: dict) -> None:
    programs = [(*place, program) for place in PLACES for program in ("train", "sample")]
    known = {each: results.get(" ".join(command(*each))) for each in programs}
    table = "\n".join([HEADER, *(row(*each, report) for each, report in known.items() if report)])
    readme = FOLDER / "README.md"
    before, rest = readme.read_text().split("<!-- table -->\n", 1)
    after = rest.split("<!-- end -->", 1)[1]
    write_text(readme, f"{before}<!-- table -->\n{table}\n<!-- end -->{after}")


def main() -> None:
    file = FOLDER / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for place in PLACES:
        for program in ("train", "sample"):
            arguments = command(*place, program)
            key = " ".join(arguments)
            if key in results or (sys.argv[1:] and place[0] not in sys.argv[1:]):
                continue
            print(f"ditmem aot {key}", flush=True)
            done = subprocess.run(
                [sys.executable, "-m", "ditmem_jax.aot", *arguments, "--json"],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            results[key] = json.loads(done.stdout)[0]
            write_text(file, json.dumps(results, indent=1) + "\n")
            write_table(results)
    write_table(results)


if __name__ == "__main__":
    main()
