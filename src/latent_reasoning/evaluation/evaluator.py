"""Greedy evaluation of a model (docs/method.md, section 6; conformance notes 16 and 17).

The model chooses its own number of latent steps, or is made to take a given one (`forced_steps`);
and accuracy is measured at every forced number from 0 on. Nothing here knows of files.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.data.answers import Thinking, judge
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import decode, encode_prompts
from latent_reasoning.evaluation.records import Evaluation, ForcedPoint, Prediction
from latent_reasoning.evaluation.validation import reasoning_length
from latent_reasoning.model.generation import Generation, generate, generate_forced
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime.device import autocast


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is evaluated.

    `prefix` stands before each question. `forced_steps` makes every row take that many latent
    steps; None: the model decides. `max_forced_steps` is the end of the curve of forced accuracies,
    which uses the first `forced_rows` rows; None: no curve, all rows.
    """

    prefix: str
    max_new_tokens: int = 512
    batch_size: int = 64
    forced_steps: int | None = None
    max_forced_steps: int | None = None
    forced_rows: int | None = None
    precision: torch.dtype = torch.float32


def evaluate(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationSettings,
) -> Evaluation:
    """Evaluate a model on rows: once as `settings.forced_steps` says, then at every forced length.

    Raises `DataError` where a model that cannot think is to take latent steps.
    """
    start = time.monotonic()
    predictions = predict(model, tokenizer, rows, settings, settings.forced_steps)
    seconds = time.monotonic() - start
    return Evaluation(predictions, forced_curve(model, tokenizer, rows, settings), seconds)


def forced_curve(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationSettings,
) -> list[ForcedPoint]:
    """Accuracy at every forced number of latent steps; a model that cannot think has only 0."""
    if settings.max_forced_steps is None:
        return []
    rows = rows[: settings.forced_rows]
    if model.settings is None:
        curve = [predict(model, tokenizer, rows, settings, 0)]
    else:
        curve = _predict_forced(model, tokenizer, rows, settings, settings.max_forced_steps)
    return [
        ForcedPoint(steps, len(rows), sum(p.correct for p in predictions))
        for steps, predictions in enumerate(curve)
    ]


def _predict_forced(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationSettings,
    last: int,
) -> list[list[Prediction]]:
    """Predictions of the rows after 0, 1, .., `last` latent steps, each prompt read once."""
    encode = functools.partial(encode_prompts, rows, tokenizer, prefix=settings.prefix, latent=True)
    prompts = encode()
    ending = encode(forced_steps=0)[0][len(prompts[0]) :] if rows else []
    model.eval()
    with autocast(model.device, settings.precision):
        curve = generate_forced(
            model,
            prompts,
            ending,
            last=last,
            max_new_tokens=settings.max_new_tokens,
            eos_id=tokenizer.eos_token_id,
            batch_size=settings.batch_size,
        )
    return [
        [
            score(row, generation, tokenizer, latent=True, forced_steps=steps)
            for row, generation in zip(rows, generations, strict=True)
        ]
        for steps, generations in enumerate(curve)
    ]


def predict(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationSettings,
    forced_steps: int | None,
) -> list[Prediction]:
    """Generate and score a completion of every row, in the rows' order."""
    latent = model.settings is not None
    prompts = encode_prompts(
        rows, tokenizer, prefix=settings.prefix, latent=latent, forced_steps=forced_steps
    )
    model.eval()
    with autocast(model.device, settings.precision):
        generations = generate(
            model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            eos_id=tokenizer.eos_token_id,
            batch_size=settings.batch_size,
        )
    return [
        score(row, generation, tokenizer, latent=latent, forced_steps=forced_steps)
        for row, generation in zip(rows, generations, strict=True)
    ]


def score(
    row: Row,
    generation: Generation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    latent: bool,
    forced_steps: int | None,
) -> Prediction:
    """The verdict on one completion, and the length of its reasoning."""
    ids = generation.ids if generation.cut_off else generation.ids[:-1]
    text = decode(tokenizer, ids)
    verdict = judge(row.answer, text, _thinking(latent, forced_steps))
    tokens, steps = reasoning_length(text, tokenizer, latent, forced_steps)
    return Prediction(
        id=row.id,
        question=row.question,
        answer=row.answer,
        completion=text,
        extracted=verdict.extracted,
        correct=verdict.correct,
        well_formatted=verdict.well_formatted,
        cut_off=generation.cut_off,
        reasoning_tokens=tokens,
        latent_steps=steps,
        gold_steps=None if row.steps is None else len(row.steps),
    )


def _thinking(latent: bool, forced_steps: int | None) -> Thinking:
    """What the prompt leaves the model to write before its answer."""
    if forced_steps is not None:
        return "forced"
    return "latent" if latent else "text"
