"""The snippets of the README and the pages: Python runs, and every command and flag exists."""

import importlib
import inspect
import multiprocessing
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from absl import app, flags
from absl.testing import flagsaver
from flax import nnx
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser

import ditmem_jax as dm
from ditmem_jax.bank import matches
from ditmem_jax.cli import COMMANDS, EXAMPLES
from ditmem_jax.config import files
from ditmem_jax.config import flags as cli
from ditmem_jax.data.records import RecordReader
from ditmem_jax.models.memory_encoder import MemoryEncoder
from ditmem_jax.models.state import abstract
from ditmem_jax.parallel import compilation
from ditmem_jax.storage.encoders import save_encoder
from ditmem_jax.worlds.make import make
from tests import FAST_COMPILATION
from tests.tiny import random_arrays, tiny_config, write_original

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("convert/**/*.md")]
MODULES = {f"ditmem_jax.{command}" for command in COMMANDS} | {"convert"}


def blocks(page, language):
    return list(Document.parse(str(page), CodeBlockParser(language=language, evaluator=lambda _: None)))


def pages_with(language):
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


# --- Python -----------------------------------------------------------------------------------------------------


def prepare(folder):
    """Write videos of two planets, their records, an encoder without training and weights to convert."""
    compilation.enable_cache(str(folder / "compiled"))  # pages compile the same programs
    make(folder, split="train", worlds=2, clips=6, seed=0)
    config = dm.load_config("tiny")
    dm.encode_videos(config, folder / "records", folder / "videos", folder / "captions.csv", batch=6)
    arrays = random_arrays(abstract(lambda: MemoryEncoder(config.memory, rngs=nnx.Rngs(0)))[1])
    (folder / "runs/tiny").mkdir(parents=True)
    save_encoder(folder / "runs/tiny/encoder.safetensors", arrays, config.memory, {})
    write_original(folder / "original", tiny_config(folder))


def run(page, prepared, folder):
    """Run the blocks of a page in order, in a copy of what was prepared, with a bank."""
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("compiled"))
    os.chdir(folder)
    bank = dm.Bank.build("bank", "records")
    matches.find(RecordReader("records"), bank, k=3).save("records/matches.parquet")
    names = {}
    for block in blocks(page, "python"):
        text = "\n" * block.line + str(block.parsed)  # errors name lines of the page
        exec(compile(text, str(page), "exec"), names)


@pytest.fixture(scope="module")
def user():
    """A process with the numerics and the devices that a user has, not those of tests."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XLA_FLAGS", FAST_COMPILATION)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield process


@pytest.fixture(scope="module")
def prepared(user, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    user.submit(prepare, folder).result()
    return folder


@pytest.mark.slow
@pages_with("python")
def test_python_runs(page, user, prepared, tmp_path):
    user.submit(run, page, prepared, tmp_path / "here").result()


# --- commands ---------------------------------------------------------------------------------------------------


def commands(text):
    """The commands of a shell block, word by word; those of a pipe or behind && are commands of their own."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
            yield words[:end]
            words = words[end + 1 :]


def module_of(words):
    """The module of a command of ours and its arguments; None for another program."""
    match words:
        case ["python", "-m", module, *rest] if re.match(r"(ditmem_jax|convert)(\.|$)", module):
            return module, rest
        case ["ditmem", command, *rest]:
            return f"ditmem_jax.{command}", rest
    return None


def parse(module, arguments, monkeypatch):
    """Parse the arguments as the command does, and build its config."""
    assert module in MODULES, f"no command {module}"

    def find(line, given):
        line.find(given)
        if "config" in flags.FLAGS and flags.FLAGS.config:
            files.load_config(flags.FLAGS.config, flags.FLAGS.set)

    monkeypatch.setattr(app, "run", lambda main, argv, flags_parser: main(flags_parser(argv)))
    monkeypatch.setattr(cli._CommandLine, "run", find)
    monkeypatch.setattr("sys.argv", [module, *arguments])
    with flagsaver.flagsaver(), warnings.catch_warnings():  # removes the flags that the command defines
        warnings.simplefilter("ignore", RuntimeWarning)  # that a test has imported it before
        runpy.run_module(module, run_name="__main__")


@pages_with("sh")
def test_commands_and_their_flags_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for block in blocks(page, "sh"):
        for words in commands(str(block.parsed)):
            if found := module_of(words):
                parse(*found, monkeypatch)
            if words[0] == "make":
                named = {word for word in words[1:] if "=" not in word}
                assert named <= targets, f"no target {named - targets}"


def examples():
    """The examples that help shows."""
    modules = [importlib.import_module(f"ditmem_jax.{command}.__main__") for command in COMMANDS]
    subcommands = [each.main for module in modules for each in getattr(module, "COMMANDS", {}).values()]
    for text in (EXAMPLES, *(named.__doc__ for named in (*modules, *subcommands))):
        paragraphs = [
            part for part in inspect.cleandoc(text).split("\n\n") if part.lstrip().startswith("ditmem ")
        ]
        assert paragraphs, text
        yield from (words for part in paragraphs for words in commands(part))


@pytest.mark.parametrize("words", examples(), ids=" ".join)
def test_the_examples_of_help_exist(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse(*module_of(words), monkeypatch)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("ditmem encod --out records", AssertionError),
        ("ditmem encode --out records --videoz videos", SystemExit),
        ("python -m ditmem_jax.bank finds --bank bank", SystemExit),
        ("ditmem bank search --bank bank --port 80", SystemExit),
        ("ditmem train --config tiny --config.optim.rate=1", SystemExit),
    ],
)
def test_what_does_not_exist_is_found(line, error, monkeypatch):
    (words,) = commands(line)
    with pytest.raises(error):
        parse(*module_of(words), monkeypatch)


# --- names ------------------------------------------------------------------------------------------------------


def test_what_pages_refer_to_exists():
    """As `make docs` would find, which needs more packages."""
    patterns = (r"^::: (\S+)$", r"\]\[([\w.]+)\]", r"\[`([\w.]+)`\]\[\]")
    text = "\n".join(page.read_text(encoding="utf-8") for page in ROOT.glob("docs/**/*.md"))
    names = {name for pattern in patterns for name in re.findall(pattern, text, flags=re.MULTILINE)}
    assert len(names) > 50
    for name in names:
        assert pkgutil.resolve_name(
            name.replace("convert.", "ditmem_jax.convert.", 1) if name.startswith("convert") else name
        )
