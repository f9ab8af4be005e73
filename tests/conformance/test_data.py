"""The data cases on a folder made here, of other settings than the recorded ones.

Its expectations come from the public code's way, written out slowly: one text with separators,
tokenised whole, the separators removed after. The tokenizer puts no BOS before a text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from latent_reasoning.conformance import data
from latent_reasoning.data.sequences import SPECIAL_TOKENS

SEPARATOR = "<DEMARCATE>"
ROWS = [
    {"question": "How many?", "steps": ["One and one are two.", "Add 3: 5."], "answer": "5"},
    {"question": "Half?", "steps": ["It is half."], "answer": "1/2"},
    {"question": "Below zero?", "steps": ["3-5 is -2."], "answer": "-2"},
    {"question": "Nothing to do?", "steps": [], "answer": "9"},
    {"question": "A long one? " + "word " * 30, "steps": ["Long."] * 9, "answer": "1,000"},
]
SETTINGS = {
    "form": "latent",
    "natural_language": True,
    "drop_last_step": True,
    "steps_factor": 2,
    "steps_bias": 1,
    "steps_min": 4,
    "steps_max": 7,
    "mask_latent_labels": True,
    "shift_target": False,
    "drop_negative_answers": True,
    "max_tokens": 150,
}
KEPT = [0, 3]
LATENT_STEPS = [5, 4]


def build_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<|endoftext|>", *alphabet, ":Ġ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return fast


def slow_example(tokenizer: PreTrainedTokenizerFast, pieces: list[str], masked: int) -> dict:
    """Ids and maps of `pieces`; the labels of the first `masked` pieces are left out."""
    tokenizer.add_special_tokens({"additional_special_tokens": [SEPARATOR]})
    separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
    columns: dict[str, list] = {"ids": [], "labels": [], "reasoning": [], "target": []}
    piece = 0
    for token in tokenizer(SEPARATOR.join(pieces))["input_ids"]:
        if token == separator:
            piece += 1
            continue
        columns["ids"].append(token)
        columns["labels"].append(-100 if piece < masked else token)
        columns["reasoning"].append(piece == 1)
        columns["target"].append(piece == 3)
    return columns


def expected_examples() -> list[dict[str, list]]:
    examples = []
    for index, latent_steps in zip(KEPT, LATENT_STEPS, strict=True):
        row = ROWS[index]
        question = f"Question: {row['question']}"
        answer = [" The answer is", ":", f" {row['answer']}<|endoftext|>"]
        reasoning = "".join(f" {step}" for step in row["steps"][:-1])
        latent = f"<START>{'<|CONTINUE|>' * latent_steps}<|STOP|>"
        teacher = slow_example(build_tokenizer(), [question, reasoning, *answer], 1)
        tokenizer = build_tokenizer()
        student = slow_example(tokenizer, [question, latent, *answer], 2)
        examples.append(
            {
                "input_ids": teacher["ids"],
                "attention_mask": [1] * len(teacher["ids"]),
                "labels": teacher["labels"],
                "reasoning_map": teacher["reasoning"],
                "target_token_map": teacher["target"],
                "latent_input_ids": student["ids"],
                "latent_attention_mask": [1] * len(student["ids"]),
                "latent_labels": student["labels"],
                "latent_reasoning_map": student["reasoning"],
                "latent_target_token_map": student["target"],
                "latent_continue_map": [
                    token == tokenizer.convert_tokens_to_ids("<|CONTINUE|>")
                    for token in student["ids"]
                ],
            }
        )
    return examples


@pytest.fixture
def recorded() -> dict[str, Any]:
    tokenizer = build_tokenizer()
    prompt = tokenizer("How many?")["input_ids"]
    start = tokenizer.convert_tokens_to_ids("<START>")
    forced = tokenizer("<START><|CONTINUE|><|CONTINUE|><|STOP|>")["input_ids"]
    words = [*tokenizer(" The answer is")["input_ids"], *tokenizer(":")["input_ids"]]
    return {
        "bos_token_id": None,
        "eos_token_id": 0,
        "rows": ROWS,
        "eval_rows": ROWS[:1],
        "variants": {
            "by_two": {
                "settings": SETTINGS,
                "kept_row_indices": KEPT,
                "dropped_row_indices": [1, 2, 4],
                "examples": expected_examples(),
            }
        },
        "eval_tokenised": {
            kind: [{"input_ids": ids, "attention_mask": [1] * len(ids), "answer": "5"}]
            for kind, ids in {
                "plain": prompt,
                "append_start": [*prompt, start],
                "override2": [*prompt, *forced, *words],
            }.items()
        },
        "rl_train": {
            "max_prompt_tokens_14": [
                {"prompt": "How many?<START>", "label": "5", "prompt_id": 0},
                {"prompt": "Below zero?<START>", "label": "-2", "prompt_id": 1},
            ]
        },
    }


@pytest.fixture
def replay(tmp_path) -> Callable[[dict[str, Any]], dict[str, str]]:
    """Verdicts by name: the empty text for a pass, else the reason."""

    def run(expected: dict[str, Any]) -> dict[str, str]:
        folder = tmp_path / "gpt2"
        build_tokenizer().save_pretrained(folder / "tokenizer")
        (folder / "expected.json").write_text(json.dumps(expected))
        verdicts = {}
        for case in data.cases(tmp_path):
            try:
                case.run()
                verdicts[case.name] = ""
            except (AssertionError, ValueError) as error:
                verdicts[case.name] = str(error)
        return verdicts

    return run


def test_other_settings_and_another_tokenizer_pass(replay, recorded, tmp_path) -> None:
    (tmp_path / "gpt2").mkdir()
    examples = recorded["variants"]["by_two"]["examples"]
    arrays = {}
    for column in examples[0]:
        fill = -100 if column.endswith("labels") else 0
        width = max(len(example[column]) for example in examples)
        dtype = bool if column.endswith("map") else np.int64
        arrays[column] = np.full((2, width), fill, dtype=dtype)
        for row, example in zip(arrays[column], examples, strict=True):
            row[width - len(example[column]) :] = example[column]
    np.savez(tmp_path / "gpt2" / "collated_by_two_first2.npz", **arrays)
    verdicts = replay(recorded)
    assert set(verdicts.values()) == {""}
    assert len(verdicts) == 10


@pytest.mark.parametrize(
    ("change", "case"),
    [
        (lambda e: e["variants"]["by_two"]["settings"].update(steps_max=4), "by_two/examples"),
        (lambda e: e["variants"]["by_two"]["settings"].update(max_tokens=None), "by_two/selection"),
        (lambda e: e["variants"]["by_two"]["settings"].update(surprise=1), "by_two/examples"),
        (lambda e: e["eval_tokenised"]["override2"][0]["input_ids"].pop(), "override2"),
        (lambda e: e["rl_train"]["max_prompt_tokens_14"].pop(), "max_prompt_tokens_14"),
        (lambda e: e.update(surprise=1), "surprise"),
        (lambda e: e.update(bos_token_id=0), "bos_token_id"),
    ],
)
def test_a_change_of_any_expectation_fails_its_case(replay, recorded, change, case) -> None:
    change(recorded)
    failed = [name for name, reason in replay(recorded).items() if reason]
    assert any(name.endswith(case) for name in failed)
