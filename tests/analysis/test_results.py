"""Reading results: what belongs to the table, and clear errors for what is missing."""

import shutil

import pytest

from latent_reasoning.analysis.results import MissingResultError, Pair, Results


def test_the_appendix_is_apart_from_the_main_models(written):
    results = written(0, report={"appendix": ["latent-6-by-1", "latent-6-by-1-rl"]})
    assert results.models == ["cot-sft", "no-cot-sft", "latent-6", "latent-6-rl"]
    appendix = Results.of(results.experiment, appendix=True)
    assert appendix.models == ["latent-6-by-1", "latent-6-by-1-rl"]
    assert appendix.rl_pairs() == [Pair("latent-6-by-1-rl", "latent-6-by-1")]


def test_a_missing_evaluation_is_named_with_the_command_that_makes_it(written):
    results = written(0)
    folder = results.layout.evaluation("latent-6", 0, "test")
    shutil.rmtree(folder)
    with pytest.raises(MissingResultError) as error:
        results.summary("latent-6", 0, "test")
    assert "no evaluation of latent-6, seed 0, on test" in str(error.value)
    assert f"snakemake {folder}/summary.json" in str(error.value)


def test_a_missing_training_curve_is_named_with_the_command_that_makes_it(written):
    results = written(0)
    folder = results.layout.model("latent-6", 0)
    shutil.rmtree(folder)
    with pytest.raises(MissingResultError, match="no training curve of latent-6, seed 0") as error:
        results.training("latent-6", 0)
    assert f"snakemake {folder}" in str(error.value)


def test_pooled_predictions_carry_their_seed(three_seeds):
    pooled = three_seeds.pooled_predictions("latent-6", "test")
    assert dict(pooled["seed"].value_counts()) == {0: 400, 1: 400, 2: 400}
