"""The rivals' tables and figures: accuracy and costs of methods, paired tests, tuning trials."""

from dataclasses import replace

import numpy
import pandas
import pytest
from safetensors.numpy import save_file

from latent_reasoning.analysis import training_cost
from latent_reasoning.analysis.report import rivals_content
from latent_reasoning.analysis.results import MissingResultError, Results
from latent_reasoning.analysis.rival_figures import RIVAL_FIGURES, curves_of, rivals_figure
from latent_reasoning.analysis.rivals import (
    RIVALS_TEXTS,
    readable_rivals,
    readable_tuning,
    rivals_of,
    rivals_paired,
    rivals_table,
    settings_beside,
    tuning_table,
)
from latent_reasoning.analysis.style import save
from latent_reasoning.analysis.tables import markdown_of
from latent_reasoning.config import ConfigError, RivalPolicyModel
from latent_reasoning.dag.cost import Lengths, size_of
from latent_reasoning.dag.planning import rival_models, trial_models
from latent_reasoning.evaluation.records import write_evaluation
from latent_reasoning.runtime.files import write_json
from tests.analysis.conftest import evaluation_of

RIVALS = {
    "models": ["no-cot-sft", "latent-6", "latent-6-by-1"],
    "references": ["latent-6-rl", "cot-sft"],
    "trials": {"by-one": ["latent-6-by-1", "latent-6-by-1-rl"], "six": ["latent-6", "cot-sft"]},
    "failed": {"latent-6-by-1-rl": "diverged at step 120"},
    "lines": {"length": ["latent-6", "latent-6-by-1"]},
    "published": {"latent-6": {"this paper, Llama": 0.4973, "another": 0.1}},
}
LENGTHS = Lengths(40, 20, 15, 6)


@pytest.fixture
def results(written, monkeypatch) -> Results:
    """Two seeds, with what the rivals' tables need beside the evaluations."""
    monkeypatch.setattr(training_cost, "mean_lengths", lambda results: LENGTHS)
    results = written(0, 1, report={"rivals": RIVALS})
    for model in rival_models(results.experiment):
        times = {"milliseconds_alone": 3.0, "milliseconds_in_batches": 0.5}
        write_json(results.layout.timing(model), times)
        folder = results.layout.model(model, 0)
        save_file({"a": numpy.zeros((3, 4), "f4")}, folder / "model.safetensors")
    save_file(
        {"b": numpy.zeros(5, "f4")}, results.layout.model("latent-6", 0) / "latent.safetensors"
    )
    for trial in trial_models(results.experiment):
        folder = results.layout.evaluation(trial, 0, "validation")
        write_evaluation(folder, evaluation_of(trial, 0, n=100))
    return results


# -------------------------------------------------------------------------------------- tables


def test_a_row_a_model_with_its_accuracy_lengths_and_costs(results):
    table = rivals_table(results).set_index("model")
    assert list(table.index) == [*RIVALS["models"], *RIVALS["references"]]
    latent, text = table.loc["latent-6"], table.loc["cot-sft"]
    of_seeds = [results.summary("latent-6", seed, "test")["accuracy"] for seed in (0, 1)]
    assert latent["accuracy"] == pytest.approx(sum(of_seeds) / 2)
    assert (latent["latents"], latent["reasoning_tokens"], latent["forwards"]) == (6, 8, 7)
    assert text["latents"] == 0
    assert text["forwards"] == text["reasoning_tokens"] > 8
    assert (latent["milliseconds_alone"], latent["milliseconds_in_batches"]) == (3.0, 0.5)
    assert latent["published"] == "49.73 (this paper, Llama); 10.00 (another)"
    assert (latent["trials"], table.loc["no-cot-sft", "trials"]) == (2, 0)
    assert (latent["trained_parameters"], text["trained_parameters"]) == (17, 12)


def test_a_latent_model_that_has_learned_to_take_no_step_needs_one_forward(results):
    for seed in (0, 1):
        evaluation = evaluation_of("latent-6-rl", seed, n=400)
        none = [replace(p, latent_steps=0, reasoning_tokens=2) for p in evaluation.predictions]
        folder = results.layout.evaluation("latent-6-rl", seed, "test")
        write_evaluation(folder, replace(evaluation, predictions=none))
    row = rivals_table(results).set_index("model").loc["latent-6-rl"]
    assert (row["latents"], row["reasoning_tokens"], row["forwards"]) == (0, 2, 1)
    assert row["reasoning_flop"] == 2 * 2 * size_of(results.experiment).block_weights


def test_training_counts_what_a_model_started_from(results):
    table = rivals_table(results).set_index("model")
    start, after = table.loc["latent-6"], table.loc["latent-6-rl"]
    entry = results.experiment.models["latent-6-rl"]
    own = entry.training.steps * entry.training.batch_size
    assert after["examples"] == start["examples"] + own
    size = size_of(results.experiment)
    learned = 15 + 6 + 8 + 6  # the teacher's cut text and answer, the student's steps and answer
    start_entry = results.experiment.models["latent-6"].training
    step = size.operations(40 + learned, learned, None, train=True)
    rows = start_entry.steps * start_entry.batch_size
    assert start["training_flop"] == pytest.approx(rows * step)
    assert after["training_flop"] > start["training_flop"]
    # Two updates on the same samples ask their prompts once.
    entry.iterations = 2
    again = training_cost.training_cost(results, "latent-6-rl", LENGTHS)
    assert again.examples == start["examples"] + -(-entry.training.steps // 2) * (
        entry.training.batch_size
    )
    assert start["training_flop"] < again.operations < after["training_flop"]


def test_a_model_without_timing_is_named_with_the_command(results):
    results.layout.timing("latent-6").unlink()
    with pytest.raises(MissingResultError, match=r"timings/latent-6\.json; make it with"):
        rivals_table(results)


def test_each_model_is_compared_with_each_reference_on_every_seed(results):
    paired = rivals_paired(results)
    assert set(paired["reference"]) == set(RIVALS["references"])
    assert len(paired) == len(RIVALS["models"]) * 2 * 2
    assert (paired["n"] == 400).all()


def test_readers_get_narrow_tables(results):
    accuracy, costs, published = readable_rivals(rivals_table(results))
    assert "Latents" in accuracy
    assert "Training FLOPs" in costs
    assert published["Model"].tolist() == ["latent-6"]
    assert max(len(line) for line in markdown_of(accuracy, RIVALS_TEXTS).splitlines()) < 140
    assert costs.set_index("Model").loc["no-cot-sft", "FLOPs a row"] == "0"


# -------------------------------------------------------------------------------------- tuning


def test_every_trial_stands_in_the_tuning_table_with_what_was_changed(results):
    table = tuning_table(results).set_index("trial")
    assert list(table.index) == ["latent-6-by-1", "latent-6-by-1-rl", "latent-6", "cot-sft"]
    assert table.loc["latent-6-by-1", "settings"] == ""
    assert 'stage: "rl"' in table.loc["latent-6-by-1-rl", "settings"]
    failed = table.loc["latent-6-by-1-rl"]
    assert failed["failed"] == "diverged at step 120"
    assert pandas.isna(failed["accuracy"])
    assert (table["n"].dropna() == 100).all()
    assert table["best"].sum() == 2
    assert table["in_table"].tolist() == [True, False, True, False]
    assert "failed: diverged" in readable_tuning(table.reset_index())["Accuracy %"][1]


def test_a_setting_that_a_trial_takes_away_stands_in_the_tuning_table():
    training, how = {"steps": 1}, {"from": "base", "method": "hrpo"}
    first = RivalPolicyModel(**how, training=training, lora={"r": 2})
    trial = RivalPolicyModel(**how, training=training, lora=None, max_prompt_tokens=None)
    assert settings_beside(first, trial) == "lora: null, max_prompt_tokens: null"


def test_of_equally_accurate_trials_the_shorter_is_best(results):
    for trial in ("latent-6", "cot-sft"):
        evaluation = evaluation_of(trial, 0, n=50)
        right = [replace(prediction, correct=True) for prediction in evaluation.predictions]
        folder = results.layout.evaluation(trial, 0, "validation")
        write_evaluation(folder, replace(evaluation, predictions=right))
    table = tuning_table(results).set_index("trial")
    assert table.loc["latent-6", "best"]
    assert not table.loc["cot-sft", "best"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": {"x": ["latent-6"] * 7}}, "7 trials; each method has 1 to 6"),
        ({"trials": {"x": ["latent-6"], "y": ["latent-6"]}}, "'latent-6' is a trial of two"),
        ({"failed": {"latent-6": "why"}}, "failed: 'latent-6' is no trial"),
        ({"models": ["nobody"]}, "report.rivals: 'nobody' is not in models"),
        ({"lines": {"speed": ["nobody"]}}, "report.rivals: 'nobody' is not in models"),
        ({"published": {"nobody": {"its Table 1": 0.4}}}, "report.rivals: 'nobody' is not in mod"),
        (
            {
                "models": ["latent-6"],
                "trials": {"x": ["latent-6"]},
                "failed": {"latent-6": "why"},
            },
            "'latent-6' has failed; take it out",
        ),
    ],
)
def test_a_mistake_in_the_section_is_named(written, change, message):
    with pytest.raises(ConfigError, match=message):
        written(0, report={"rivals": change})


# ------------------------------------------------------------------------------------- figures


def test_lines_are_joined_models_or_forced_steps(results):
    table = rivals_table(results)
    curves = {curve.model: curve for curve in curves_of(rivals_of(results), table)}
    assert list(curves) == ["latent-6", "latent-6-rl"]
    assert curves["latent-6"].latents[0] == 6
    assert curves["latent-6-rl"].latents.tolist() == list(range(9))
    assert (numpy.diff(curves["latent-6-rl"].flop) > 0).all()


def test_no_two_numbers_of_the_figure_lie_on_each_other(results):
    figure = rivals_figure(results, rivals_table(results))
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 5
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]), [
            text.get_text() for text in axes.texts
        ]


def test_a_model_whose_operations_are_not_counted_stands_on_the_left_alone(results):
    table = rivals_table(results)
    table.loc[table["model"] == "latent-6", "reasoning_flop"] = numpy.nan
    left, right = rivals_figure(results, table).axes
    assert len(left.texts) == len(right.texts) + 1 == 5
    assert readable_rivals(table)[1].set_index("Model").loc["latent-6", "FLOPs a row"] == ""


def test_an_experiment_without_rivals_draws_that_there_are_none(written):
    results = written(0)
    for draw in RIVAL_FIGURES.values():
        assert len(draw(results, pandas.DataFrame()).axes) == 0


def test_the_page_shows_tables_figures_tests_and_trials(results):
    table = rivals_table(results)
    for name, draw in RIVAL_FIGURES.items():
        save(draw(results, table), results.layout.figures, name)
    content = rivals_content(results, results.layout.figures)
    assert [figure["name"] for figure in content["figures"]] == list(RIVAL_FIGURES)
    assert len(content["tables"]) == 3
    assert len(content["tuning"]) == 4
