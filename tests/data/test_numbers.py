"""The number grammar: what is read, with which value, and what is refused instead of misread."""

from __future__ import annotations

import json
import os
import random
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from latent_reasoning.config import PROJECT_ROOT
from latent_reasoning.data.numbers import (
    equal,
    first_number,
    only_number,
    read_number,
)

DATA = Path(os.environ.get("LATENT_REASONING_DATA", PROJECT_ROOT.parent / "shared" / "data"))

READ = {
    "72": "72",
    "+4": "4",
    " 7 ": "7",
    "0018": "18",
    "18.": "18",
    ".5": "0.5",
    "-0": "0",
    "１８": "18",
    "１，２３４": "1234",
    "٣": "3",
    # Groups of digits.
    "1,200": "1200",
    "1,234,567.50": "1234567.5",
    "12,34,567": "1234567",
    "1_000": "1000",
    # Exponents, also beyond a float's range.
    "1e3": "1000",
    "3e16": "30000000000000000",
    "2.0107e-06": "0.0000020107",
    "-2.4967E-05": "-0.000024967",
    "2e−5": "0.00002",
    "1e400": "1" + "0" * 400,
    # Signs: hyphen, U+2212, dashes, full width, words; before, inside and after a currency.
    "-5": "-5",
    "- 5": "-5",
    "−5": "-5",
    "–5": "-5",
    "－５": "-5",
    "minus 5": "-5",
    "Negative 5": "-5",
    "minus5": "-5",
    "-$5": "-5",
    "$-5": "-5",
    "- $ 5": "-5",
    "−€1,287": "-1287",
    "-5 €": "-5",
    "-US$5": "-5",
    "minus$5": "-5",
    "USD -5": "-5",
    "5 EUR": "5",
    "$1,200.50": "1200.5",
    # Accounting.
    "($5)": "-5",
    "$(5)": "-5",
    "(1,234.50)": "-1234.5",
    "-₹5,00,000": "-500000",
    "( 5 € )": "-5",
    # Fractions.
    "1/2": "1/2",
    "-1/3": "-1/3",
    "2 1/2": "5/2",
    "-2 1/2": "-5/2",
    "$1/4": "1/4",
}

REFUSED = """
3,5|1.234,50|€5,50|1,2345|1234,567|1,20,0|1__000|1.2.3|1 234|5\u00a0000|1\u2019234|1\u066b5
10^6|10 ^ 6|10^{6}|10²|10**6|1.5 × 10^6|1.5x10^6|5x3|5 x 3|2π|√2|\\sqrt{2}|2\\sqrt{3}|\\frac{1}{2}
,5|-,5|.,5|2 and a half|2 and 1/2|1 ½|5 万|1.5 e3|-**5**|-\\boxed{5}|-[5]|-\\$5
10 - 7 = 3|9-4=5|5-7|5 – 7|10–12|1:30|3:2|3/4/2024|1/0|0x10|1e99999
0,125|-0,125|Rs.5|No.5|#DIV/0!|1.#INF|1.5D+03|5 e+3|tensor(5)|(5%)|( 5 \\% )|&minus;5|―5|⁻5|5 k
2 & a half|2 and three quarters|5 lac|5mn|$1.2 M|5 K|1.5 X 10^6|1.5 ⋅ 10^6|1.5 * 10⁶|2\u00a0½
10\\ 000|COVID-19|Day–5|five (5)|Twenty (20)|˗5|₋5|➖5
5-|5−|--5|+-5|-(5)|±5|—5|-Rs. 5|½|2½|5万|5 million|$1.5 billion|two dozen: 2 dozen|5k|$5M|5bn
"""

IN_TEXT = {
    " 72 dollars": "72",
    "The answer is 72.": "72",
    " $1,200.50 per year": "1200.5",
    " -$5.": "-5",
    " ($5) on balance": "-5",
    " 50%": "50",
    "**18**": "18",
    "\\boxed{-5}": "-5",
    "\\(5\\)": "5",
    "18<|eot_id|>": "18",
    "<|CONTINUE|> 5": "5",
    "18\n20": "18",
    "17, 18": "17",
    "18. The total is 20.": "18",
    "18th": "18",
    "x = 18": "18",
    "5 3 3": "5",
    "5x more": "5",
    "5 M&Ms": "5",
    "5 lacquers": "5",
    "2 1/2 cups": "5/2",
    "#### 5": "5",
    "16/2 = 8": "8",
    "10 + 8 = 18": "10",
    "<<(0+3)%7=3>>": "0",
    "5*3": "5",
    "Well, 5": "5",
    "Therefore, -$5": "-5",
    "so; 5": "5",
    "It is known.\n5": "5",
    "Terminus 5": "5",
    "USD-5": "-5",
    "5\n½": "5",
}


@pytest.mark.parametrize(("text", "value"), READ.items())
def test_a_plain_number_has_one_value_in_labels_and_in_completions(text: str, value: str) -> None:
    assert read_number(text) == Fraction(value)
    for completion in (f" {text}", f" {text}\n", f"{text} in all"):
        assert first_number(completion).value == Fraction(value), completion
    assert only_number(f"It is {text}").value == Fraction(value)


@pytest.mark.parametrize("text", [t for line in REFUSED.split("\n") for t in line.split("|") if t])
def test_what_could_be_misread_is_no_number_at_all(text: str) -> None:
    assert read_number(text) is None
    assert first_number(f" {text} ") is None
    assert only_number(text) is None


@pytest.mark.parametrize(("text", "value"), IN_TEXT.items())
def test_the_first_number_of_a_text_is_read_without_what_follows(text: str, value: str) -> None:
    assert first_number(text).value == Fraction(value)


def test_the_only_number_of_a_text_has_to_be_the_only_one() -> None:
    assert only_number("72 dollars") == ("72", 72)
    for text in ("9 pens less 4 are 5", "17, 18", "none", ""):
        assert only_number(text) is None


def test_every_number_reads_back_however_it_is_formatted() -> None:
    generator = random.Random(0)
    for _ in range(300):
        number = generator.choice([-1, 1]) * generator.randrange(10 ** generator.randint(1, 20))
        exact = Decimal(number).scaleb(-generator.randint(0, 12))
        magnitude = f"{abs(exact):f}"
        for text in (f"{exact:f}", f"{exact:,f}", f"{exact:E}", str(exact)):
            assert read_number(text) == Fraction(exact), text
        if number < 0:
            for text in (f"−{magnitude}", f"-${magnitude}", f"$-{magnitude}", f"(${magnitude})"):
                assert read_number(text) == Fraction(exact), text
        float_ = float(exact)
        for text in (repr(float_), f"{float_:.17g}"):
            assert float(read_number(text)) == float_


@pytest.mark.parametrize(
    ("label", "given", "right"),
    [
        ("18", "17.9999995", True),
        ("18", "17.999999", False),
        ("1/3", "0.333333", True),
        ("1/3", "0.33333", False),
        ("2e-7", "0", False),
        ("2e-7", "2.000001e-7", True),
        ("2e-7", "2.1e-7", False),
        ("0", "1e-9", False),
        ("0", "-0.0", True),
        ("5e6", "5000001", False),
        ("1e400", "1e401", False),
        ("9" * 400, "9" * 399 + "8", False),
    ],
)
def test_equal_numbers_are_close_both_absolutely_and_for_their_size(
    label: str, given: str, right: bool
) -> None:
    assert equal(Fraction(label), Fraction(given)) is right


def test_a_long_text_takes_no_time() -> None:
    for text in ("9" * 20_000, "1," * 20_000, "(" * 20_000, "1_" * 20_000, "- " * 20_000):
        first_number(text)


@pytest.mark.parametrize("name", ["gsm8k_aug/test", "gsm8k_aug/train", "ood/gsm_hard", "ood/svamp"])
def test_labels_of_the_real_data_are_floats_of_their_texts(name: str) -> None:
    file = DATA / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"the data is not here: {file}")
    answers = [json.loads(line)["answer"] for line in file.open(encoding="utf-8")]
    assert [float(read_number(a)) for a in answers] == [float(a.replace(",", "")) for a in answers]
    scientific = [answer for answer in answers if "e" in answer]
    assert len(scientific) == (26 if name == "ood/gsm_hard" else 0)
    assert not any(equal(read_number(answer), Fraction(0)) for answer in scientific)
