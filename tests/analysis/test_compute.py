"""What an answer costs is counted from lengths and the model's size."""

from typing import get_args

import pytest

from latent_reasoning.analysis.compute import (
    compute_table,
    filter_weights,
    reasoning_operations,
)
from latent_reasoning.config import Model
from latent_reasoning.dag.cost import ModelSize

SIZE = ModelSize(hidden=4, intermediate=8, layers=2, key_values=4, vocabulary=10)


def test_text_passes_the_output_matrix_and_latent_steps_the_filter():
    assert SIZE.block_weights == 2 * (2 * 4 * 8 + 3 * 4 * 8)
    assert reasoning_operations(SIZE, 3, 0, None) == 2 * 3 * (320 + 40)
    for name, weights in {"none": 0, "MLP": 32, "SRE": 80, "linear": 16, "gaussian": 48}.items():
        assert filter_weights(SIZE, Model(recurrent_filter=name)) == weights
        assert reasoning_operations(SIZE, 8, 6, weights) == 2 * (8 * 320 + 6 * weights)


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
