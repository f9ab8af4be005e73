"""Adding the four special tokens to a model and its tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from latent_reasoning.config import ConfigError, Model
from latent_reasoning.data.rows import DataError
from latent_reasoning.data.sequences import SPECIAL_TOKENS
from latent_reasoning.model.folder import load_tokenizer
from latent_reasoning.model.special_tokens import add_special_tokens, check_tokenizer, make_latent
from latent_reasoning.model.tensors import CheckpointError
from tests.data.tokenizers import ADDING_SPACES, imitation
from tests.model.models import HIDDEN, build_base, build_tokenizer


def with_vocabulary(vocabulary, **tokens):
    """A tokenizer of words with the given ids, which may have gaps."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


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


@pytest.mark.parametrize("present", [SPECIAL_TOKENS[:1], SPECIAL_TOKENS[1:3]])
def test_tokens_that_are_there_keep_their_rows_beside_new_ones(present):
    base, tokenizer = build_base(vocabulary=34), build_tokenizer(special=False)
    tokenizer.add_tokens(list(present), special_tokens=True)
    count = len(tokenizer)
    before = base.get_input_embeddings().weight.detach().clone()
    add_special_tokens(base, tokenizer)
    after = base.get_input_embeddings().weight
    assert torch.equal(after[:count], before[:count])
    assert torch.allclose(after[count:], before[:count].mean(0).expand(128 - count, -1))
    assert len(tokenizer) == 34


def test_a_row_is_not_copied_to_a_token_that_has_one():
    with pytest.raises(ConfigError, match=r"model\.start_token_from: .* has this token already"):
        add_special_tokens(build_base(), build_tokenizer(), start_token_from="w3")


def test_rows_after_a_gap_between_ids_are_kept():
    vocabulary = {"a": 0, "b": 1, "c": 4, "d": 20, "<unk>": 35}
    base, tokenizer = build_base(), with_vocabulary(vocabulary, unk_token="<unk>")
    before = base.get_input_embeddings().weight.detach().clone()
    ids = add_special_tokens(base, tokenizer)
    assert (ids.start, ids.end, ids.continue_, ids.stop) == (36, 37, 38, 39)
    assert torch.equal(base.get_input_embeddings().weight[:36], before[:36])


def test_an_id_that_two_tokens_would_share_is_refused():
    """`<END>` would become 5, which is `b`: tokenizers numbers new tokens from their count on."""
    tokenizer = with_vocabulary({"a": 0, "<unk>": 1, "c": 2, "d": 3, "b": 5}, unk_token="<unk>")
    with pytest.raises(DataError, match="ids that other tokens have"):
        add_special_tokens(build_base(), tokenizer)


@pytest.mark.parametrize("special", [True, False])
def test_tokens_without_rows_get_the_mean_row(special):
    """The tokenizer is larger than the matrix: a padding token, or all of the latent ones."""
    base, tokenizer = build_base(vocabulary=30), build_tokenizer(special)
    if not special:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    before = base.get_input_embeddings().weight.detach().clone()
    ids = add_special_tokens(base, tokenizer)
    after = base.get_input_embeddings().weight
    assert ids.start == (30 if special else 31)
    assert torch.allclose(after[30:], before.mean(0).expand(98, -1))
    assert torch.equal(after[:30], before)


def test_a_padding_token_without_a_row_gives_way_to_eos():
    base, tokenizer = build_base(vocabulary=30), build_tokenizer(special=False)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    check_tokenizer(tokenizer, base)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (29, r"has 1 tokens beyond the model's 29 embeddings, such as ' 0' \(id 29\)"),
        (1, "such as '<eos>'"),
    ],
)
def test_the_tokenizer_of_another_model_is_refused(rows, reason):
    with pytest.raises(DataError, match=reason):
        check_tokenizer(build_tokenizer(special=False), build_base(vocabulary=rows))


def test_a_matrix_with_rows_to_spare_is_accepted():
    tokenizer = build_tokenizer(special=False)
    check_tokenizer(tokenizer, build_base(vocabulary=64))
    assert tokenizer.pad_token == "<eos>"


@pytest.mark.parametrize("kind", ADDING_SPACES)
def test_a_row_is_copied_from_the_token_of_the_text_and_not_of_a_space_before_it(kind):
    tokenizer = imitation(kind)
    base = build_base(vocabulary=len(tokenizer))
    colon = tokenizer.convert_tokens_to_ids(":")
    ids = add_special_tokens(base, tokenizer, start_token_from=":")
    embeddings = base.get_input_embeddings().weight
    assert torch.equal(embeddings[ids.start], embeddings[colon])


def test_a_tokenizer_without_eos_is_refused_in_one_line(tmp_path):
    with_vocabulary({"a": 0, "<unk>": 1}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no EOS token.*eos_token in tokenizer_config\.json"):
        load_tokenizer(tmp_path)
