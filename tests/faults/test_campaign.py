"""The campaign sees what it is there to see."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latent_reasoning.config import PROJECT_ROOT, ConfigError, load
from tests.faults.cases import Case
from tests.faults.damage import DAMAGES, OUTPUTS, every_damage
from tests.faults.fuzz import KEY_OR_LINE, fuzz_configurations, fuzz_rows, judged, use
from tests.faults.kills import ALL, ALONE, JOB, planned_kills
from tests.faults.reference import Reference, leftovers
from tests.faults.workbench import MARK, Workbench, rule_of, write_experiment

RULES = ["base_model", "evaluate", "figures", "latent_sft", "rl", "sft", "tracking_store"]


@pytest.fixture
def results(tmp_path) -> Path:
    """A few results of every kind."""
    files = {
        "models/a/seed-0/model.safetensors": b"weights",
        "models/a/seed-0/card.json": b"{}",
        "tables/main.csv": b"a,b\n1,2\n",
        "figures/lengths.svg": b"<svg>1</svg>\n",
        "evaluations/a/seed-0/test/summary.json": b'{"n": 3, "seconds": 1.5}',
        "checkpoints/a/seed-0/step-1/state.json": b"{}",
        "logs/sft/a.log": b"",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_equal_results_have_no_problems_whatever_the_times(results):
    reference = Reference.of(results)
    assert len(reference.files) == 5
    summary = {"n": 3, "seconds": 9.0}
    (results / "evaluations/a/seed-0/test/summary.json").write_text(json.dumps(summary))
    (results / "figures/lengths.svg").write_text("<svg>2</svg>")
    (results / "logs/sft/a.log").write_text("other")
    assert reference.problems(results, complete=True) == []


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("models/a/seed-0/model.safetensors", b"weightz", "differs"),
        ("tables/main.csv", b"a,b\n1", "differs"),
        ("figures/lengths.svg", b"<svg>1", "differs"),
        ("evaluations/a/seed-0/test/summary.json", b'{"n": 3', "differs"),
        ("evaluations/a/seed-0/test/summary.json", b'{"n": 4, "seconds": 1.5}', "differs"),
        ("tables/other.csv", b"", "is no result"),
    ],
)
def test_a_half_written_or_other_result_is_seen(results, name, content, problem):
    reference = Reference.of(results)
    (results / name).write_bytes(content)
    assert reference.problems(results) == [f"{name}: {problem}"]


def test_a_model_folder_is_whole_or_not_there(results):
    reference = Reference.of(results)
    (results / "tables/main.csv").unlink()
    assert reference.problems(results) == []
    (results / "models/a/seed-0/card.json").unlink()
    assert reference.problems(results) == ["models/a/seed-0/card.json: missing"]
    (results / "models/a/seed-0/model.safetensors").unlink()
    (results / "models/a/seed-0").rmdir()
    assert reference.problems(results) == []
    assert len(reference.problems(results, complete=True)) == 3


def test_temporary_names_are_no_results_but_are_found(results):
    reference = Reference.of(results)
    (results / "models/a/.seed-0.x1.tmp").mkdir()
    (results / "models/a/.seed-0.x1.tmp/model.safetensors").write_bytes(b"half")
    assert reference.problems(results) == []
    assert [path.name for path in leftovers(results)] == [".seed-0.x1.tmp"]


def test_a_process_whose_parent_is_gone_is_an_orphan(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.faults.workbench.SECONDS_TO_END", 0.2)
    bench = Workbench(tmp_path)
    assert bench.orphans() == []
    sleeper = f"{sys.executable} -c 'import time; time.sleep(60)' &"
    marked = {**os.environ, MARK: str(tmp_path)}
    subprocess.run(["bash", "-c", sleeper], check=True, env=marked)
    assert "time.sleep" in bench.orphans()[0]
    time.sleep(0.2)
    assert bench.orphans() == []


def test_kills_are_a_function_of_the_seed_and_meet_every_rule():
    first, again = (planned_kills(RULES, 15, random.Random("7 kills")) for _ in range(2))
    assert first == again
    assert first != planned_kills(RULES, 15, random.Random("8 kills"))
    assert len(first) == len(RULES) + 15
    assert {kill.rule for kill in first} == set(RULES)
    assert [sum(kill.victim == v for kill in first) for v in (JOB, ALL, ALONE)] == [12, 5, 5]


def test_every_output_is_damaged_once_in_every_way():
    damages = list(every_damage(random.Random(0)))
    assert [output for output, _ in damages] == OUTPUTS
    assert {kind for _, kind in damages} == set(DAMAGES)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damage_changes_the_file(tmp_path, kind):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(200)))
    DAMAGES[kind](file, random.Random(0))
    assert file.read_bytes() != bytes(range(200))


def test_a_stage_is_told_by_its_command_line():
    experiment = {"models": {"a": {"stage": "latent_sft"}}}
    assert rule_of("sft", [], "a", None, experiment) == "latent_sft"
    assert rule_of("data", [], None, "extra", experiment) == "prepare_test_set"
    words = ["-m", "latent_reasoning.analysis", "appendix"]
    assert rule_of("analysis", words, None, None, experiment) == "appendix_tables"


def test_a_copy_of_a_bench_keeps_time_stamps(tmp_path):
    write_experiment(tmp_path / "one", {"experiment": "test"})
    os.utime(tmp_path / "one" / "experiment.yaml", (1, 1))
    copy = Workbench(tmp_path / "one").copy(tmp_path / "two")
    assert copy.config.stat().st_mtime == 1
    assert copy.results == tmp_path / "two" / "results" / "test"


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (ConfigError("a.yaml: seeds: a seed stands twice in [0, 0]"), ""),
        (ConfigError("a.yaml: line 3, column 2 a tab stands here"), ""),
        (ConfigError("seeds: a seed stands twice"), "names none of"),
        (ConfigError("a.yaml: it is wrong somewhere"), "names no key or line"),
        (KeyError("seeds"), "KeyError in"),
    ],
)
def test_an_error_is_judged_by_what_it_says(error, wrong):
    assert judged(error, ["a.yaml"], KEY_OR_LINE).startswith(wrong)
    assert bool(judged(error, ["a.yaml"], KEY_OR_LINE)) == bool(wrong)


@pytest.mark.parametrize("name", ["test", "laptop", "paper", "published"])
def test_a_shipped_configuration_passes_what_the_fuzz_asks_of_accepted_ones(name, tmp_path):
    use(load([str(PROJECT_ROOT / "config" / f"{name}.yaml")]), tmp_path)


def test_a_few_fuzzed_cases_have_no_findings(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "results"))
    for fuzz in (fuzz_configurations, fuzz_rows):
        tally = fuzz(tmp_path, 12, 3)
        assert tally.findings == []
        assert tally.cases >= 12


def test_a_case_counts_as_survived_only_where_it_was_done_and_nothing_was_wrong():
    assert Case("fault", "rule").survived
    assert Case("fault", "rule", problems=["x"]).row["survived"] == "false"
    skipped = Case("fault", "rule", skipped="no mounts here")
    assert not skipped.survived
    assert skipped.row["note"] == "no mounts here"
