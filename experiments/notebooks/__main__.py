"""Run the notebooks of this folder at their least sizes: `python -m experiments.notebooks [--keep] [--jobs N] [NAME ...]`.

Each is made from its source by jupytext and run by nbclient in an empty folder under build/notebooks, with `SMALL` set.
An error in a cell ends the program. `--keep` writes the notebooks with their outputs beside the sources.
"""

import argparse
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from ditmem_jax.storage.files import write_text

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
WARNING = re.compile(  # of Python: a message, and the line of code that it is about
    r"\S+:\d+: \w*Warning: (?:[^\n]*\n +[^\n]*\n|.*?\n *warnings\.warn\([^\n]*\n)", re.DOTALL
)
TIMEOUT = 1800  # [s] of a cell; at these sizes only one that hangs takes so long


def read(source: Path) -> nbformat.NotebookNode:
    """Return the notebook of a source, without outputs; the same source gives the same notebook."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata.pop("jupytext", None)
    return notebook


def run(source: Path, folder: Path) -> nbformat.NotebookNode:
    """Return the notebook of a source with its outputs, after running it in `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    notebook = read(source)
    environment = {
        "DITMEM_SMALL": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where `ditmem` is
        # Many programs are compiled, and each runs a few times: quickly made ones, and those of one for all.
        "JAX_COMPILATION_CACHE_DIR": str((folder.parent / "compiled").absolute()),
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    client = NotebookClient(
        notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(folder)}}, record_timing=False
    )
    client.execute(env=os.environ | environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _tidy(cell.outputs)
    return notebook


def _tidy(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs as a reader sees them: text in one piece, without colours, bars that were drawn over, and warnings."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "display_data" and output.data.keys() == {"text/html", "text/plain"}:
            text = output.data["text/plain"]  # of rich
            output = nbformat.v4.new_output("stream", name="stdout", text=text)
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.text)  # colours, and where the cursor goes
            text = re.sub(r"[^\n]*\r(?!\n)", "", text)
            output.text = WARNING.sub("", text)
    return [output for output in kept if output.get("text", "-").strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 1_tiny_model; all by default")
    parser.add_argument("--keep", action="store_true", help="write the notebooks beside their sources")
    parser.add_argument("--out", type=Path, default=Path("build/notebooks"), help="folder to run them in")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time")
    arguments = parser.parse_args()
    names = arguments.names or [source.stem for source in SOURCES]
    if unknown := set(names) - {source.stem for source in SOURCES}:
        parser.error(
            f"no notebook {', '.join(sorted(unknown))}; there are {', '.join(s.stem for s in SOURCES)}"
        )

    def make(name: str) -> str:
        start = time.perf_counter()
        notebook = run(FOLDER / f"{name}.py", arguments.out / name)
        target = (FOLDER if arguments.keep else arguments.out) / f"{name}.ipynb"
        write_text(target, nbformat.writes(notebook) + "\n")
        return f"{name}: {time.perf_counter() - start:.0f} s, {target}"

    with ThreadPoolExecutor(arguments.jobs) as pool:  # each waits for a kernel, which is a process
        for told in pool.map(make, names):
            print(told, flush=True)


if __name__ == "__main__":
    main()
