"""A finished experiment whose stages were stand-ins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from latent_reasoning.config import PROJECT_ROOT, read
from tests.workflow.workflow_tools import Finished, snakemake, with_stand_ins


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """The test experiment with its appendix and an extra test set, finished by stand-ins."""
    folder = tmp_path_factory.mktemp("finished")
    extra = folder / "extra.jsonl"
    extra.write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    config = read([PROJECT_ROOT / "config" / "test.yaml"])
    config["data"]["extra_tests"] = {"extra": str(extra)}
    config["evaluation"]["datasets"] = ["test", "extra"]
    done = Finished(folder, config)
    result = snakemake(
        folder,
        "--configfile",
        done.write("plain", lambda _: None),
        "--quiet",
        "--",
        "all",
        "appendix",
        snakefile=with_stand_ins(folder),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_REASONING_RESULTS", str(folder / "results"))
        yield done
