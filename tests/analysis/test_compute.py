"""What an answer costs is counted from lengths and the model's size."""

from types import SimpleNamespace
from typing import get_args

import pandas
import pytest

from latent_reasoning.analysis.compute import (
    ReasoningWeights,
    compute_table,
    filter_weights,
    is_latent,
    reasoning_operations,
    reasoning_weights,
    tokens_written,
)
from latent_reasoning.config import DecodeModel, Model
from latent_reasoning.dag.cost import ModelSize

SIZE = ModelSize(hidden=4, intermediate=8, layers=2, key_values=4, vocabulary=10)


def test_each_token_passes_the_blocks_and_each_latent_step_the_filter():
    assert SIZE.block_weights == 2 * (2 * 4 * 8 + 3 * 4 * 8)
    for name, weights in {"none": 0, "MLP": 32, "SRE": 80, "linear": 16, "gaussian": 48}.items():
        assert filter_weights(SIZE, Model(recurrent_filter=name)) == weights
    assert filter_weights(SIZE, Model(recurrent_filter="none", stop_rule="marker")) == 40
    assert reasoning_operations(8, 6, ReasoningWeights(320, 48)) == 2 * (8 * 320 + 6 * 48)


def test_text_passes_the_output_matrix_too(three_seeds):
    assert reasoning_weights(three_seeds, SIZE, "cot-sft", latent=False).token == 320 + 40
    latent = reasoning_weights(three_seeds, SIZE, "latent-6-rl", latent=True)
    assert (latent.token, latent.step) == (320, 32)


@pytest.mark.parametrize("name", get_args(Model.model_fields["recurrent_filter"].annotation))
def test_every_filter_is_counted(name):
    assert filter_weights(SIZE, Model(recurrent_filter=name)) >= 0


def test_a_row_a_model_with_means_over_seeds(three_seeds):
    table = compute_table(three_seeds).set_index("model")
    assert list(table.index) == three_seeds.models
    assert table.loc["no-cot-sft", "reasoning_megaflop"] == 0
    latent, rl = table.loc["latent-6"], table.loc["latent-6-rl"]
    assert latent["milliseconds"] == pytest.approx(1e3 * 1.5 / 400)
    assert rl["reasoning_megaflop"] < latent["reasoning_megaflop"]
    assert latent["reasoning_tokens"] == 8


def test_a_search_counts_every_text_that_it_has_written():
    predictions = pandas.DataFrame({"reasoning_tokens": [10, 20], "searched": [0, 2]})
    assert tokens_written(predictions) == (10 + 3 * 20) / 2
    assert tokens_written(predictions[["reasoning_tokens"]]) == 15


def test_a_chain_at_another_speed_is_latent_even_where_no_answer_took_a_step():
    models = {"fast": DecodeModel(**{"from": "colar"}, method="colar")}
    models["soft"] = DecodeModel(**{"from": "cot-sft"})
    results = SimpleNamespace(experiment=SimpleNamespace(models=models))
    none = pandas.DataFrame({"latent_steps": [0, 0]})
    assert [is_latent(results, model, none) for model in models] == [True, False]
