"""Cases of `generation/` and `bench/`: greedy ids, stop probabilities, lengths, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Distillation
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import encode_prompts
from latent_reasoning.evaluation.evaluator import prediction_of
from latent_reasoning.evaluation.metrics import summarise
from latent_reasoning.evaluation.records import Evaluation, Prediction
from latent_reasoning.model.folder import load_tokenizer
from latent_reasoning.model.generation import Generation, generate
from latent_reasoning.model.reasoner import LatentReasoner
from tests.conformance.checks import Check, Checks, Tolerance
from tests.conformance.losses import COMPONENT, compute_losses
from tests.conformance.recording import Record, Skip, Vectors

INFORMATION = {
    *("notes", "checks", "overfit_rows", "answer", "steps", "output_text", "output_ids_incl_pad"),
    *("decoded_output", "min_top2_logit_margin_before_eos", "n_length_cutoffs"),
    *("n_continue_tokens", "reasoning_length", "reasoning_lengths", "n_avg_reasoning_tokens"),
    *("n_reasoning_tokens_std", "min_reasoning_tokens", "max_reasoning_tokens"),
}
"""Lengths among them: they are compared only where the public ones are right (note 16)."""
PROBABILITY = Tolerance(absolute=5e-4)
METRIC = Tolerance(absolute=1e-9)
CODI_WEIGHT = 1.0
"""Weight of the recorded codi loss of the overfitted batch."""


def _run(vectors: Vectors, name: str, entry: Record) -> Checks:
    """One recorded evaluation."""
    config, forced, recorded = entry["eval_config"], entry["forced_steps"], entry["rows"]
    latent, override = config["latent_thinking"], config["latent_thought_count_override"]
    yield Check(f"{name}/prompts", forced, override, what="forced_steps")
    model, tokenizer = _checkpoint(vectors, entry["checkpoint"])
    rows = [_row(row["label"], row["question"]) for row in recorded]
    # The public code's prompts have no prefix (note 1).
    prompts = encode_prompts(rows, tokenizer, prefix="", latent=latent, forced_steps=forced)
    yield Check(f"{name}/prompts", prompts, [row["prompt_ids"] for row in recorded])
    generations = generate(
        model,
        prompts,
        max_new_tokens=config["max_new_tokens"],
        eos_id=tokenizer.eos_token_id,
        batch_size=config["batch_size"],
    )
    own = [generation.ids for generation in generations]
    yield Check(f"{name}/ids", own, [row["output_ids"] for row in recorded])
    own = [_pairs(generation.stop_probabilities) for generation in generations]
    expected = [_pairs(row["continue_stop_probs"]) for row in recorded]
    yield Check(f"{name}/stop_probabilities", own, expected, PROBABILITY)
    predictions = [
        prediction_of(row, generation, tokenizer, latent=latent, forced_steps=forced, rule="public")
        for row, generation in zip(rows, generations, strict=True)
    ]
    compared = [row["compare_length"] for row in recorded]
    own = [p.reasoning_tokens for p, it_is in zip(predictions, compared, strict=True) if it_is]
    expected = [row["reasoning_length"] for row in recorded if row["compare_length"]]
    yield Check(f"{name}/lengths", own, expected)
    own = [prediction.correct for prediction in predictions]
    yield Check(f"{name}/verdicts", own, [row["correct"] for row in recorded])
    own = [p.well_formatted for p in predictions]
    expected = [row.get("well_formatted", p) for row, p in zip(recorded, own, strict=True)]
    yield Check(f"{name}/verdicts", own, expected, what="format")
    cut_off, lengths = sum(g.cut_off for g in generations), entry["compare_length_aggregates"]
    yield from _metrics(f"{name}/metrics", predictions, cut_off, entry["metrics"], lengths)


def _checkpoint(vectors: Vectors, name: str) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    return vectors.model(name), load_tokenizer(vectors.folder(name))


def _pairs(probabilities: list[Any]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).reshape(-1, 2)


def _row(label: str, question: str = "") -> Row:
    return Row(id="recorded-0", question=question, steps=None, answer=label)


def _metrics(
    name: str, predictions: Sequence[Prediction], cut_off: int, recorded: Record, lengths: bool
) -> Checks:
    """Aggregates of an evaluation; those of lengths only where the public ones are right.

    Badly formatted rows vanish from the public per-row lists (note 16).
    """
    summary = summarise(Evaluation(list(predictions), [], 0.0).frame(), 0.0)
    own = {
        "score": summary["accuracy"],
        "correct_p": summary["accuracy"],
        "n_correct": summary["correct"],
        "n_total": summary["n"],
        "bad_format_p": summary["badly_formatted"] / summary["n"],
        "n_bad_format": summary["badly_formatted"],
        "n_length_cutoffs": cut_off,
        "correct_list": [p.correct for p in predictions if p.well_formatted],
    }
    if lengths:
        own |= {
            "n_avg_reasoning_tokens": summary["reasoning_tokens_mean"],
            "n_reasoning_tokens_std": summary["reasoning_tokens_std"],
            "min_reasoning_tokens": summary["reasoning_tokens_min"],
            "max_reasoning_tokens": summary["reasoning_tokens_max"],
            "reasoning_lengths": [p.reasoning_tokens for p in predictions if p.well_formatted],
        }
    yield Check(name, own, {key: recorded[key] for key in own}, METRIC)


def _losses(vectors: Vectors, name: str, entry: Record, rows: str) -> Checks:
    """The losses of the overfitted checkpoint on its own batch."""
    batch = dict(vectors.file(f"generation/batch_overfit{rows}.npz"))
    model = vectors.model("generation/ckpt_overfit")
    own = compute_losses(model, batch, Distillation(codi_weight=CODI_WEIGHT))
    yield Check(name, {key: own[key] for key in entry}, entry, COMPONENT)


# ------------------------------------------------------------------------------------ the verdicts


def _predict(vectors: Vectors, kind: str, row: Record) -> Prediction:
    """The evaluation's verdict on a crafted completion; `kind` is what the prompt asked for."""
    tokenizer, ids = _any_tokenizer(vectors), row.get("output_ids")
    if ids is None:
        ids = tokenizer(row["output_text"], add_special_tokens=False)["input_ids"]
    return prediction_of(
        _row(row.get("label", "18")),
        Generation(ids, [], 0, cut_off=tokenizer.eos_token_id not in ids),
        tokenizer,
        latent=kind != "cot_mode",
        forced_steps=int(kind.removeprefix("override")) if kind.startswith("override") else None,
        rule="public",
    )


def _any_tokenizer(vectors: Vectors) -> PreTrainedTokenizerBase:
    for pattern in ("forward/ckpt/*/tokenizer.json", "generation/*/tokenizer.json"):
        for name in vectors.names(pattern):
            return load_tokenizer(vectors.folder(Path(name).parent.as_posix()))
    raise Skip("no checkpoint with a tokenizer")


def _completion(vectors: Vectors, name: str, row: Record, kind: str) -> Checks:
    own, correct = _predict(vectors, kind, row), row.get("correct")
    # A row without expectations has to get a verdict all the same. Empty where the format is bad:
    # the public lists leave such a row out (note 16).
    yield Check(name, own.correct, own.correct if correct is None else any(correct))
    bad = not own.well_formatted
    yield Check(name, bad, row.get("n_bad_format", bad), what="badly formatted")
    if row.get("compare_length"):
        yield Check(name, [own.reasoning_tokens], row["reasoning_lengths"], what="length")


def _aggregate(vectors: Vectors, name: str, recorded: Record, kind: str, limit: str = "") -> Checks:
    rows = vectors.file("generation/eval_stub.json")[kind]["rows"]
    own = [_predict(vectors, kind, row) for row in rows]
    # A crafted completion without EOS is cut off only where it also has the full length.
    full = [limit != "" and len(row["output_ids"]) >= int(limit) for row in rows]
    cut_off = sum(p.cut_off and is_full for p, is_full in zip(own, full, strict=True))
    yield from _metrics(name, own, cut_off, recorded, lengths=kind.startswith("override"))


def _wrong(vectors: Vectors, name: str, row: Record, kind: str) -> Checks:
    yield Check(name, _predict(vectors, kind, row).correct, False)


def _forced_length(vectors: Vectors, name: str, expected: int, kind: str) -> Checks:
    rows = vectors.file("generation/eval_stub.json")[kind]["rows"]
    yield Check(name, {_predict(vectors, kind, row).reasoning_tokens for row in rows}, {expected})


# ------------------------------------------------------------------------------------------- bench


def _bench(vectors: Vectors, name: str) -> Checks:
    """The generated ids recorded in `bench/`; its other files are for measuring speed."""
    expected = vectors.file(name)["new_tokens"]
    prompts = vectors.file(name.replace("expected", "prompts"))
    ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
    checkpoints = vectors.names("bench/ckpt_*") or ["bench/ckpt_*"]
    model, tokenizer = _checkpoint(vectors, checkpoints[0])
    generations = generate(
        model,
        [row[read].tolist() for row, read in zip(ids, mask, strict=True)],
        max_new_tokens=expected.shape[1],
        eos_id=tokenizer.eos_token_id,
        batch_size=len(ids),
    )
    padding = [tokenizer.eos_token_id] * expected.shape[1]
    own = [(generation.ids + padding)[: expected.shape[1]] for generation in generations]
    yield Check(name, own, expected.tolist())


KINDS = r"(adaptive|cot_mode|override\d+)"
READERS = {
    "bench/eval_expected_*.npz": _bench,
    "generation/expected.json": {
        r"overfit_loss_on_(\d+)": _losses,
        r"(?!notes$|checks$|overfit_rows$|overfit_loss_on_\d+$).+/.+": _run,
    },
    "generation/eval_stub.json": {
        f"{KINDS}/rows/.+": _completion,
        rf"{KINDS}/aggregate.*max_new_tokens_(\d+)": _aggregate,
        f"{KINDS}/result": _aggregate,
        f"{KINDS}/must_be_wrong_not_crash/.+": _wrong,
        f"{KINDS}/forced_length": _forced_length,
    },
}
