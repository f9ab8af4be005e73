"""Generated problems are true, disjoint and deterministic; their tokenizer loses nothing."""

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


def generate(train=600, validation=100, test=300, *, seed=0, modulus=MODULUS):
    return generate_splits(
        train, validation, test, max_steps=5, step_weights=WEIGHTS, modulus=modulus, seed=seed
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


def test_splits_have_the_sizes_asked_for(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 600,
        "validation": 100,
        "test": 300,
    }


def test_same_seed_gives_the_same_rows(splits):
    assert generate() == splits


def test_another_seed_gives_other_rows(splits):
    assert generate(seed=1)["test"] != splits["test"]


def test_size_of_the_training_split_leaves_the_other_splits_alone(splits):
    larger = generate(train=900)
    assert larger["test"] == splits["test"]
    assert larger["validation"] == splits["validation"]


def test_no_question_occurs_twice_in_any_split():
    splits = generate(6000, 500, 2000)
    questions = [row["question"] for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions) == 8500


def test_problems_of_three_steps_and_more_are_in_one_split_only():
    splits = generate(6000, 500, 2000)
    problems = {
        name: {problem_of(row) for row in rows if len(row["steps"]) >= FIRST_HELD_OUT_STEP_COUNT}
        for name, rows in splits.items()
    }
    assert len(problems["test"]) > 1000
    assert not problems["test"] & problems["train"]
    assert not problems["test"] & problems["validation"]
    assert not problems["validation"] & problems["train"]


@pytest.mark.parametrize("modulus", [3, 7, 11])
def test_equations_are_true_and_lead_to_the_answer(modulus):
    for row in generate(200, 0, 0, modulus=modulus)["train"]:
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


def test_step_counts_follow_the_weights():
    counts = Counter(len(row["steps"]) for row in generate(11_000, 0, 0)["train"])
    for step_count, weight in enumerate(WEIGHTS, start=1):
        assert counts[step_count] == pytest.approx(1000 * weight, abs=150)


def test_answers_are_nearly_uniform():
    counts = Counter(row["answer"] for row in generate(7000, 0, 0)["train"])
    assert set(counts) == {str(value) for value in range(MODULUS)}
    assert max(counts.values()) < 1.5 * min(counts.values())


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


def test_vocabulary_leaves_room_for_the_special_tokens_below_128(tokenizer):
    assert len(tokenizer) + 4 <= 128


def test_tokenizer_is_deterministic_and_survives_saving(tokenizer, tmp_path):
    assert build_tokenizer(reversed(generated_texts(MODULUS))).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    text = "Question: Monday plus 6. Fay's dial of 7 starts at 6.<<(6+6)%7=5>> The answer is: 5"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (
        BOS_TOKEN,
        EOS_TOKEN,
        EOS_TOKEN,
    )
