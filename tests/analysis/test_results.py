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
    evaluation = results.layout.evaluation("latent-6", 0, "test")
    model = results.layout.model("latent-6", 0)
    shutil.rmtree(evaluation)
    shutil.rmtree(model)
    with pytest.raises(MissingResultError, match="no evaluation of latent-6, seed 0, on test") as e:
        results.summary("latent-6", 0, "test")
    assert f"snakemake {evaluation / 'summary.json'}" in str(e.value)
    with pytest.raises(MissingResultError, match="no training curve of latent-6, seed 0") as e:
        results.training("latent-6", 0)
    assert f"snakemake {model}" in str(e.value)
