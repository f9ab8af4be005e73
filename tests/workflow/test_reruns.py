"""Which jobs a changed configuration or file runs again: users' GPU days depend on it.

Which digests follow each key of the schema is tested in `tests/dag/test_digests.py`, without
Snakemake; here the real workflow turns changed digests, files and time stamps into jobs, for at
least one key of each section and kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.workflow.workflow_tools import Finished

MODELS = {
    "cot-sft": "sft",
    "no-cot-sft": "sft",
    "latent-6": "latent_sft",
    "latent-6-by-1": "latent_sft",
    "latent-6-rl": "rl",
    "latent-6-by-1-rl": "rl",
    "meaned-codi": "latent_sft",
}
MAIN = [name for name in MODELS if name != "meaned-codi"]
ANALYSIS = {"tables", "figures", "report"}
BASE = {"base_model:0"}


def trained(*models: str) -> set[str]:
    return {f"{MODELS[model]}:{model}:0" for model in models}


def evaluated(*models: str) -> set[str]:
    return {f"evaluate:{model}:{dataset}:0" for model in models for dataset in ("test", "extra")}


def after(*models: str) -> set[str]:
    """The models' trainings and all that follows from them."""
    pages = ANALYSIS if set(models) & set(MAIN) else set()
    appendix = {"appendix_tables"} if "meaned-codi" in models else set()
    return trained(*models) | evaluated(*models) | pages | appendix


EVERY_TRAINING = BASE | after(*MODELS)
EVERY_ROW = {"prepare_data", "prepare_test_set:extra"} | EVERY_TRAINING
EVERY_EVALUATION = evaluated(*MODELS) | ANALYSIS | {"appendix_tables"}
LATENT = ("latent-6", "latent-6-by-1", "latent-6-rl", "latent-6-by-1-rl", "meaned-codi")
SIX = ("latent-6", "latent-6-rl")

MORE_EVALUATIONS = {f"evaluate:{model}:validation:0" for model in MODELS}

# Key, new value, the jobs that it runs again: at least one key of each section and kind.
CASES: list[tuple[str, Any, set[str]]] = [
    ("data.generated.train", 65, EVERY_ROW),
    ("data.prompt.evaluation", "", EVERY_TRAINING),
    ("data.drop_negative_for_sft", False, after(*LATENT)),
    ("base.training.learning_rate", 1e-3, EVERY_TRAINING),
    ("base.licence", "Apache-2.0", set()),
    ("model.recurrent_filter", "linear", after(*LATENT) - after("meaned-codi")),
    ("stages.sft.training.steps", 5, after("cot-sft", "no-cot-sft")),
    ("stages.rl.reward.penalty", 1e-3, after("latent-6-rl", "latent-6-by-1-rl")),
    ("models.latent-6.latent_steps.max", 7, after(*SIX)),
    ("models.latent-6-rl.from", "latent-6-by-1", after("latent-6-rl")),
    ("models.meaned-codi.forced_steps", 5, after("meaned-codi")),
    ("evaluation.max_new_tokens", 17, EVERY_EVALUATION),
    ("evaluation.datasets", ["test"], ANALYSIS | {"appendix_tables"}),
    (
        "evaluation.datasets",
        ["test", "extra", "validation"],
        MORE_EVALUATIONS | ANALYSIS | {"appendix_tables"},
    ),
    ("runtime", {"device": "auto", "threads": 2, "memory_mb": 8000}, set()),
    ("tracking", {"enabled": False, "log_every": 2}, set()),
    ("report.notes", ["Another note."], {"report"}),
    (
        "report.published",
        {"latent-6": {"accuracy": 0.5}},
        {"tables", "report", "appendix_tables"},
    ),
    ("report.main", ["latent-6", "latent-6-rl"], ANALYSIS),
]


def set_key(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """The change of one dotted key."""

    def change(config: dict[str, Any]) -> None:
        *sections, last = key.split(".")
        for section in sections:
            config = config.setdefault(section, {})
        config[last] = value

    return change


@pytest.mark.parametrize(("key", "value", "expected"), CASES, ids=[c[0] for c in CASES])
def test_a_key_runs_exactly_what_depends_on_it(finished, key, value, expected):
    assert finished.reruns(set_key(key, value)) == expected


def nothing(config: dict[str, Any]) -> None:
    """No change."""


def test_nothing_runs_where_nothing_changed(finished):
    assert finished.reruns(nothing) == set()


@pytest.mark.parametrize("appendix", [False, True])
def test_a_new_model_trains_alone_and_redraws_the_tables_it_stands_in(finished, appendix):
    def change(config):
        entry = {"stage": "latent_sft", "latent_steps": {"min": 4, "max": 4}}
        config["models"]["latent-4"] = entry
        config["report"]["appendix"] += ["latent-4"] * appendix

    new = {"latent_sft:latent-4:0"} | {f"evaluate:latent-4:{d}:0" for d in ("test", "extra")}
    assert finished.reruns(change) == new | ({"appendix_tables"} if appendix else ANALYSIS)


def test_a_removed_model_trains_nothing(finished):
    assert finished.reruns(lambda config: config["models"].pop("latent-6-by-1-rl")) == ANALYSIS


def test_another_order_of_models_redraws_tables_and_trains_nothing(finished):
    def change(config):
        config["models"] = dict(reversed(config["models"].items()))

    assert finished.reruns(change) == ANALYSIS


def test_another_seed_runs_beside_the_first(finished):
    jobs = finished.reruns(set_key("seeds", [0, 1]))
    assert {job for job in jobs if job.endswith(":0")} == set()
    assert jobs >= {"base_model:1", "latent_sft:latent-6:1", "evaluate:latent-6-rl:extra:1"}
    assert "prepare_data" not in jobs


def test_a_new_test_set_retrains_nothing(finished):
    second = finished.folder / "second.jsonl"
    second.write_text('{"question": "1 + 2?", "answer": "3"}\n', encoding="utf-8")

    def change(config):
        config["data"]["extra_tests"]["second"] = str(second)
        config["evaluation"]["datasets"].append("second")

    new = {"prepare_test_set:second"} | {f"evaluate:{model}:second:0" for model in MODELS}
    assert finished.reruns(change) == new | ANALYSIS | {"appendix_tables"}


def test_a_moved_test_set_runs_nothing_and_a_changed_one_is_evaluated_again(finished):
    other = finished.folder / "moved.jsonl"
    other.write_bytes((finished.folder / "extra.jsonl").read_bytes())
    change = set_key("data.extra_tests.extra", str(other))
    assert finished.reruns(change) == set()
    other.write_text('{"question": "2 + 2?", "answer": "4"}\n', encoding="utf-8")
    again = {f"evaluate:{model}:extra:0" for model in MODELS}
    expected = {"prepare_test_set:extra"} | again | ANALYSIS | {"appendix_tables"}
    assert finished.reruns(change) == expected


def test_fresh_time_stamps_and_a_note_in_a_model_folder_run_nothing(finished):
    """What lies in a folder and the folders themselves, all newer than what was made from them."""
    results = finished.folder / "results" / "test"
    (results / "models" / "latent-6" / "seed-0" / "notes.txt").write_text("the best so far\n")
    for part in ("tables", "evaluations", "models", "base", "data"):
        for path in [results / part, *(results / part).rglob("*")]:
            os.utime(path)
    assert finished.reruns(nothing) == set()


def test_a_model_trained_again_runs_what_starts_from_it(finished):
    """Its digest file is new, whatever the time stamps of the folder say."""
    digest = finished.folder / "results" / "test" / "models" / "latent-6" / "seed-0.sha256"
    before = digest.read_text(encoding="utf-8")
    try:
        digest.write_text("other weights\n", encoding="utf-8")
        assert finished.reruns(nothing) == after(*SIX) - trained("latent-6")
    finally:
        digest.write_text(before, encoding="utf-8")


def test_a_project_that_was_moved_with_its_results_runs_nothing(finished, monkeypatch):
    """Moved as `mv` does it, which keeps the time stamps; Snakemake's records move along."""
    elsewhere = finished.folder.with_name("moved-project")
    finished.folder.rename(elsewhere)
    try:
        monkeypatch.setenv("LATENT_REASONING_RESULTS", str(elsewhere / "results"))
        config = {**finished.config, "data": {**finished.config["data"]}}
        config["data"]["extra_tests"] = {"extra": str(elsewhere / "extra.jsonl")}
        assert Finished(elsewhere, config).reruns(nothing) == set()
    finally:
        elsewhere.rename(finished.folder)


def test_a_removed_model_folder_is_made_again_only_where_it_is_asked_for(finished):
    folder = finished.folder / "results" / "test" / "models" / "latent-6-rl"
    aside = folder.rename(folder.with_name("aside"))
    try:
        assert finished.reruns(nothing) == set()
        path = "results/test/models/latent-6-rl/seed-0"
        assert finished.reruns(nothing, path) == {"rl:latent-6-rl:0"}
    finally:
        aside.rename(folder)


def test_comparing_models_that_are_there_times_them_and_trains_nothing(finished):
    def compare(config: dict[str, Any]) -> None:
        config["report"]["rivals"] = {"models": ["latent-6"], "references": ["cot-sft"]}

    compared = {"rivals_table", "tuning_table", "report"}
    jobs = finished.reruns(compare, "rivals")
    assert jobs == compared | {"time_rows:latent-6", "time_rows:cot-sft"}
