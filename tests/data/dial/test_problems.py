"""Generated problems are true, disjoint and deterministic; their tokenizer loses nothing."""

import itertools
from collections import Counter

import pytest

from latent_reasoning.data.dial.problems import (
    DAYS,
    FIRST_HELD_OUT_STEP_COUNT,
    generate_splits,
)
from latent_reasoning.data.dial.styles import results_only
from latent_reasoning.data.dial.tokenizer import (
    BOS_TOKEN,
    EOS_TOKEN,
    build_tokenizer,
    generated_texts,
)

WEIGHTS = (2, 3, 3, 2, 1)
MODULUS = 7


def generate(train=600, validation=100, test=300, *, seed=0, modulus=MODULUS, references=0.0):
    return generate_splits(
        train,
        validation,
        test,
        max_steps=5,
        step_weights=WEIGHTS,
        modulus=modulus,
        seed=seed,
        references=references,
    )


@pytest.fixture(scope="module")
def splits():
    return generate()


@pytest.fixture(scope="module")
def rows(splits):
    return [row for split in splits.values() for row in split]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(generated_texts(MODULUS))


def problem_of(row):
    """What is to be computed, whatever the wording: the expressions of the steps."""
    return tuple(step.partition("=")[0] for step in row["steps"])


def test_the_same_arguments_give_the_same_rows_in_the_sizes_asked_for(splits):
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [600, 100, 300]
    assert generate() == splits
    assert generate(seed=1)["test"] != splits["test"]
    larger = generate(train=900)
    assert (larger["test"], larger["validation"]) == (splits["test"], splits["validation"])


def test_questions_and_long_problems_are_in_one_split_only():
    splits = generate(6000, 500, 2000)
    questions = [row["question"] for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions) == 8500
    problems = {
        name: {problem_of(row) for row in rows if len(row["steps"]) >= FIRST_HELD_OUT_STEP_COUNT}
        for name, rows in splits.items()
    }
    assert len(problems["test"]) > 1000
    for one, other in itertools.combinations(problems.values(), 2):
        assert not one & other


@pytest.mark.parametrize(("modulus", "references"), [(3, 0.0), (7, 0.0), (11, 0.0), (7, 0.5)])
def test_equations_are_true_and_lead_to_the_answer(modulus, references):
    for row in generate(200, 0, 0, modulus=modulus, references=references)["train"]:
        value = None
        for step in row["steps"]:
            expression, result = step[2:-2].split("=")
            assert eval(expression) == int(result)
            assert value is None or expression.startswith(f"({value}")
            value = int(result)
        assert row["answer"] == str(value)
        assert 0 <= value < modulus


def test_question_tells_the_steps_in_order_and_the_start_value_last(rows):
    words = {"+": "plus", "-": "minus", "*": "times"}
    for row in rows:
        *sentences, start, _ = row["question"].split(". ")
        expected = [
            f"{day} {words[step[4]]} {step[5]}"
            for day, step in zip(DAYS, row["steps"], strict=False)
        ]
        assert sentences == expected
        assert start.split()[2:4] == ["of", str(MODULUS)]
        assert start.split()[-1] == row["steps"][0][3]


def test_a_reference_takes_the_result_of_an_earlier_day_but_never_of_the_day_before(tokenizer):
    references = possible = 0
    for row in generate(1000, 0, 0, references=0.5)["train"]:
        results = [step[2:-2].split("=")[1] for step in row["steps"]]
        for position, (sentence, step) in enumerate(
            zip(row["question"].split(". "), row["steps"], strict=False)
        ):
            possible += position >= 2
            operand = sentence.split()[2]
            if operand.endswith("'s"):
                references += 1
                earlier = DAYS.index(operand.removesuffix("'s"))
                assert earlier < position - 1
                operand = results[earlier]
            assert operand == step[5]
        assert tokenizer.unk_token_id not in tokenizer(row["question"])["input_ids"]
    assert references / possible == pytest.approx(0.5, abs=0.05)


def test_step_counts_follow_the_weights_and_answers_are_nearly_uniform():
    rows = generate(11_000, 0, 0)["train"]
    counts = Counter(len(row["steps"]) for row in rows)
    for step_count, weight in enumerate(WEIGHTS, start=1):
        assert counts[step_count] == pytest.approx(1000 * weight, abs=150)
    answers = Counter(row["answer"] for row in rows)
    assert set(answers) == {str(value) for value in range(MODULUS)}
    assert max(answers.values()) < 1.5 * min(answers.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": -1}, "negative"),
        ({"max_steps": 8, "step_weights": [1] * 8}, "allowed are 1 to 7"),
        ({"step_weights": [1, 1]}, "2 step_weights for max_steps 5"),
        ({"step_weights": [0] * 5}, "not a distribution"),
        ({"modulus": 2}, "least allowed is 3"),
        ({"max_steps": 1, "step_weights": [1], "train": 100_000}, "too few different questions"),
    ],
)
def test_impossible_arguments_are_refused(changes, message):
    arguments = {"train": 1, "validation": 1, "test": 1, "max_steps": 5, "step_weights": WEIGHTS}
    with pytest.raises(ValueError, match=message):
        generate_splits(**{**arguments, "modulus": MODULUS, "seed": 0, **changes})


@pytest.mark.parametrize("modulus", [7, 11])
def test_pieces_of_the_format_decode_to_their_own_text(modulus):
    tokenizer = build_tokenizer(generated_texts(modulus))
    for row in generate(200, 0, 0, modulus=modulus)["train"]:
        reasonings = ["".join(row["steps"]), results_only(row["steps"]), results_only([])]
        question = row["question"]
        for piece in (f"Question: {question}", question, *reasonings, f" {row['answer']}"):
            tokens = tokenizer(piece, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in tokens
            assert tokenizer.decode(tokens) == piece


def test_pieces_tokenised_apart_decode_to_the_joined_text(tokenizer):
    pieces = [" Results: 5 3", " The answer is", ":", f" 3{EOS_TOKEN}"]
    tokens = [token for piece in pieces for token in tokenizer(piece).input_ids]
    assert tokenizer.decode(tokens) == f" Results: 5 3 The answer is: 3{EOS_TOKEN}"
    assert tokenizer.decode(tokens, skip_special_tokens=True) == " Results: 5 3 The answer is: 3"


def test_numbers_are_one_token_in_equations_and_sentences(tokenizer):
    (in_a_sentence,) = tokenizer(" 5").input_ids
    assert in_a_sentence in tokenizer("<<(5+1)%7=6>>").input_ids
    assert len(tokenizer("<<(5+1)%7=6>>").input_ids) == 7
    assert len(tokenizer(" Results: 5 3").input_ids) == 3


def test_tokenizer_is_deterministic_and_survives_saving(tokenizer, tmp_path):
    assert len(tokenizer) + 4 <= 128  # room for the special tokens
    assert build_tokenizer(reversed(generated_texts(MODULUS))).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    text = "Question: Monday plus 6. Fay's dial of 7 starts at 6.<<(6+6)%7=5>> The answer is: 5"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    names = (loaded.bos_token, loaded.eos_token, loaded.pad_token)
    assert names == (BOS_TOKEN, EOS_TOKEN, EOS_TOKEN)
