"""The filter of training rows, labels, and the two readings of ` The answer is:`, by both rules.

What is a number: `test_numbers.py` for our own rule, here for the public code's.
"""

from __future__ import annotations

import random

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

# Answer, whether the public filter keeps it, whether ours does.
FILTER = [
    *[(answer, True, True) for answer in ("5", "-5", "1,200", "1e3", "1_000", " 7 ", "3.50")],
    *[(answer, True, True) for answer in (".5", "-0", "１２", "+4", "1e400")],
    *[(answer, True, False) for answer in ("nan", "1,20,0", "3,5")],
    *[(answer, False, True) for answer in ("$12", "1/2", "-$5", "−5", "($5)", "- 5")],
    *[(answer, False, False) for answer in ("", "abc", "inf", "-inf", "infinity", "12 dollars")],
    *[(answer, False, False) for answer in ("50%", "1 234", "10^6", "#### 5")],
]


@pytest.mark.parametrize(("answer", "public", "exact"), FILTER)
def test_the_filter_keeps_plain_numbers(answer: str, public: bool, exact: bool) -> None:
    assert is_plain_number(answer, "public") is public
    assert is_plain_number(answer) is exact


@pytest.mark.parametrize(
    ("answer", "public", "exact"),
    [
        ("-5", True, True),
        ("-1,000", True, True),
        ("-0", False, False),
        ("nan", False, False),
        ("-1e-400", False, True),
    ],
)
def test_minus_zero_and_nan_are_not_negative(answer: str, public: bool, exact: bool) -> None:
    assert is_negative(answer, "public") is public
    assert is_negative(answer) is exact


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
        ("-$5", "5"),
        (".", None),
        ("", None),
        ("none", None),
    ],
)
def test_the_public_rule_takes_the_first_digits(text: str, number: str | None) -> None:
    assert find_number(text, "public") == number
    assert parse_number(text, "public") == (None if number is None else float(number))


@pytest.mark.parametrize(
    ("label", "output", "public", "exact"),
    [
        ("18", "0018", True, True),
        ("18", "１８", True, True),
        ("18", "17.99999", False, False),
        ("18", "17.9999999", True, True),
        ("1,200", "1200", True, True),
        ("1_000", "1000", False, True),
        ("5", "10-5", False, False),
        ("10", "10-5", True, False),
        ("nan", "5", False, False),
        ("2e-7", "0", False, False),
        ("0.0000002", "0", True, False),
        ("-5", " -$5", False, True),
        ("1000", "1e3", False, True),
        ("9" * 400, "9" * 400, True, True),
        ("9" * 400, "9" * 399 + "8", True, False),
        ("9" * 400, "5", False, False),
    ],
)
def test_answers_match_within_the_tolerance(
    label: str, output: str, public: bool, exact: bool
) -> None:
    assert answers_match(label, output, "public") is public
    assert answers_match(label, output) is exact


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("72 dollars", 72.0),
        ("The answer is -$72.", -72.0),
        ("50%", 50.0),
        ("9 pens less 4 are 5", None),
        ("3,5", None),
        ("about 1.234,50 euros", None),
        ("9" * 400, float("inf")),
        ("-1e400", float("-inf")),
        ("none", None),
    ],
)
def test_a_label_in_words_is_read_where_it_holds_a_single_number(
    answer: str, value: float | None
) -> None:
    assert parse_number(answer) == value
    assert not is_plain_number(answer) or value in (float("inf"), float("-inf"))


def test_whatever_is_a_plain_number_is_right_as_the_answer_to_itself() -> None:
    generator = random.Random(0)
    characters = "0123456789" * 2 + " ,.-+−–/$€()eE_%^×=:\n½²٣５#*kMUSDab"
    plain = 0
    for _ in range(3000):
        text = "".join(generator.choices(characters, k=generator.randint(1, 5)))
        if not is_plain_number(text):
            continue
        plain += 1
        assert judge(text, f" The answer is: {text}", "text").correct, text
        if is_plain_number(text, "public"):
            assert parse_number(text) == float(text.replace(",", "")), text
    assert plain > 400


@pytest.mark.parametrize(
    ("label", "completion", "verdict"),
    [
        ("18", "<|CONTINUE|><|STOP|> The answer is: 18<|eot_id|>", Verdict("18", True, True)),
        ("18", "<|STOP|> the ANSWER is: 18", Verdict("18", True, True)),
        ("18", "<|STOP|> The answer is: 5 The answer is: 18", Verdict("18", True, True)),
        ("5", "<|STOP|> The answer is: 5 The answer is: 18", Verdict("18", True, False)),
        ("18", "<|STOP|> İİ The answer is: 18", Verdict("18", True, True)),
        ("1800", "<|STOP|> hmm The answer is: $1,800.00 or 3", Verdict("$1800.00", True, True)),
        ("-5", "<|STOP|> The answer is: −$5.", Verdict("-$5.", True, True)),
        ("18", "<|STOP|> The answer is: 10 - 8 = 2", Verdict(None, True, False)),
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


def test_the_public_rule_judges_by_the_first_digits() -> None:
    completion = "<|STOP|> hmm The answer is: $1,8.00 or 3"
    assert judge("18", completion, "latent", "public") == Verdict("18.00", True, True)
    assert judge("18", " 1,8", "forced", "public") == Verdict("18", True, True)


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
        ("<|STOP|>  The answer is: 5", True),
        ("<|CONTINUE|> <|CONTINUE|><|STOP|>\n The answer is: 5", True),
        ("\t The answer is: 5", True),
        ("<|STOP|> the answer is: 5", False),
        ("<|STOP|>The answer is: 5", False),
        ("<END> The answer is: 5", False),
        ("", False),
    ],
)
def test_rl_wants_one_prefix_and_only_latent_tokens_and_white_space_before_it(
    completion: str, formatted: bool
) -> None:
    assert is_well_formatted(completion) is formatted
