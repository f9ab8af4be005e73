"""Cases of `generation/` and `bench/`: greedy ids, stop probabilities, lengths, verdicts."""

from __future__ import annotations

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
from tests.conformance.checks import Check, Checks, Tolerance, recorded
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
METRICS = {"score": "accuracy", "correct_p": "accuracy", "n_correct": "correct", "n_total": "n"}
METRICS |= {"n_bad_format": "badly_formatted"}
LENGTHS = {"n_avg_reasoning_tokens": "mean", "n_reasoning_tokens_std": "std"}
LENGTHS |= {"min_reasoning_tokens": "min", "max_reasoning_tokens": "max"}
"""Recorded names of our metrics, and of our `reasoning_tokens_*`."""
CODI_WEIGHT = 1.0
"""Weight of the recorded codi loss of the overfitted batch."""


def _run(vectors: Vectors, entry: Record) -> Checks:
    """One recorded evaluation."""
    config, forced, recorded_rows = entry["eval_config"], entry["forced_steps"], entry["rows"]
    latent, override = config["latent_thinking"], config["latent_thought_count_override"]
    yield Check(forced, override, part="prompts")
    tokenizer = load_tokenizer(vectors.folder(entry["checkpoint"]))
    rows = [_row(row["label"], row["question"]) for row in recorded_rows]
    # The public code's prompts have no prefix (note 1).
    prompts = encode_prompts(rows, tokenizer, prefix="", latent=latent, forced_steps=forced)
    yield Check(prompts, [row["prompt_ids"] for row in recorded_rows], part="prompts")
    generations = generate(
        vectors.model(entry["checkpoint"]),
        prompts,
        max_new_tokens=config["max_new_tokens"],
        eos_id=tokenizer.eos_token_id,
        batch_size=config["batch_size"],
    )
    predictions = []
    for row, generation, expected in zip(rows, generations, recorded_rows, strict=True):
        own = prediction_of(
            row, generation, tokenizer, latent=latent, forced_steps=forced, rule="public"
        )
        predictions.append(own)
        yield Check(generation.ids, expected["output_ids"], part="ids")
        probabilities = map(
            _pairs, (generation.stop_probabilities, expected["continue_stop_probs"])
        )
        yield Check(*probabilities, PROBABILITY, "stop_probabilities")
        length = (
            expected["reasoning_length"] if expected["compare_length"] else own.reasoning_tokens
        )
        yield Check(own.reasoning_tokens, length, part="lengths")
        verdict = {"correct": own.correct, "well_formatted": own.well_formatted}
        yield recorded(verdict, expected, part="verdicts")
    cut_off, lengths = sum(g.cut_off for g in generations), entry["compare_length_aggregates"]
    yield _metrics(predictions, cut_off, entry["metrics"], lengths, part="metrics")


def _pairs(probabilities: list[Any]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).reshape(-1, 2)


def _row(label: str, question: str = "") -> Row:
    return Row(id="recorded-0", question=question, steps=None, answer=label)


def _metrics(
    predictions: list[Prediction], cut_off: int, expected: Record, lengths: bool, part: str = ""
) -> Check:
    """Aggregates of an evaluation; those of lengths only where the public ones are right.

    Badly formatted rows vanish from the public per-row lists (note 16).
    """
    summary = summarise(Evaluation(predictions, [], 0.0).frame(), 0.0)
    formatted = [prediction for prediction in predictions if prediction.well_formatted]
    own = {name: summary[ours] for name, ours in METRICS.items()} | {
        "bad_format_p": summary["badly_formatted"] / summary["n"],
        "n_length_cutoffs": cut_off,
        "correct_list": [prediction.correct for prediction in formatted],
    }
    if lengths:
        own |= {name: summary[f"reasoning_tokens_{ours}"] for name, ours in LENGTHS.items()}
        own |= {"reasoning_lengths": [prediction.reasoning_tokens for prediction in formatted]}
    return Check(own, {key: expected[key] for key in own}, METRIC, part)


def _losses(vectors: Vectors, entry: Record, rows: str) -> Checks:
    """The losses of the overfitted checkpoint on its own batch."""
    batch = dict(vectors.file(f"generation/batch_overfit{rows}.npz"))
    model = vectors.model("generation/ckpt_overfit")
    own = compute_losses(model, batch, Distillation(codi_weight=CODI_WEIGHT))
    yield Check({key: own[key] for key in entry}, entry, COMPONENT)


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
    for name in vectors.paths:
        if name.startswith(("forward/", "generation/")) and name.endswith("/tokenizer.json"):
            return load_tokenizer(vectors.folder(name.removesuffix("/tokenizer.json")))
    raise Skip("no checkpoint with a tokenizer")


def _completion(vectors: Vectors, row: Record, kind: str) -> Checks:
    own, correct = _predict(vectors, kind, row), row.get("correct")
    # A row without expectations has to get a verdict all the same. Empty where the format is bad:
    # the public lists leave such a row out (note 16).
    yield Check(own.correct, own.correct if correct is None else any(correct))
    yield recorded({"n_bad_format": not own.well_formatted}, row)
    if row.get("compare_length"):
        yield Check([own.reasoning_tokens], row["reasoning_lengths"])


def _aggregate(vectors: Vectors, expected: Record, kind: str, limit: str = "") -> Checks:
    rows = vectors.file("generation/eval_stub.json")[kind]["rows"]
    own = [_predict(vectors, kind, row) for row in rows]
    # A crafted completion without EOS is cut off only where it also has the full length.
    full = [limit != "" and len(row["output_ids"]) >= int(limit) for row in rows]
    cut_off = sum(p.cut_off and is_full for p, is_full in zip(own, full, strict=True))
    yield _metrics(own, cut_off, expected, lengths=kind.startswith("override"))


def _wrong(vectors: Vectors, row: Record, kind: str) -> Checks:
    yield Check(_predict(vectors, kind, row).correct, False)


def _forced_length(vectors: Vectors, expected: int, kind: str) -> Checks:
    rows = vectors.file("generation/eval_stub.json")[kind]["rows"]
    yield Check({_predict(vectors, kind, row).reasoning_tokens for row in rows}, {expected})


def _bench(vectors: Vectors, file: str, kind: str) -> Checks:
    """The generated ids recorded in `bench/`; its other files are for measuring speed."""
    expected = vectors.file(file)["new_tokens"]
    prompts = vectors.file(f"bench/eval_prompts_{kind}.npz")
    ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
    name = next((p for p in vectors.paths if p.startswith("bench/ckpt_")), "bench/ckpt_*")
    eos_id = load_tokenizer(vectors.folder(name)).eos_token_id
    generations = generate(
        vectors.model(name),
        [row[read].tolist() for row, read in zip(ids, mask, strict=True)],
        max_new_tokens=expected.shape[1],
        eos_id=eos_id,
        batch_size=len(ids),
    )
    padding = [eos_id] * expected.shape[1]
    yield Check([(g.ids + padding)[: expected.shape[1]] for g in generations], expected.tolist())


KINDS = r"(adaptive|cot_mode|override\d+)"
READERS = {
    r"bench/eval_expected_(.*)\.npz": {"": _bench},
    r"generation/expected\.json": {
        r"overfit_loss_on_(\d+)": _losses,
        r"(?!notes$|checks$|overfit_rows$|overfit_loss_on_\d+$).+/.+": _run,
    },
    r"generation/eval_stub\.json": {
        f"{KINDS}/rows/.+": _completion,
        rf"{KINDS}/aggregate.*max_new_tokens_(\d+)": _aggregate,
        f"{KINDS}/result": _aggregate,
        f"{KINDS}/must_be_wrong_not_crash/.+": _wrong,
        f"{KINDS}/forced_length": _forced_length,
    },
}
