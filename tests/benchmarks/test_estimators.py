"""The comparison of estimators reads what the workflow leaves behind."""

import json

import pandas
import pytest

from benchmarks.estimators import draw, main, read_curves, summarise
from latent_reasoning.config import UserError, load
from latent_reasoning.dag.layout import Layout

CURVES = {
    ("rl-sampled", 0): [(100, 0.9, 5.0), (200, 1.0, 3.7), (400, 0.98, 3.6)],
    ("rl-exact", 0): [(100, 0.9, 3.6), (200, 1.0, 3.55), (400, 1.0, 3.51)],
}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Two runs of the committed experiment, 80 CPU seconds each; one evaluated."""
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path))
    experiment = load([f"config/laptop{name}.yaml" for name in ("", "-sre", "-estimators")])
    layout = Layout.of(experiment)
    for (model, seed), points in CURVES.items():
        folder = layout.model(model, seed)
        folder.mkdir(parents=True)
        lines = ["step,loss,validation_accuracy,validation_reasoning_tokens", "10,0.5,,"]
        lines += [f"{step},0.1,{accuracy},{tokens}" for step, accuracy, tokens in points]
        (folder / "training.csv").write_text("\n".join(lines) + "\n")
        times = layout.benchmarks / "rl" / model / f"seed-{seed}.tsv"
        times.parent.mkdir(parents=True)
        times.write_text("s\tmax_rss\tcpu_time\n90.0\t-\t80.0\n")
    evaluation = layout.evaluation("rl-exact", 0, "test")
    evaluation.mkdir(parents=True)
    content = {"accuracy": 0.995, "reasoning_tokens_mean": 3.5}
    (evaluation / "summary.json").write_text(json.dumps(content))
    return experiment


def test_curves_hold_validations_with_seconds_spread_over_the_steps(experiment):
    sampled, exact = read_curves(experiment)
    assert exact["model"].unique().tolist() == ["rl-exact"]
    assert sampled["cpu_seconds"].tolist() == [20.0, 40.0, 80.0]
    assert sampled["reasoning_tokens"].tolist() == [5.0, 3.7, 3.6]


def test_an_experiment_that_was_not_run_is_told_in_words(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path))
    with pytest.raises(UserError, match="laptop-estimators has no finished RL model"):
        main([])


def test_the_summary_says_when_a_length_came_near_the_shortest_end(experiment):
    curves = pandas.concat(read_curves(experiment), ignore_index=True)
    sampled, exact = summarise(experiment, curves).to_dict("records")
    # The goal is 3.51 + 0.1.
    assert (sampled["steps_to_near"], sampled["cpu_seconds_to_near"]) == (400, 80.0)
    assert (exact["steps_to_near"], exact["cpu_seconds_to_near"]) == (100, 20.0)
    assert (exact["validation_accuracy"], exact["test_accuracy"]) == (1.0, 0.995)
    assert sampled["test_accuracy"] != sampled["test_accuracy"]
    labels = [text.get_text() for text in draw(curves).legends[0].get_texts()]
    assert labels == ["rl-sampled", "rl-exact"]
