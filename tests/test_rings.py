"""The layers of the library: who may import whom, and that the README's map is the tree."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "ditmem_jax"

# A home is a file or a package of the library. It imports from homes of lower rings only.
RINGS = (
    ("types", "errors", "strict", "flow", "config", "presets", "cli"),
    ("sharding", "startup"),
    (
        *("data", "bank", "worlds", "objective"),
        *("models.layers", "models.attention", "models.kernels", "models.ring", "models.state"),
    ),
    ("models.dit", "models.memory", "models.vae", "models.umt5"),
    ("models.ditmem", "checkpoint", "bank.features"),
    ("encode", "encoder", "engines", "runs", "validate", "train", "sampler", "sample"),
    ("report", "gallery", "aot", "roof"),
    ("bank.__main__",),  # its commands reach further than the bank
)
# What else it may import, from its own ring.
BESIDE = {
    "strict": {"errors"},
    "flow": {"errors"},
    "config": {"errors", "strict", "flow"},
    "presets": {"config"},
    "cli": {"config", "errors"},
    "bank": {"data"},
    "bank.features": {"checkpoint"},
    "models.attention": {"models.kernels", "models.ring"},
    "models.ring": {"models.kernels"},
    "worlds": {"data"},
    "engines": {"encoder"},
    "encode": {"encoder", "engines"},
    "train": {"runs", "validate"},
    "sample": {"sampler"},
    "aot": {"roof"},
    "validate": {"runs"},
    "gallery": {"report"},
}
# Imported where it is needed, by this file only.
LATE = {"data.torch_files": {"torch"}}
FOREIGN = {"torch", "tensorflow", "tensorflow_io", "transformers", "diffusers"}
OUTSIDE = {"configs", "convert", "experiments", "tests"}

RING_OF = {home: ring for ring, homes in enumerate(RINGS) for home in homes}
FILES = sorted(path for path in LIBRARY.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(source: str) -> Iterator[str]:
    """Dotted names of everything that the source imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def home_of(module: str) -> str | None:
    """The home that a dotted name inside the library belongs to."""
    names = [home for home in RING_OF if f"{module}.".startswith(f"{home}.")]
    return max(names, key=len, default=None)


def violations(module: str, source: str) -> list[str]:
    home, found = home_of(module), []
    for name in imported(source):
        first, _, rest = name.partition(".")
        if first in (FOREIGN | OUTSIDE) - LATE.get(module, set()):
            found.append(f"{module} imports {name}, which the library never does")
        if first != "ditmem_jax":
            continue
        other = home_of(rest)
        if other is None:
            found.append(f"{module} imports {name}, which has no home in RINGS")
        elif home is None:
            found.append(f"{module or 'ditmem_jax'} imports {name}; a package of homes imports nothing")
        elif other != home and RING_OF[other] >= RING_OF[home] and other not in BESIDE.get(home, ()):
            found.append(f"{module} (ring {RING_OF[home]}) imports {name} (ring {RING_OF[other]})")
    return found


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) or "ditmem_jax" for path in FILES])
def test_imports_point_inwards(path):
    module = module_name(path)
    assert home_of(module) or module in ("", "models"), f"{module} has no home in RINGS"
    assert violations(module, path.read_text()) == []


def test_violations_are_found():
    for module, source in (
        ("flow", "from ditmem_jax import train"),
        ("flow", "from ditmem_jax.sharding import make_mesh"),
        ("models.dit", "import ditmem_jax.checkpoint"),
        ("models.dit", "def f():\n    from ditmem_jax.models.vae import VAE"),
        ("sample", "def f():\n    import torch.nn"),
        ("data.video", "from convert import engine"),
        ("", "from ditmem_jax import flow"),
        ("flow", "from ditmem_jax import nowhere"),
    ):
        assert len(violations(module, source)) == 1, (module, source)
    assert not violations("sample", "from ditmem_jax import cli, flow\nimport jax")
    assert not violations("data.video", "from ditmem_jax.data.files import replacing")


def test_homes_exist():
    missing = [
        home
        for home in RING_OF
        if not any((LIBRARY / home.replace(".", "/")).with_suffix(suffix).exists() for suffix in ("", ".py"))
    ]
    assert missing == []


def test_the_readme_maps_the_tree():
    section = (ROOT / "README.md").read_text().split("## Map of the code")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w./]+/|[\w./]+\.\w+)`", section))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    homes = {
        f"ditmem_jax/{path.name}{'/' * path.is_dir()}" for path in LIBRARY.iterdir() if home_of(path.stem)
    }
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and any(path.glob("**/*.py"))}
    own = {name for name in folders if not name.startswith(".") and name not in ("build/", "runs/", "demo/")}
    assert sorted((homes | own) - {"ditmem_jax/"} - named) == []
