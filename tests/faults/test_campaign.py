"""The campaign's own judgement, and the start of its fuzz."""

from __future__ import annotations

import pytest

from latent_reasoning.config import PROJECT_ROOT, load
from tests.faults.fuzz import fuzz_configurations, fuzz_rows, use
from tests.faults.reference import Reference


@pytest.mark.parametrize("name", ["test", "laptop", "paper", "published"])
def test_a_shipped_configuration_passes_what_the_fuzz_asks_of_accepted_ones(name, tmp_path):
    use(load(PROJECT_ROOT / "config" / f"{name}.yaml"), tmp_path)


@pytest.mark.parametrize(("fuzz", "cases"), [(fuzz_configurations, 40), (fuzz_rows, 12)])
def test_fuzzed_cases_have_no_findings(fuzz, cases, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "results"))
    tally = fuzz(tmp_path, cases, 3)
    assert tally.findings == []
    assert tally.cases == cases
    assert tally.accepted
    assert tally.refused


def test_a_half_written_or_other_result_is_seen_whatever_the_times(tmp_path):
    files = {
        "models/a/seed-0/model.safetensors": "weights",
        "models/a/seed-0/card.json": "{}",
        "figures/lengths.svg": "<svg>1</svg>\n",
        "evaluations/a/seed-0/test/summary.json": '{"n": 3, "seconds": 1.5}',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    reference = Reference.of(tmp_path)
    (tmp_path / "figures/lengths.svg").write_text("<svg>2</svg>")
    (tmp_path / "evaluations/a/seed-0/test/summary.json").write_text('{"n": 3, "seconds": 9}')
    (tmp_path / "models/a/.seed-1.tmp").mkdir()
    assert reference.problems(tmp_path, complete=True) == []
    (tmp_path / "figures/lengths.svg").write_text("<svg>2")
    (tmp_path / "models/a/seed-0/card.json").unlink()
    problems = ["figures/lengths.svg: differs", "models/a/seed-0/card.json: missing"]
    assert reference.problems(tmp_path) == problems
