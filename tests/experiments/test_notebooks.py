"""Notebooks: each is that of its source, its commands and flags exist, and what was kept is of a run that went through."""

import json
import re
import shlex
from pathlib import Path

import jupytext
import pytest

from tests.test_snippets import module_of, parse

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "experiments/notebooks").glob("[0-9]*.py"))
of_each = pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])


def kept(source):
    return json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))


def cells(source):
    return [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]


def test_there_are_four():
    assert [source.stem[:2] for source in SOURCES] == ["1_", "2_", "3_", "4_"]


@of_each
def test_the_notebook_is_that_of_its_source(source):
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in kept(source)["cells"]] == cells(source)


@of_each
def test_outputs_are_of_one_run_from_top_to_bottom_without_errors_or_places_of_that_machine(source):
    code = [cell for cell in kept(source)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = json.dumps([output.get("text") or output["data"].get("text/html") for output in outputs])
    assert not re.search(r"(?<![\w.$}])/(work|tmp|root|home|usr|opt)/", text)


@of_each
def test_switches_and_installation_are_the_same_but_for_the_extra(source):
    def first(source):
        texts = [text for _, text in cells(source)[1:4]]
        return [re.sub(r"^(EXTRA = ).*$", r"\1", text, flags=re.MULTILINE) for text in texts]

    assert first(source) == first(SOURCES[0])


def commands(text):
    """The words of each of our commands in a cell for bash, variables filled in."""
    values = {"CONFIG": "tiny", "SHORT": "", "ENCODE": "", "common": "", "program": "text"}
    text = re.sub(r"\$(\w+)", lambda found: values.get(found[1], "1"), text)
    for part in re.split(r"\n|;|\|+|&&|\{|\bthen\b|\bdo\b", text.replace("\\\n", " ")):
        if part.split()[:1] == ["ditmem"]:  # others may be halves of what stood in quotation marks
            yield shlex.split(part.strip(), comments=True)


@of_each
def test_commands_and_their_flags_exist(source, monkeypatch):
    monkeypatch.chdir(ROOT)
    for kind, text in cells(source):
        if kind == "code" and text.startswith("%%bash"):
            for words in commands(text):
                parse(*module_of(words), monkeypatch)


def test_the_readme_links_to_each():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for source in SOURCES:
        assert f"(experiments/notebooks/{source.stem}.ipynb)" in readme
