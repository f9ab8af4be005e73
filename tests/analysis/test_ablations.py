"""The ablations' table and figure: each change before and after its RL, over all seeds."""

import pytest

from latent_reasoning.analysis.ablations import ablations_figure, ablations_of, ablations_table
from latent_reasoning.config import ConfigError
from latent_reasoning.dag.planning import ablation_models
from tests.analysis.conftest import experiment

REPORT = {"ablations": {"the recipe": "latent-6", "by one": "latent-6-by-1"}}


@pytest.fixture
def results(written):
    return written(0, 1, report=REPORT)


def test_each_change_has_a_row_before_and_one_after_rl(results):
    table = ablations_table(results)
    assert table["model"].tolist() == [
        *("latent-6", "latent-6-rl", "latent-6-by-1", "latent-6-by-1-rl")
    ]
    assert table["phase"].tolist() == ["latent SFT", "RL"] * 2
    assert ablation_models(results.experiment) == [
        *("latent-6", "latent-6-by-1", "latent-6-rl", "latent-6-by-1-rl")
    ]


def test_figures_are_means_over_seeds_and_extremes(results):
    row = ablations_table(results).set_index("model").loc["latent-6-rl"]
    of_seeds = [results.summary("latent-6-rl", seed, "test")["accuracy"] for seed in (0, 1)]
    assert row["accuracy"] == pytest.approx(sum(of_seeds) / 2)
    assert (row["accuracy_seed_min"], row["accuracy_seed_max"]) == (min(of_seeds), max(of_seeds))
    forced = [results.forced("latent-6-rl", seed, "test") for seed in (0, 1)]
    correct = sum(curve.set_index("latent_steps").loc[3, "correct"] for curve in forced)
    assert row["forced_3"] == pytest.approx(correct / 800)


def test_the_figure_names_every_change(results):
    axes = ablations_figure(results).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(REPORT["ablations"])


def test_the_legend_names_rl_where_the_recipe_itself_has_none(written):
    models = experiment().model_dump(mode="json", by_alias=True)["models"]
    del models["latent-6-rl"]
    figure = ablations_figure(written(0, models=models, report=REPORT))
    assert [text.get_text() for text in figure.legends[0].texts] == ["latent SFT", "and RL"]


def test_a_change_without_rl_and_an_experiment_without_changes(written):
    results = written(0)
    assert ablations_of(results) == []
    assert len(ablations_figure(results).axes) == 0


def test_only_latent_sft_can_be_an_ablation(written):
    with pytest.raises(ConfigError, match=r"report.ablations.*'latent-6-rl' is no latent_sft"):
        written(0, report={"ablations": {"x": "latent-6-rl"}})
