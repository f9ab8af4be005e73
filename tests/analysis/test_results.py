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


def test_a_missing_file_is_named_with_the_command_that_makes_it(written):
    results = written(0)
    layout = results.layout
    shutil.rmtree(layout.evaluation("latent-6", 0, "test"))
    shutil.rmtree(layout.model("latent-6", 0))
    for read, named, made in (
        (
            lambda: results.summary("latent-6", 0, "test"),
            "no evaluation of latent-6, seed 0, on test",
            layout.evaluation("latent-6", 0, "test") / "summary.json",
        ),
        (
            lambda: results.training("latent-6", 0),
            "no training curve of latent-6, seed 0",
            layout.model("latent-6", 0),
        ),
    ):
        with pytest.raises(MissingResultError, match=named) as error:
            read()
        assert f"snakemake {made}" in str(error.value)


def test_pooled_predictions_carry_their_seed(three_seeds):
    pooled = three_seeds.pooled_predictions("latent-6", "test")
    assert dict(pooled["seed"].value_counts()) == {0: 400, 1: 400, 2: 400}
