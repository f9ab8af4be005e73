"""docs/architecture.md names functions that are there."""

from __future__ import annotations

import ast
import re

import pytest

from latent_reasoning.config import PROJECT_ROOT

PAGE = (PROJECT_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGE = PROJECT_ROOT / "src" / "latent_reasoning"
ROWS = re.findall(r"`([a-z_/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", PAGE)


def defined(file: str) -> set[str]:
    """Functions and classes of a file, methods as `Class.method`."""
    names = set()
    for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
    return names


@pytest.mark.parametrize(("file", "names"), ROWS, ids=str)
def test_a_function_of_the_table_is_in_its_file(file, names):
    assert set(re.findall(r"[\w.]+", names)) <= defined(file)


def test_every_file_and_folder_that_the_page_names_is_there():
    assert len(ROWS) > 30
    for path in re.findall(r"`([a-z_]+/(?:[a-z_]+\.py)?)`", PAGE):
        assert (PACKAGE / path).exists() or (PROJECT_ROOT / path).exists(), path
