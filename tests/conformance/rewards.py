"""Cases of `rewards/`: answer comparison, format verdicts and relative-length rewards."""

from __future__ import annotations

from latent_reasoning.config import Reward
from latent_reasoning.data.answers import START, answers_match, parse_number
from latent_reasoning.rl import reward
from latent_reasoning.rl.prompts import label_number
from tests.conformance.checks import Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors

INFORMATION = {"notes", "checks", "error", "num_generations"}
REWARD = Tolerance(absolute=1e-6)


def _answers(vectors: Vectors, name: str, entry: Record) -> Checks:
    label, output = entry["label"], entry["output"]
    for what, text in (("label_number", label), ("output_number", output)):
        number = None if entry[what] is None else float(entry[what])
        yield Check(name, parse_number(text, "public"), number, what=what)
    # An error of the public code stands for a verdict here: wrong, or a label that is refused.
    verdict, refused = entry["verdict"] is True, entry["label_number"] is None
    yield Check(name, _is_refused(label), refused, what="refusal")
    right = not refused and answers_match(label, output, "public")
    yield Check(name, right, verdict, what="verdict")


def _is_refused(label: str) -> bool:
    try:
        label_number(label, "row", "public")
    except ValueError:
        return True
    return False


def _format(vectors: Vectors, name: str, entry: Record) -> Checks:
    text = entry["completion_w_special"]
    prefix, length = "answer_verifier_label", "latent_length_with_prompt_Q_START"
    if "formatted" in entry:
        yield Check(
            name, reward.judge_sample("", text, "0", "public").well_formatted, entry["formatted"]
        )
    if length in entry:
        yield Check(name, reward.latent_tokens(f"Q{START}{text}"), entry[length], what="length")
    for key in [key for key in entry if key.startswith(prefix)]:
        right = reward.answer_is_right(text, key.removeprefix(prefix), "public")
        yield Check(name, right, entry[key] is True, what=key)
        yield Check(name, right, entry.get("answer_verifier_bad_format_false", right), what=key)


def _length_rewards(vectors: Vectors, name: str, entry: Record) -> Checks:
    texts = entry["completions"]
    prompts, labels = (
        value if isinstance(value, list) else [value] * len(texts)
        for value in (entry["prompt"], entry["label"])
    )
    verdicts = reward.Outcomes.of(
        [
            reward.judge_sample(*sample, "public")
            for sample in zip(prompts, texts, labels, strict=True)
        ]
    )
    for key, own in (
        ("is_formatted", verdicts.well_formatted),
        ("is_correct", verdicts.correct),
        ("latent_length", verdicts.length),
    ):
        yield Check(name, own, entry.get(key, own), what=key)
    settings = entry["settings"]
    penalty, bonus = settings["length_penalty"], settings["length_reward"]
    config = Reward(
        penalty=penalty,
        bonus=penalty if bonus == "same" else bonus,
        accuracy_requirement=settings["accuracy_requirement"],
    )
    groups = list(zip(entry.get("prompt_id", prompts), prompts, strict=True))
    yield Check(name, reward.rewards(groups, verdicts, config), entry["rewards"], REWARD, "rewards")


READERS = {
    "rewards/expected.json": {
        "compare_answers/.+": _answers,
        "format_table/.+": _format,
        "length_rewards/cases/.+": _length_rewards,
    }
}
