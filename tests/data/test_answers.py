"""The answer filter, number comparison, and the two readings of ` The answer is:`."""

from __future__ import annotations

import pytest

from latent_reasoning.data.answers import (
    Verdict,
    answers_match,
    find_number,
    is_negative,
    is_plain_number,
    is_well_formatted,
    judge,
    parse_number,
)


@pytest.mark.parametrize(
    "answer",
    ["5", "-5", "1,200", "1,20,0", "nan", "1e3", "1_000", " 7 ", "3.50", ".5", "-0", "１２", "+4"],
)
def test_plain_numbers_pass_the_filter(answer: str) -> None:
    assert is_plain_number(answer)


@pytest.mark.parametrize(
    "answer", ["", "abc", "inf", "-inf", "infinity", "$12", "12 dollars", "1/2", "50%"]
)
def test_other_answers_do_not_pass_the_filter(answer: str) -> None:
    assert not is_plain_number(answer)


@pytest.mark.parametrize(
    ("answer", "negative"), [("-5", True), ("-1,000", True), ("-0", False), ("nan", False)]
)
def test_minus_zero_and_nan_are_not_negative(answer: str, negative: bool) -> None:
    assert is_negative(answer) is negative


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,200.50 dollars", "1200.50"),
        ("18.", "18."),
        ("--18", "-18"),
        ("- 18", "18"),
        ("x18y", "18"),
        ("1.8e1", "1.8"),
        (".18", ".18"),
        ("１８", "１８"),
        (".", None),
        ("", None),
        ("none", None),
    ],
)
def test_the_first_number_is_found(text: str, number: str | None) -> None:
    assert find_number(text) == number
    assert parse_number(text) == (None if number is None else float(number))


@pytest.mark.parametrize(
    ("label", "output", "verdict"),
    [
        ("18", "0018", True),
        ("18", "１８", True),
        ("18", "17.99999", False),
        ("18", "17.9999999", True),
        ("1,200", "1200", True),
        ("1_000", "1000", False),
        ("5", "10-5", False),
        ("nan", "5", False),
        ("9" * 400, "9" * 400, True),
        ("9" * 400, "5", False),
    ],
)
def test_answers_match_within_a_millionth(label: str, output: str, verdict: bool) -> None:
    assert answers_match(label, output) is verdict


@pytest.mark.parametrize(
    ("label", "completion", "verdict"),
    [
        ("18", "<|CONTINUE|><|STOP|> The answer is: 18<|eot_id|>", Verdict("18", True, True)),
        ("18", "<|STOP|> the ANSWER is: 18", Verdict("18", True, True)),
        ("18", "<|STOP|> The answer is: 5 The answer is: 18", Verdict("18", True, True)),
        ("5", "<|STOP|> The answer is: 5 The answer is: 18", Verdict("18", True, False)),
        ("18", "<|STOP|> İİ The answer is: 18", Verdict("18", True, True)),
        ("18", "<|STOP|> hmm The answer is: $1,8.00 or 3", Verdict("18.00", True, True)),
        ("18", "<|STOP|> The answer is: none", Verdict(None, True, False)),
        ("18", "<|STOP|>The answer is: 18", Verdict(None, False, False)),
        ("18", "<|STOP|> The answer is : 18", Verdict(None, False, False)),
        ("18", "<|STOP|> The anſwer is: 18", Verdict(None, False, False)),
        ("18", "", Verdict(None, False, False)),
    ],
)
def test_the_evaluation_reads_the_number_after_the_last_prefix(
    label: str, completion: str, verdict: Verdict
) -> None:
    assert judge(label, completion, "latent") == verdict


def test_a_latent_answer_without_stop_is_wrong_where_a_text_answer_is_right() -> None:
    assert judge("18", " The answer is: 18", "latent") == Verdict(None, False, False)
    assert judge("18", " The answer is: 18", "text") == Verdict("18", True, True)


@pytest.mark.parametrize(
    ("completion", "extracted", "correct"),
    [
        (" 18", "18", True),
        (" The answer is: 18", "18", True),
        (" 17, 18", "17", False),
        ("", None, False),
    ],
)
def test_a_forced_completion_is_the_answer_itself(
    completion: str, extracted: str | None, correct: bool
) -> None:
    assert judge("18", completion, "forced") == Verdict(extracted, True, correct)


@pytest.mark.parametrize(
    ("completion", "formatted"),
    [
        ("<|CONTINUE|><|CONTINUE|><|STOP|> The answer is: 5", True),
        (" The answer is: 5", True),
        ("<|STOP|><START> The answer is:", True),
        ("<|STOP|> The answer is: <|CONTINUE|> 5<|eot_id|>", True),
        ("<|STOP|> The answer is: 5 The answer is: 6", False),
        ("<|STOP|>x The answer is: 5", False),
        ("<|STOP|>  The answer is: 5", False),
        ("<|STOP|> the answer is: 5", False),
        ("<|STOP|>The answer is: 5", False),
        ("<END> The answer is: 5", False),
        ("", False),
    ],
)
def test_rl_wants_one_prefix_and_only_latent_tokens_before_it(
    completion: str, formatted: bool
) -> None:
    assert is_well_formatted(completion) is formatted
