"""Adding the four special tokens to a model and its tokenizer."""

import pytest
import torch

from latent_reasoning.config import ConfigError, Model
from latent_reasoning.model.special_tokens import add_special_tokens, make_latent
from tests.model.models import HIDDEN, build_base, build_tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_new_rows_are_the_mean_and_matrices_a_multiple_of_128(architecture, tied):
    base = build_base(architecture, tied, vocabulary=30)
    tokenizer = build_tokenizer(special=False)
    before_in = base.get_input_embeddings().weight.detach().clone()
    before_out = base.get_output_embeddings().weight.detach().clone()
    ids = add_special_tokens(base, tokenizer)
    assert (ids.start, ids.end, ids.continue_, ids.stop) == (30, 31, 32, 33)
    for matrix, before in (
        (base.get_input_embeddings().weight, before_in),
        (base.get_output_embeddings().weight, before_out),
    ):
        assert matrix.shape == (128, HIDDEN)
        assert torch.equal(matrix[:30], before)
        assert torch.allclose(matrix[30:], before.mean(0).expand(98, -1), atol=1e-12)
    assert base.config.vocab_size == 128
    assert (base.get_input_embeddings().weight is base.get_output_embeddings().weight) == tied


def test_rows_that_the_tokenizer_does_not_use_yet_are_taken_first():
    base = build_base(vocabulary=128)
    tokenizer = build_tokenizer(special=False)
    ids = add_special_tokens(base, tokenizer)
    assert ids.stop == 33
    matrix = base.get_input_embeddings().weight
    assert matrix.shape == (128, HIDDEN)
    assert torch.allclose(matrix[33], matrix[:30].mean(0), atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_start_and_end_may_begin_as_copies_of_other_tokens(tied):
    base = build_base(tied=tied, vocabulary=30)
    tokenizer = build_tokenizer(special=False)
    ids = add_special_tokens(base, tokenizer, start_token_from="w7 w8", end_token_from="w3")
    for embeddings in (base.get_input_embeddings(), base.get_output_embeddings()):
        assert torch.equal(embeddings.weight[ids.start], embeddings.weight[9])
        assert torch.equal(embeddings.weight[ids.end], embeddings.weight[5])


def test_a_text_without_tokens_is_refused_with_its_key():
    with pytest.raises(ConfigError, match=r"model\.start_token_from: .* no token"):
        add_special_tokens(build_base(vocabulary=30), build_tokenizer(special=False), " ")


def test_tokens_that_are_there_keep_their_rows():
    base, tokenizer = build_base(), build_tokenizer()
    before = base.get_input_embeddings().weight.detach().clone()
    ids = add_special_tokens(base, tokenizer)
    assert (ids.start, ids.stop) == (30, 33)
    assert torch.equal(base.get_input_embeddings().weight, before)


def test_a_fresh_latent_model_continues_with_probability_one_half():
    base = build_base(vocabulary=30)
    model = make_latent(base, build_tokenizer(special=False), Model(stop_head_temperature=2.0))
    assert model.settings.stop_head_temperature == 2.0
    hidden = torch.randn(5, HIDDEN, dtype=torch.float64)
    assert torch.allclose(
        model.stop_logits(hidden).softmax(-1), torch.full((5, 2), 0.5).double(), atol=1e-12
    )
