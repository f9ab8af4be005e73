"""Prompts of RL: which rows, as what text, up to which length."""

import pytest

from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.rl.prompts import label_number, rl_prompts
from tests.rl.conftest import generated_rows, latent_tokenizer

QUESTION = "Ada's dial runs 0 to 6. Monday plus 6. It starts at 5. Where does it end?"


@pytest.fixture(scope="module")
def tokenizer():
    return latent_tokenizer(7)


def rows(*answers: str, question: str = QUESTION) -> list[Row]:
    return [Row(f"rl-{i}", question, None, answer) for i, answer in enumerate(answers)]


def test_prompts_end_in_start_and_keep_negative_answers(tokenizer):
    (prompt,) = rl_prompts(rows("-3"), tokenizer, prefix="Question: ", max_prompt_tokens=None)
    assert prompt.ids[-1] == tokenizer.convert_tokens_to_ids("<START>")
    assert prompt.text == f"Question: {QUESTION}<START>"
    assert (prompt.label, prompt.number_rule) == ("-3", "exact")


def test_prompts_longer_than_the_limit_are_dropped(tokenizer):
    both = [*rows("1"), *rows("2", question="Ada's dial runs. " + QUESTION)]
    length = len(rl_prompts(both[:1], tokenizer, prefix="", max_prompt_tokens=None)[0].ids)
    kept = rl_prompts(both, tokenizer, prefix="", max_prompt_tokens=length)
    assert [prompt.label for prompt in kept] == ["1"]


def test_generated_rows_fit_the_default_limit(tokenizer):
    made, _ = generated_rows(20, 0, max_steps=5, modulus=7)
    assert len(rl_prompts(made, tokenizer, prefix="Question: ", max_prompt_tokens=100)) == 20


@pytest.mark.parametrize(
    ("answers", "limit", "problem"),
    [
        (("1", "2"), 3, r"all 2 prompts .* max_prompt_tokens: 3"),
        (("1", "nan"), None, r"row rl-1: .*'nan'"),
    ],
)
def test_no_prompt_left_and_an_answer_without_a_number_are_errors(
    tokenizer, answers, limit, problem
):
    with pytest.raises(DataError, match=problem):
        rl_prompts(rows(*answers), tokenizer, prefix="", max_prompt_tokens=limit)


def test_the_number_of_a_label_is_read_by_the_rule():
    assert label_number("1,200", "row 3") == 1200.0
    assert (label_number("1e3", "row 3"), label_number("1e3", "row 3", "public")) == (1000.0, 1.0)
