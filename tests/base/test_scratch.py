"""The base model from scratch: its texts."""

import numpy as np

from latent_reasoning.base.scratch import with_any_opening
from latent_reasoning.config import ReasoningMix
from latent_reasoning.data.dial.styles import styled_reasonings
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import encode_plain_rows


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
