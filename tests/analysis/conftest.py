"""Synthetic evaluations and training curves of a small experiment, written as the stages do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import pandas
import pytest

from latent_reasoning.analysis.figures import write_figures
from latent_reasoning.analysis.results import Results
from latent_reasoning.config import Experiment, resolve
from latent_reasoning.dag.layout import Layout
from latent_reasoning.evaluation.records import (
    Evaluation,
    ForcedPoint,
    Prediction,
    write_evaluation,
)
from latent_reasoning.runtime.files import write_json, write_sums

TRAINING = {"steps": 100}
GOLD_STEPS = [1, 2, 3, 4, 5]


def experiment(seeds: list[int] | None = None, **changes) -> Experiment:
    """The paper's six models with the published figures that are known."""
    raw = {
        "experiment": "synthetic",
        "seeds": seeds or [0],
        "tracking": {"enabled": False},
        "models": {
            "cot-sft": {"stage": "sft", "form": "cot", "training": TRAINING},
            "no-cot-sft": {"stage": "sft", "form": "no_cot", "training": TRAINING},
            "latent-6": {"stage": "latent_sft", "training": TRAINING},
            "latent-6-by-1": {"stage": "latent_sft", "training": TRAINING},
            "latent-6-rl": {"stage": "rl", "from": "latent-6", "training": TRAINING},
            "latent-6-by-1-rl": {"stage": "rl", "from": "latent-6-by-1", "training": TRAINING},
        },
        "report": {
            "notes": ["The base model is trained from scratch on generated text."],
            "published": {
                "latent-6": {"accuracy": 0.4973, "tokens": 8.0},
                "latent-6-rl": {"accuracy": 0.5011, "tokens": 3.76},
            },
        },
    }
    return resolve(raw | changes, "synthetic.yaml")


DATA_SUMMARY = {
    "splits": {
        "train": {"rows": 1000, "dropped": {}},
        "sft": {"rows": 840, "dropped": {"not_a_number": 10}},
        "rl": {"rows": 150, "dropped": {}},
        "validation": {"rows": 50, "dropped": {}},
        "test": {"rows": 400, "dropped": {}},
    }
}

# Share of right answers for 1..5 gold steps.
SKILL = {
    "cot-sft": [1, 1, 1, 1, 1],
    "no-cot-sft": [0.99, 0.25, 0.18, 0.14, 0.16],
    "latent-6": [1, 1, 1, 0.99, 0.95],
    "latent-6-by-1": [1, 0.99, 1, 0.99, 0.96],
    "latent-6-rl": [1, 1, 0.99, 0.99, 0.93],
    "latent-6-by-1-rl": [1, 1, 1, 0.99, 0.97],
}


def latent_steps(model: str, gold: int, generator: numpy.random.Generator) -> int:
    """Latent steps a trained model would take on a row of `gold` steps."""
    if model == "latent-6":
        return 6
    if model == "latent-6-by-1":
        return 5 + gold
    if model.endswith("-rl"):
        return max(1, gold - 1) + int(generator.random() < 0.02)
    return 0


def evaluation_of(model: str, seed: int, n: int = 400) -> Evaluation:
    """A plausible evaluation of one model: `n` rows, and every forced number of steps."""
    generator = numpy.random.default_rng([seed, sum(map(ord, model))])
    gold = numpy.random.default_rng(7).choice(GOLD_STEPS, size=n, p=[0.2, 0.25, 0.25, 0.2, 0.1])
    predictions = []
    for i, k in enumerate(gold.tolist()):
        steps = latent_steps(model, k, generator)
        length = 13 * k if model == "cot-sft" else 0 if model == "no-cot-sft" else steps + 2
        correct = bool(generator.random() < SKILL[model][k - 1])
        predictions.append(
            Prediction(
                id=f"test-{i}",
                question=f"Question {i}?",
                answer=str(i % 7),
                completion=f"<|CONTINUE|><|STOP|> The answer is: {i % 7 if correct else 9}",
                extracted=str(i % 7) if correct else "9",
                correct=correct,
                well_formatted=i != 3,
                cut_off=i == 3,
                reasoning_tokens=length,
                latent_steps=steps,
                gold_steps=k,
            )
        )
    forced = [ForcedPoint(0, n, round(0.33 * n))]
    if model.startswith("latent"):
        needed = numpy.maximum(1, gold - 1)
        for steps in range(1, 9):
            share = numpy.where(needed <= steps, 0.98, 1 / 7)
            forced.append(ForcedPoint(steps, n, int((generator.random(n) < share).sum())))
    return Evaluation(predictions, forced, seconds=1.5)


def training_of(model: str, seed: int) -> pandas.DataFrame:
    """A training curve: loss parts every ten steps, validation every fifty."""
    steps = numpy.arange(10, 401, 10)
    decay = numpy.exp(-steps / (60 + 5 * len(model) + seed))
    shown = numpy.where(steps % 50 == 0, 1.0, numpy.nan)
    columns = {"step": steps, "loss": 2 * decay + 0.05, "learning_rate": 1e-3 * decay}
    if model.endswith("-rl"):
        columns |= {"kl": 0.2 * (1 - decay), "reward": 1 - 0.1 * decay}
        columns |= {"reasoning_tokens": 4 + 4 * decay, "all_correct_share": 0.9 - 0.2 * decay}
    elif model.startswith("latent"):
        columns |= {"teacher_loss": decay, "student_loss": decay / 2, "codi_loss": decay / 9}
    columns["validation_accuracy"] = shown * (0.98 - 0.6 * decay)
    columns["validation_reasoning_tokens"] = shown * (4 + 4 * decay)
    return pandas.DataFrame(columns)


def write_all(experiment: Experiment, n: int = 400) -> Results:
    """Write every evaluation and training curve below the layout's root; returns the reader."""
    layout = Layout.of(experiment)
    write_json(layout.data_summary, DATA_SUMMARY)
    for model in experiment.models:
        for seed in experiment.seeds:
            for dataset in experiment.evaluation.datasets:
                evaluation = evaluation_of(model, seed, n)
                write_evaluation(layout.evaluation(model, seed, dataset), evaluation)
            folder = layout.model(model, seed)
            folder.mkdir(parents=True, exist_ok=True)
            training_of(model, seed).to_csv(folder / "training.csv", index=False)
    return Results.of(experiment)


@pytest.fixture
def change_summary() -> Callable[..., None]:
    """Writes other values into a model's summary, as if its evaluation had come to them."""

    def change(results: Results, model: str, **values) -> None:
        path = results.layout.evaluation(model, 0, "test") / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        write_sums(path.parent)

    return change


@pytest.fixture
def results_root(tmp_path, monkeypatch):
    """A results folder of the test's own."""
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def written(results_root) -> Callable[..., Results]:
    """Write an experiment (keywords as for `experiment`) and read it."""
    return lambda *seeds, **changes: write_all(experiment(list(seeds) or [0], **changes))


@pytest.fixture(scope="session")
def three_seeds(tmp_path_factory) -> Iterator[Results]:
    """An experiment of three seeds, only read by the tests that share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_REASONING_RESULTS", str(tmp_path_factory.mktemp("three_seeds")))
        yield write_all(experiment([0, 1, 2]))


@pytest.fixture
def without_steps(written) -> Results:
    """An experiment on rows whose solutions have no steps."""
    results = written(0)
    for model in results.models:
        evaluation = evaluation_of(model, 0)
        bare = [replace(prediction, gold_steps=None) for prediction in evaluation.predictions]
        folder = results.layout.evaluation(model, 0, "test")
        write_evaluation(folder, replace(evaluation, predictions=bare))
    return results


@pytest.fixture(scope="session")
def drawn(three_seeds, tmp_path_factory) -> Path:
    """A folder with every figure of `three_seeds`."""
    folder = tmp_path_factory.mktemp("figures")
    write_figures(three_seeds, folder)
    return folder
