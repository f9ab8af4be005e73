"""Lock, pyproject.toml and environment.yml name the same versions."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from latent_reasoning.config import PROJECT_ROOT

PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = [
    Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
]


def locked() -> dict[str, str]:
    """Exact versions by normalised name."""
    lines = (PROJECT_ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    return dict(_pin(line) for line in pins)


def _pin(line: str) -> tuple[str, str]:
    match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
    assert match, f"not a plain pin of a public version: {line!r}"
    return _normalised(match[1]), match[2]


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("requirement", DEPENDENCIES, ids=str)
def test_every_dependency_is_locked_within_its_range(requirement):
    assert requirement.specifier.contains(locked()[_normalised(requirement.name)])


def test_the_lock_is_closed():
    """Every locked package's own requirements are locked too, so nothing floats."""
    pins = locked()
    missing = {}
    for name, pin in pins.items():
        for requirement in _requirements(name, pin):
            if _normalised(requirement.name) not in pins:
                missing[requirement.name] = name
    assert missing == {}


def _requirements(name: str, pin: str) -> list[Requirement]:
    """Requirements, on this machine, of a package that is installed in the locked version."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        installed = Version(version(name)).public
    except PackageNotFoundError:
        return []
    if installed != pin:
        return []
    parsed = [Requirement(text) for text in requires(name) or []]
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def test_conda_installs_the_locked_versions():
    content = yaml.safe_load((PROJECT_ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in content["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict)]
    assert conda == ["python=3.11", "pip"]
    assert dict(_pin(line) for line in pip) == locked()


def test_no_pin_names_a_host_or_a_local_build():
    for name in ("requirements.lock", "environment.yml"):
        text = (PROJECT_ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|file:|--index|--find-links|\+c(pu|u\d)", text), name


def test_pre_commit_runs_the_locked_formatters():
    text = (PROJECT_ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    revisions = {repo["repo"]: repo["rev"] for repo in yaml.safe_load(text)["repos"]}
    pins = locked()
    assert revisions["https://github.com/astral-sh/ruff-pre-commit"] == f"v{pins['ruff']}"
    assert revisions["https://github.com/snakemake/snakefmt"] == f"v{pins['snakefmt']}"
