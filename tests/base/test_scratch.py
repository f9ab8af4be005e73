"""The base model from scratch: its shape and its texts."""

import numpy as np
import pytest
import torch

from latent_reasoning.base.scratch import build_base, with_any_opening
from latent_reasoning.config import Architecture, ReasoningMix
from latent_reasoning.data.dial.styles import styled_reasonings
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import encode_plain_rows
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.self_check import check_model


def test_a_share_of_the_terse_texts_opens_with_any_token_and_nothing_else_changes():
    tokenizer = build_tokenizer(generated_texts(7))
    rows = [
        Row(f"r-{i}", "Monday plus 1. Ada's dial of 7 starts at 2.", ("<<(2+1)%7=3>>",), "3")
        for i in range(600)
    ]
    mix = ReasoningMix(full=0.5, results_only=0.5)
    examples = encode_plain_rows(
        rows, tokenizer, prefix="", reasonings=styled_reasonings(rows, mix, seed=0)
    )
    opened = with_any_opening(examples, rows, tokenizer, share=0.5, seed=0)
    (results,) = tokenizer(" Results:")["input_ids"]
    drawn = set()
    changed = terse = 0
    for before, after in zip(examples, opened, strict=True):
        first = before.question_length
        terse += before.input_ids[first] == results
        different = np.flatnonzero(before.input_ids != after.input_ids)
        if different.size:
            assert different.tolist() == [first]
            assert before.input_ids[first] == results
            drawn.add(int(after.input_ids[first]))
            changed += 1
        assert after.labels[first] == after.input_ids[first]
    assert 250 < terse < 350
    assert 0.4 < changed / terse < 0.6
    assert len(drawn) > 50
    assert not drawn & set(tokenizer.all_special_ids)
    again = with_any_opening(examples, rows, tokenizer, share=0.5, seed=0)
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(opened, again, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_of_either_family_has_the_configured_shape(family):
    tokenizer = build_tokenizer(generated_texts(7))
    shape = Architecture(family=family, hidden_size=24, intermediate_size=40, initializer_range=0.5)
    torch.manual_seed(0)
    base = build_base(shape, tokenizer)
    assert base.config.model_type == family
    widths = {p.shape for n, p in base.named_parameters() if "mlp" in n and p.ndim == 2}
    assert {tuple(sorted(w)) for w in widths} == {(24, 40)}
    table = base.get_input_embeddings().weight
    assert table.shape == (len(tokenizer), 24)
    assert base.get_output_embeddings().weight is table
    assert 0.4 < table[1:].std() < 0.6
    check_model(LatentReasoner(base, None))
