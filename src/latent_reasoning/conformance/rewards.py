"""Cases of `rewards/`: answer comparison, format verdicts and relative-length rewards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from latent_reasoning.config import Reward
from latent_reasoning.conformance.cases import Case, check_equal, check_known
from latent_reasoning.data.answers import START, answers_match, parse_number
from latent_reasoning.rl.prompts import label_number
from latent_reasoning.rl.reward import (
    Outcome,
    Outcomes,
    answer_is_right,
    judge_sample,
    latent_tokens,
    rewards,
)

TOLERANCE = 1e-6
INFORMATION = {"notes", "checks"}
LABEL_KEY = "answer_verifier_label"


def cases(folder: Path) -> Iterator[Case]:
    """Every case of the folder, named `rewards/expected.json/kind/..`."""
    for path in sorted(folder.iterdir()):
        if path.name != "expected.json":
            yield Case(f"rewards/{path.name}", partial(_fail, "file not understood"))
            continue
        for kind, content in json.loads(path.read_text(encoding="utf-8")).items():
            if kind not in INFORMATION:
                yield from _cases_of_kind(f"rewards/expected.json/{kind}", kind, content)


def _cases_of_kind(name: str, kind: str, content: Any) -> Iterator[Case]:
    if kind == "compare_answers":
        for index, entry in enumerate(content):
            yield Case(f"{name}/{index}", partial(_compare_answers, entry))
    elif kind == "format_table":
        for index, entry in enumerate(content):
            yield Case(f"{name}/{index}", partial(_format, entry))
    elif kind == "length_rewards":
        for key, entry in content["cases"].items():
            yield Case(f"{name}/{key}", partial(_length_rewards, entry))
    else:
        yield Case(name, partial(_fail, "kind of case not understood"))


def _fail(reason: str) -> None:
    raise AssertionError(reason)


def _compare_answers(entry: dict[str, Any]) -> None:
    check_known(
        entry, {"label", "output", "label_number", "output_number", "verdict", "error"}, "case"
    )
    label, output = entry["label"], entry["output"]
    for what, text in (("label_number", label), ("output_number", output)):
        number = None if entry[what] is None else float(entry[what])
        check_equal(parse_number(text), number, what)
    if entry["label_number"] is None:
        try:
            label_number(label, "row")
        except ValueError:
            return
        raise AssertionError(f"the label {label!r} holds no number and was not refused")
    check_equal(answers_match(label, output), entry["verdict"] is True, "verdict")


def _format(entry: dict[str, Any]) -> None:
    text = entry["completion_w_special"]
    labels = [key for key in entry if key.startswith(LABEL_KEY)]
    lenient, length = "answer_verifier_bad_format_false", "latent_length_with_prompt_Q_START"
    check_known(entry, {"completion_w_special", "formatted", lenient, length, *labels}, "case")
    if "formatted" in entry:
        check_equal(judge_sample("", text, "0").well_formatted, entry["formatted"], "formatted")
    if length in entry:
        check_equal(latent_tokens(f"Q{START}" + text), entry[length], "length")
    for key in labels:
        right = answer_is_right(text, key.removeprefix(LABEL_KEY))
        # An error of the public code stands for a verdict here: wrong.
        check_equal(right, entry[key] is True, key)
        if lenient in entry:
            check_equal(right, entry[lenient], lenient)


def _length_rewards(entry: dict[str, Any]) -> None:
    verdict_keys = {"is_formatted", "is_correct", "latent_length"}
    known = {"settings", "prompt_id", "completions", "prompt", "label", "rewards"} | verdict_keys
    check_known(entry, known, "case")
    texts = entry["completions"]
    prompts, labels = (_per_sample(entry[key], len(texts)) for key in ("prompt", "label"))
    verdicts = [
        judge_sample(prompt, text, label)
        for prompt, text, label in zip(prompts, texts, labels, strict=True)
    ]
    _equal_verdicts(entry, verdicts)
    groups = [entry["prompt_id"], prompts] if "prompt_id" in entry else [prompts]
    rows = list(zip(*groups, strict=True))
    ours = rewards(rows, Outcomes.of(verdicts), reward_settings(entry["settings"]))
    for index, (value, expected) in enumerate(zip(ours.tolist(), entry["rewards"], strict=True)):
        if not abs(value - expected) <= TOLERANCE:
            raise AssertionError(f"reward {index} is {value}, expected {expected}")


def _per_sample(value: str | list[str], samples: int) -> list[str]:
    return value if isinstance(value, list) else [value] * samples


def _equal_verdicts(entry: dict[str, Any], verdicts: list[Outcome]) -> None:
    fields = {
        "is_formatted": "well_formatted",
        "is_correct": "correct",
        "latent_length": "length",
    }
    for key, field in fields.items():
        if key in entry:
            check_equal([getattr(verdict, field) for verdict in verdicts], entry[key], key)


def reward_settings(settings: dict[str, Any]) -> Reward:
    """The recorded settings in the configuration's words."""
    check_known(settings, {"length_penalty", "accuracy_requirement", "length_reward"}, "settings")
    penalty, bonus = settings["length_penalty"], settings["length_reward"]
    return Reward(
        penalty=penalty,
        bonus=penalty if bonus == "same" else bonus,
        accuracy_requirement=settings["accuracy_requirement"],
    )
