"""The keys behind a rerun are named, from what finished results recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latent_reasoning.config import Experiment, merge, resolve
from latent_reasoning.dag.changes import changed_keys
from latent_reasoning.dag.digests import RECIPE, model_science, science
from latent_reasoning.dag.layout import Layout

RAW = {
    "experiment": "small",
    "data": {"prompt": {"evaluation": ""}},
    "models": {
        "cot": {"stage": "sft", "training": {"steps": 3}, "lora": {"r": 4}},
        "latent": {"stage": "latent_sft", "training": {"steps": 3, "learning_rate": 0.001}},
        "other": {"stage": "latent_sft", "training": {"steps": 5}},
        "rl": {"stage": "rl", "from": "latent", "training": {"steps": 3}},
    },
}


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def finish(experiment: Experiment, layout: Layout) -> None:
    """Record the science of every result, as the stages do."""
    write(layout.data_summary, {"science": science(experiment, "data")})
    for model in ("base", *experiment.models):
        card = {"model": model, "science": model_science(experiment, model)}
        for seed in experiment.seeds:
            write(layout.model(model, seed) / "card.json", card)
            if model != "base":
                kept = {"n": 3, "science": science(experiment, "evaluation", model)}
                write(layout.evaluation(model, seed, "test") / "summary.json", kept)


@pytest.fixture
def layout(tmp_path) -> Layout:
    experiment = resolve(RAW, "small.yaml")
    layout = Layout.of(experiment, tmp_path)
    finish(experiment, layout)
    return layout


def lines_after(layout: Layout, change: dict[str, Any]) -> list[str]:
    return changed_keys(resolve(merge(RAW, change), "small.yaml"), layout)


def models(**entries: Any) -> dict[str, Any]:
    return {"models": entries}


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({}, []),
        ({"runtime": {"threads": 4}, "report": {"title": "x"}}, []),
        (
            models(latent={"training": {"learning_rate": 0.002}}),
            [
                "latent seed 0: training.learning_rate 0.001 -> 0.002",
                "rl seed 0: models.latent.training.learning_rate 0.001 -> 0.002",
            ],
        ),
        (models(rl={"kl_weight": 0.5}), ["rl seed 0: kl_weight 0.001 -> 0.5"]),
        (models(cot={"training": {"steps": 4}}), ["cot seed 0: training.steps 3 -> 4"]),
        (models(cot={"lora": {"r": 128}}), ["cot seed 0: lora.r 4 -> 128"]),
        (models(cot={"lora": None}), ['cot seed 0: lora {"r": 4} -> null']),
        (models(rl={"lora": {}}), ["rl seed 0: lora null -> {}"]),
        (models(rl={"from": "other"}), ["rl seed 0: from latent -> other"]),
        (
            models(other={"distillation": {"teacher": "cot"}}),
            ["other seed 0: distillation.teacher self -> cot"],
        ),
        (models(other={"stage": "sft"}), ["other seed 0: stage latent_sft -> sft"]),
        ({"data": {"sft_share": 0.5}}, ["data: sft_share 0.85 -> 0.5"]),
        (
            {"data": {"prompt": {"training": "Q: "}}},
            [
                f'{model} seed 0: data.prompt.training "Question: " -> "Q: "'
                for model in ("base", *RAW["models"])
            ],
        ),
        (
            {"evaluation": {"max_new_tokens": 9}},
            [
                f"evaluation of {model} seed 0 on test: max_new_tokens 512 -> 9"
                for model in RAW["models"]
            ],
        ),
        (
            models(other={"forced_steps": 6}),
            [
                "other seed 0: forced_steps null -> 6",
                "evaluation of other seed 0 on test: forced_steps null -> 6",
            ],
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else json.dumps(value)[:60],
)
def test_a_line_names_result_key_and_both_values(layout, change, lines):
    assert lines_after(layout, change) == lines


def test_another_source_stands_for_all_the_keys_that_go_with_it(layout):
    source = {"source": "hub", "hub_id": "someone/rows"}
    lines = lines_after(layout, {"data": source, "base": {"source": "gguf", "path": "x.gguf"}})
    assert lines[0] == "data: source generated -> hub"
    assert [line for line in lines if ": " in line and "base" in line.split(": ")[1]] == [
        f"{model} seed 0: base.source scratch -> gguf" for model in RAW["models"]
    ]


def test_a_raised_recipe_is_named(layout, monkeypatch):
    monkeypatch.setitem(RECIPE, "rl", RECIPE["rl"] + 1)
    recipe = f"recipe.rl {RECIPE['rl'] - 1} -> {RECIPE['rl']}"
    assert lines_after(layout, {}) == [f"rl seed 0: {recipe}"]


def test_a_model_that_was_made_again_has_no_line_until_the_key_goes_back(layout):
    change = models(latent={"training": {"learning_rate": 0.002}})
    finish(resolve(merge(RAW, change), "small.yaml"), layout)
    assert lines_after(layout, change) == []
    assert lines_after(layout, {})[0] == "latent seed 0: training.learning_rate 0.002 -> 0.001"


def test_an_evaluation_names_what_its_model_does_not(layout):
    change = models(latent={"training": {"learning_rate": 0.002}})
    experiment = resolve(merge(RAW, change), "small.yaml")
    for model in ("latent", "rl"):
        card = {"science": model_science(experiment, model)}
        write(layout.model(model, 0) / "card.json", card)
    assert lines_after(layout, change) == [
        "evaluation of latent seed 0 on test: models.latent.training.learning_rate 0.001 -> 0.002",
        "evaluation of rl seed 0 on test: models.latent.training.learning_rate 0.001 -> 0.002",
    ]


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"science": null}'])
def test_results_that_recorded_nothing_have_no_line(layout, content):
    for file in (*layout.folder.rglob("card.json"), *layout.folder.rglob("summary.json")):
        file.write_text(content, encoding="utf-8")
    assert lines_after(layout, models(latent={"training": {"learning_rate": 0.002}})) == []


def test_nothing_is_said_before_there_are_results(tmp_path):
    experiment = resolve(RAW, "small.yaml")
    assert changed_keys(experiment, Layout.of(experiment, tmp_path)) == []
