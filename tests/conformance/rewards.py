"""Cases of `rewards/`: answer comparison, format verdicts and relative-length rewards."""

from __future__ import annotations

from latent_reasoning.config import Reward
from latent_reasoning.data.answers import START, answers_match, parse_number
from latent_reasoning.rl import reward
from latent_reasoning.rl.prompts import label_number
from tests.conformance.checks import Check, Checks, Tolerance, recorded
from tests.conformance.recording import Record, Vectors

INFORMATION = {"notes", "checks", "error", "num_generations"}
REWARD = Tolerance(absolute=1e-6)


def _answers(_: Vectors, entry: Record) -> Checks:
    for which in ("label", "output"):
        number = entry[f"{which}_number"]
        yield Check(parse_number(entry[which], "public"), None if number is None else float(number))
    # An error of the public code stands for a verdict here: wrong, or a label that is refused.
    refused = entry["label_number"] is None
    yield Check(_is_refused(entry["label"]), refused)
    own = not refused and answers_match(entry["label"], entry["output"], "public")
    yield Check(own, entry["verdict"] is True)


def _is_refused(label: str) -> bool:
    try:
        label_number(label, "row", "public")
    except ValueError:
        return True
    return False


def _format(_: Vectors, entry: Record) -> Checks:
    text, verifier = entry["completion_w_special"], "answer_verifier_label"
    yield recorded(
        {
            "formatted": reward.judge_sample("", text, "0", "public").well_formatted,
            "latent_length_with_prompt_Q_START": reward.latent_tokens(f"Q{START}{text}"),
        },
        entry,
    )
    for key in [key for key in entry if key.startswith(verifier)]:
        right = reward.answer_is_right(text, key.removeprefix(verifier), "public")
        yield Check(right, entry[key] is True)
        yield recorded({"answer_verifier_bad_format_false": right}, entry)


def _length_rewards(_: Vectors, entry: Record) -> Checks:
    texts, settings = entry["completions"], entry["settings"]
    prompts, labels = (
        value if isinstance(value, list) else [value] * len(texts)
        for value in (entry["prompt"], entry["label"])
    )
    samples = zip(prompts, texts, labels, strict=True)
    own = reward.Outcomes.of([reward.judge_sample(*sample, "public") for sample in samples])
    verdicts = {"is_formatted": own.well_formatted, "is_correct": own.correct}
    yield recorded(verdicts | {"latent_length": own.length}, entry)
    penalty, bonus = settings["length_penalty"], settings["length_reward"]
    config = Reward(
        penalty=penalty,
        bonus=penalty if bonus == "same" else bonus,
        accuracy_requirement=settings["accuracy_requirement"],
    )
    groups = list(zip(entry.get("prompt_id", prompts), prompts, strict=True))
    yield Check(reward.rewards(groups, own, config), entry["rewards"], REWARD)


READERS = {
    r"rewards/expected\.json": {
        "compare_answers/.+": _answers,
        "format_table/.+": _format,
        "length_rewards/cases/.+": _length_rewards,
    }
}
