"""Data flows one way: no stage imports a later one, and heavy optional packages come in late."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import latent_reasoning

PACKAGE = Path(latent_reasoning.__file__).parent
# From bottom to top, as in docs/architecture.md.
LAYERS = (
    *("config", "runtime", "dag", "data", "model", "evaluation", "training"),
    *("base", "sft", "rl", "rivals", "analysis", "inside", "ask"),
)
LEVEL = {name: level for level, name in enumerate(LAYERS)}
OPTIONAL = ("snakemake", "mlflow", "gguf", "datasets")
WITHOUT_A_MODEL = (
    *("data.__main__", "analysis.__main__", "inside.page"),
    *("runtime.tracking", "dag.cost", "dag.planning"),
)
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    """The part of the package that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(file: Path) -> str:
    """The dotted name of a file's module."""
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports are not used here"
            yield node.module or ""
            # What is imported may be a module itself.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_stage_imports_a_later_one(file):
    if file.name == "__init__.py" and file.parent == PACKAGE:
        return
    own = name_of(file)
    assert own in LEVEL, f"{own} has no place in the order of imports: add it to LAYERS"
    for module in imported(file):
        parts = module.split(".")
        if parts[0] == "latent_reasoning" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[own], f"{own} imports {module}"


def test_no_modules_import_each_other_in_a_circle():
    files = [file for file in FILES if file.name != "__init__.py"]
    graph = {module_of(file): {*imported(file)} for file in files}
    TopologicalSorter({m: names & graph.keys() for m, names in graph.items()}).prepare()


def import_without(missing: tuple[str, ...], modules: list[str]) -> None:
    """Import the modules in a process that has none of the packages in `missing`."""
    program = (
        f"import sys, importlib; sys.modules.update(dict.fromkeys({missing}))\n"
        f"for name in {modules}: importlib.import_module(name)\nprint('imported')"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "imported", result.stderr


def test_every_stage_imports_without_snakemake_mlflow_gguf_and_datasets():
    import_without(OPTIONAL, sorted(map(module_of, PACKAGE.rglob("__main__.py"))))


def test_what_needs_no_model_starts_without_torch():
    """Tables, figures and the page would take eight seconds more, each."""
    names = [f"latent_reasoning.{name}" for name in WITHOUT_A_MODEL]
    import_without(("torch", "transformers"), names)
