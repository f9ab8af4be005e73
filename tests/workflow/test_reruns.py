"""Which jobs each key of the configuration runs again: users' GPU days depend on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

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

# Key, new value, the jobs that it runs again: every section, and every key that looks alike.
CASES: list[tuple[str, Any, set[str]]] = [
    ("data.generated.train", 65, EVERY_ROW),
    ("data.generated.seed", 1, EVERY_ROW),
    ("data.generated.modulus", 8, EVERY_ROW),
    ("data.sft_share", 0.5, EVERY_ROW),
    ("data.split_seed", 43, EVERY_ROW),
    ("data.prompt.evaluation", "", EVERY_ROW),
    ("data.prompt.training", "Q: ", EVERY_ROW),
    ("data.max_tokens", 100, EVERY_ROW),
    ("data.drop_negative_for_sft", False, EVERY_ROW),
    ("data.special_token_text", "escape", EVERY_ROW),
    ("data.natural_language", True, EVERY_ROW),
    ("data.limits.train", 60, EVERY_ROW),
    ("data.augmentation.method", "numeric_perturbation", EVERY_ROW),
    ("data.on_bad_row", "skip", EVERY_ROW),
    ("base.architecture.hidden_size", 32, EVERY_TRAINING),
    ("base.texts.results_only", 0.5, EVERY_TRAINING),
    ("base.training.learning_rate", 1e-3, EVERY_TRAINING),
    ("base.training.stop_at_accuracy", 0.9, EVERY_TRAINING),
    ("base.licence", "Apache-2.0", set()),
    ("base.path", "elsewhere", set()),
    ("model.recurrent_filter", "linear", after(*LATENT) - after("meaned-codi")),
    ("model.stop_head_temperature", 2.0, after(*LATENT)),
    ("stages.sft.training.steps", 5, after("cot-sft", "no-cot-sft")),
    ("stages.latent_sft.stop_label_smoothing", 0.2, after(*LATENT)),
    ("stages.latent_sft.training.weight_decay", 0.2, after(*LATENT)),
    ("stages.rl.group_size", 8, after("latent-6-rl", "latent-6-by-1-rl")),
    ("stages.rl.reward.penalty", 1e-3, after("latent-6-rl", "latent-6-by-1-rl")),
    ("models.cot-sft.training.batch_size", 4, after("cot-sft")),
    ("models.no-cot-sft.lora", {"r": 2}, after("no-cot-sft")),
    ("models.latent-6.latent_steps.max", 7, after(*SIX)),
    ("models.latent-6.distillation.codi_weight", 2.0, after(*SIX)),
    ("models.latent-6.training.select", "last", after(*SIX)),
    ("models.latent-6.save", "adapter", after(*SIX)),
    ("models.latent-6.rows", "all", after(*SIX)),
    ("models.latent-6-rl.kl_weight", 0.01, after("latent-6-rl")),
    ("models.latent-6-rl.from", "latent-6-by-1", after("latent-6-rl")),
    ("models.meaned-codi.mask_latent_labels", False, after("meaned-codi")),
    ("models.meaned-codi.forced_steps", 5, evaluated("meaned-codi") | {"appendix_tables"}),
    ("evaluation.max_new_tokens", 17, EVERY_EVALUATION),
    ("evaluation.max_forced_steps", 4, EVERY_EVALUATION),
    ("evaluation.forced_rows", 5, EVERY_EVALUATION),
    ("evaluation.datasets", ["test"], ANALYSIS | {"appendix_tables"}),
    (
        "evaluation.datasets",
        ["test", "extra", "validation"],
        MORE_EVALUATIONS | ANALYSIS | {"appendix_tables"},
    ),
    ("runtime.device", "auto", set()),
    ("runtime.precision", "bfloat16", set()),
    ("runtime.threads", 2, set()),
    ("runtime.micro_batch_size", 2, set()),
    ("runtime.evaluation_batch_size", 2, set()),
    ("runtime.checkpoint_every", 2, set()),
    ("runtime.memory_mb", 8000, set()),
    ("runtime.runtime_minutes", 30, set()),
    ("tracking.enabled", False, set()),
    ("tracking.uri", "sqlite:///elsewhere.db", set()),
    ("tracking.log_every", 2, set()),
    ("report.title", "Another title", {"report"}),
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


def test_nothing_runs_where_nothing_changed(finished):
    assert finished.reruns(lambda config: None) == set()


def test_a_new_model_trains_alone(finished):
    entry = {"stage": "latent_sft", "latent_steps": {"min": 4, "max": 4}}
    new = {"latent_sft:latent-4:0"} | {f"evaluate:latent-4:{d}:0" for d in ("test", "extra")}
    assert finished.reruns(set_key("models.latent-4", entry)) == new | ANALYSIS


def test_a_removed_model_trains_nothing(finished):
    assert finished.reruns(lambda config: config["models"].pop("latent-6-by-1-rl")) == ANALYSIS


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


def test_fresh_time_stamps_of_rows_retrain_nothing(finished):
    for file in (finished.folder / "results" / "test" / "data").iterdir():
        os.utime(file)
    assert finished.reruns(lambda config: None) == set()


def test_a_removed_model_folder_is_made_again_only_where_it_is_asked_for(finished):
    folder = finished.folder / "results" / "test" / "models" / "latent-6-rl"
    aside = folder.rename(folder.with_name("aside"))
    try:
        assert finished.reruns(lambda config: None) == set()
        path = "results/test/models/latent-6-rl/seed-0"
        assert finished.reruns(lambda config: None, path) == {"rl:latent-6-rl:0"}
    finally:
        aside.rename(folder)
