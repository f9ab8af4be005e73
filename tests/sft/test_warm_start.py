"""A filter with a warm start does what soft re-embedding does, and nothing else has changed."""

import pytest
import torch

from latent_reasoning.config import Model
from latent_reasoning.data.rows import DataError
from latent_reasoning.model.special_tokens import make_latent
from latent_reasoning.sft.warm_start import states_and_targets, warm_start
from tests.model.models import build_base
from tests.sft.conftest import encode


@pytest.fixture
def teachers(rows, tokenizer, latent_model):
    return [example.teacher for example in encode(rows, tokenizer)]


def test_the_filter_alone_learns_soft_re_embedding(teachers, tokenizer, latent_model):
    before = {name: value.clone() for name, value in latent_model.named_parameters()}
    options = {"pad_id": tokenizer.pad_token_id, "batch_size": 5}
    torch.manual_seed(0)
    few = warm_start(latent_model, teachers, steps=1, **options)
    many = warm_start(latent_model, teachers, steps=300, **options)
    assert many < few / 10
    for name, value in latent_model.named_parameters():
        changed = name.startswith("recurrent_filter.")
        assert torch.equal(value, before[name]) != changed, name
        assert value.grad is None


def test_states_are_those_before_and_in_the_reasoning(teachers, tokenizer, latent_model):
    states, targets = states_and_targets(latent_model, teachers, tokenizer.pad_token_id, 5)
    assert states.shape == targets.shape
    # Rows without reasoning have no state before it.
    lengths = [teacher.reasoning_length for teacher in teachers if teacher.reasoning_length]
    assert len(states) == sum(lengths) + len(lengths)
    matrix = latent_model.base.get_input_embeddings().weight
    logits = latent_model.base.get_output_embeddings()(states)
    torch.testing.assert_close(targets, logits.softmax(-1) @ matrix)


def test_a_filter_without_weights_has_nothing_to_learn(teachers, tokenizer):
    base = build_base(vocabulary=len(tokenizer)).float()
    model = make_latent(base, tokenizer, Model(recurrent_filter="SRE"))
    options = {"steps": 3, "pad_id": tokenizer.pad_token_id, "batch_size": 5}
    assert warm_start(model, teachers, **options) is None


def test_texts_without_reasoning_are_refused(teachers, tokenizer, latent_model):
    silent = [teacher for teacher in teachers if not teacher.reasoning_length]
    options = {"steps": 3, "pad_id": tokenizer.pad_token_id, "batch_size": 5}
    with pytest.raises(DataError, match="filter_warm_start: 3 has no reasoning to learn from"):
        warm_start(latent_model, silent, **options)
