"""Mutation testing: every small fault in a module must turn one of the module's own tests red.

    python -m tests.mutants [diffusion/flow ...]

The tests of `ditmem_jax/a/b.py` are those of `tests/a/test_b.py`. cosmic-ray puts one fault after another into a copy of
the tree under `build/mutants` and runs them there, each in a process of its own, two modules at a time. A run that was
stopped goes on where it was; a module begins anew when it or its tests change. What survives must be listed in
`survivors.toml` with the reason.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "mutants"
MODULES = (  # the longest first
    "models/memory_encoder",
    "models/filters",
    "train/step",
    "evaluate/gain",
    "evaluate/others",
    "train/optimizer",
    *(f"diffusion/{path.stem}" for path in sorted((ROOT / "ditmem_jax/diffusion").glob("[!_]*.py"))),
)
# Of all the ways to replace an operator by another, one or two: the rest are found by the same tests.
OPERATORS = re.compile(
    "core/("
    "AddNot|ExceptionReplacer|NumberReplacer|RemoveDecorator|ZeroIterationForLoop"
    "|Replace(And|Or|Break|Continue|True|False)With.*"
    "|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul|BitAnd_BitOr)"
    "|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Lt_Gt|Gt_Lt|LtE_GtE|GtE_LtE)"
    "|ReplaceComparisonOperator_(Is_IsNot|IsNot_Is|In_NotIn|NotIn_In)"
    "|ReplaceUnaryOperator_Delete_.*"
    ")"
)
COSMIC_RAY = Path(sys.executable).with_name("cosmic-ray")
ENVIRONMENT = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(BUILD / "xla"),  # most programs are the same in every mutant
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def wanted(mutation: MutationSpec, lines: list[str]) -> bool:
    """One more is tried for a number, not one less; a `*` before parameters is no product."""
    if mutation.operator_name == "core/NumberReplacer" and mutation.occurrence % 2:
        return False
    return (
        bool(OPERATORS.fullmatch(mutation.operator_name)) and lines[mutation.start_pos[0] - 1].strip() != "*,"
    )


class Session:
    """The mutants of one module, in a folder that is named by what they depend on."""

    def __init__(self, module: str):
        self.name, self.module = module, f"ditmem_jax/{module}.py"
        folder, name = module.split("/")
        self.tests = f"tests/{folder}/test_{name}.py"
        parts = [ROOT / self.module, ROOT / self.tests, Path(__file__)]
        digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in parts)).hexdigest()
        self.folder = BUILD / module.replace("/", ".") / digest[:12]
        self.tree, self.database = self.folder / "tree", self.folder / "session.sqlite"

    def run(self) -> set[tuple[str, str, str]]:
        """Returns the survivors: module, the lines as they were, and as they are in the mutant."""
        self.copy()
        test = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", self.tests]
        start = time.monotonic()
        self.call(*test)  # leaves bytecode of all modules: mutants are run without writing any
        seconds = time.monotonic() - start
        module = self.tree / self.module
        for stale in module.parent.glob(f"__pycache__/{module.stem}.*"):
            stale.unlink()
        settings = self.folder / "cosmic-ray.toml"
        if not self.database.exists():
            settings.write_text(
                f'[cosmic-ray]\nmodule-path = "{self.module}"\ntimeout = {60 + 5 * seconds:.0f}\n'
                f"excluded-modules = []\ntest-command = '{shlex.join(test)}'\ndistributor.name = 'local'\n"
            )
            new = self.folder / "new.sqlite"
            new.unlink(missing_ok=True)
            self.call(COSMIC_RAY, "init", settings, new)
            lines = module.read_text().splitlines()
            with use_db(new, WorkDB.Mode.open) as work:
                for item in list(work.pending_work_items):
                    if not all(wanted(mutation, lines) for mutation in item.mutations):
                        work.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))
            new.rename(self.database)
        self.call(COSMIC_RAY, "exec", settings, self.database)
        with use_db(self.database, WorkDB.Mode.open) as work:
            results = [result for _, result in work.completed_work_items]
        results = [result for result in results if result.worker_outcome != WorkerOutcome.SKIPPED]
        survivors = {
            (self.name, *lines_of(result.diff or ""))
            for result in results
            if result.test_outcome != TestOutcome.KILLED
        }
        print(f"{self.name}: {len(results)} mutants, {len(survivors)} survive", flush=True)
        return survivors

    def copy(self) -> None:
        """The tree as it is, since a run that was stopped leaves a fault in its copy."""
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        paths = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for path in filter(None, paths.split("\0")):
            if (ROOT / path).is_file():
                (self.tree / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / path, self.tree / path)

    def call(self, *command: str | Path) -> None:
        subprocess.run(command, cwd=self.tree, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)


def lines_of(diff: str) -> tuple[str, str]:
    """The lines that a difference takes away, and those that it puts there."""
    _, _, changes = diff.partition("@@\n")
    before, after = (
        "\n".join(line[1:].strip() for line in changes.splitlines() if line.startswith(sign)) for sign in "-+"
    )
    return before, after


def main() -> int:
    modules = sys.argv[1:] or MODULES
    listed = tomllib.loads((HERE / "survivors.toml").read_text()).get("survivor", [])
    reasons = {(x["module"], x["before"], x["after"]) for x in listed if x["reason"]}
    with ThreadPoolExecutor(2) as pool:
        found = set().union(*pool.map(lambda module: Session(module).run(), modules))
    for module, before, after in sorted(found - reasons):
        print(
            f"\n[[survivor]]\nmodule = '{module}'\nbefore = '''{before}'''\nafter = '''{after}'''\nreason = ''"
        )
    killed = {mutant for mutant in reasons - found if mutant[0] in modules}
    for module, before, after in sorted(killed):
        print(f"\nlisted, but does not survive in {module}: {before} -> {after}")
    return 1 if found - reasons or killed else 0


if __name__ == "__main__":
    sys.exit(main())
