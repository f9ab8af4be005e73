"""Greedy evaluation of a model (docs/method.md, section 6; notes 16 and 17 there).

The model chooses its own number of latent steps or takes a given one (`forced_steps`), and accuracy
is measured at every forced number from 0 on. A training's validation is the same on rows of the
validation split (`validate`). Nothing here reads or writes files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import NumberRule
from latent_reasoning.data.answers import Thinking, in_our_words, judge
from latent_reasoning.data.context import decode
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import encode_prompts
from latent_reasoning.evaluation.latentseek import Seeking
from latent_reasoning.evaluation.metrics import reasoning_length
from latent_reasoning.evaluation.records import Evaluation, ForcedPoint, Prediction
from latent_reasoning.model.generation import Generation, generate, generate_forced
from latent_reasoning.model.latentseek import SeekingReasoner
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime.device import autocast
from latent_reasoning.runtime.parallel import OneProcess


@dataclass(frozen=True)
class EvaluationSettings:
    """How completions are made, and the curve of forced accuracies.

    `prefix` stands before each question. `forced_steps` is the number of latent steps that every
    row takes (None: the model decides). `max_forced_steps` is the end of the curve (None: no
    curve), which uses the first `forced_rows` rows (None: all). `number_rule` says how numbers are
    read.
    """

    prefix: str
    max_new_tokens: int = 512
    batch_size: int = 64
    forced_steps: int | None = None
    max_forced_steps: int | None = None
    forced_rows: int | None = None
    number_rule: NumberRule = "exact"


def evaluate(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationSettings,
    precision: torch.dtype = torch.float32,
) -> Evaluation:
    """Evaluate a model on rows: once as `settings.forced_steps` says, then at every forced length.

    Raises `DataError` if a model that cannot think has to take latent steps.
    """
    model.eval()
    with autocast(model.device, precision):
        start = time.monotonic()
        predictions = predict(model, tokenizer, rows, settings, OneProcess())
        seconds = time.monotonic() - start
        return Evaluation(predictions, forced_curve(model, tokenizer, rows, settings), seconds)


def validate(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationSettings,
    processes: OneProcess,
    beginnings: Sequence[list[int]] | None = None,
) -> dict[str, float]:
    """The means of a training's validation, by the names of its metrics; see `predict`.

    `validation_accuracy`, `validation_reasoning_tokens` (mean), `validation_badly_formatted`
    (share) and `validation_rows`.
    """
    predictions = predict(model, tokenizer, rows, settings, processes, beginnings)
    latent = model.settings is not None
    # A text without an answer counts whole, its EOS too: lengths decide between equal accuracies.
    lengths = [
        p.reasoning_tokens + int(not (latent or p.well_formatted or p.cut_off)) for p in predictions
    ]
    return {
        "validation_accuracy": sum(p.correct for p in predictions) / len(rows),
        "validation_reasoning_tokens": sum(lengths) / len(rows),
        "validation_badly_formatted": sum(not p.well_formatted for p in predictions) / len(rows),
        "validation_rows": len(rows),
    }


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
        curve = [predict(model, tokenizer, rows, replace(settings, forced_steps=0), OneProcess())]
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
    prompts = _prompts(model, tokenizer, rows, replace(settings, forced_steps=None))
    (forced,) = _prompts(model, tokenizer, rows[:1], replace(settings, forced_steps=0))
    ending = forced[len(prompts[0]) :]
    _check_positions(model, rows, prompts, last + len(ending))
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
        _predictions(model, tokenizer, rows, generations, replace(settings, forced_steps=steps))
        for steps, generations in enumerate(curve)
    ]


def _prompts(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationSettings,
) -> list[list[int]]:
    """The prompts of rows, with `settings.forced_steps` up to the answer; in the model's words."""
    own = model.settings
    return encode_prompts(
        rows,
        tokenizer,
        prefix=settings.prefix,
        latent=own is not None,
        forced_steps=settings.forced_steps,
        suffix="" if own is None else own.suffix,
        announcement=None if own is None else own.answer_text,
    )


def _check_positions(
    model: LatentReasoner, rows: Sequence[Row], prompts: Sequence[list[int]], forced: int = 0
) -> None:
    """Raise `DataError` where a prompt with `forced` tokens goes past the base's last position."""
    limit = model.position_limit
    if limit is None:
        return
    long = [
        (row.id, len(prompt) + forced)
        for row, prompt in zip(rows, prompts, strict=True)
        if len(prompt) + forced > limit
    ]
    if long:
        raise DataError(
            f"{type(model.base).__name__} reads {limit} tokens at most, and {len(long)} of "
            f"{len(rows)} prompts are longer (row {long[0][0]}: {long[0][1]} tokens); shorten them "
            "or leave them out"
        )


def predict(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationSettings,
    processes: OneProcess,
    beginnings: Sequence[list[int]] | None = None,
) -> list[Prediction]:
    """Generate and judge a completion of every row, in the rows' order.

    `beginnings` are ids after each prompt that the completion must start with; they count in no
    length, and what follows them is judged as text. Each of several processes decodes its share of
    the rows, and all return all predictions. Model mode (eval) and autocast are the caller's.
    """
    own = processes.share(rows)
    prompts = _prompts(model, tokenizer, own, settings)
    if beginnings is not None:
        firsts = processes.share(beginnings)
        prompts = [prompt + first for prompt, first in zip(prompts, firsts, strict=True)]
    _check_positions(model, own, prompts)
    generations = generate(
        model,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        eos_id=tokenizer.eos_token_id,
        batch_size=settings.batch_size,
    )
    if isinstance(model, SeekingReasoner) and settings.forced_steps is None:
        seeking = Seeking(
            model,
            tokenizer,
            own,
            prompts,
            settings.max_new_tokens,
            settings.batch_size,
            settings.number_rule,
        )
        generations = seeking.improved(generations)
    as_text = beginnings is not None
    return processes.gather(
        _predictions(model, tokenizer, own, generations, settings, as_text=as_text)
    )


def _predictions(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    generations: Sequence[Generation],
    settings: EvaluationSettings,
    *,
    as_text: bool = False,
) -> list[Prediction]:
    """`prediction_of` each row's completion; `as_text`, as if the model could not think."""
    latent = model.settings is not None
    return [
        prediction_of(
            row,
            generation,
            tokenizer,
            latent=latent and not as_text,
            forced_steps=settings.forced_steps,
            rule=settings.number_rule,
            announcement=model.settings.answer_text if latent else None,
        )
        for row, generation in zip(rows, generations, strict=True)
    ]


def prediction_of(
    row: Row,
    generation: Generation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    latent: bool,
    forced_steps: int | None,
    rule: NumberRule = "exact",
    announcement: str | None = None,
) -> Prediction:
    """The verdict on one completion, and the length of its reasoning.

    `announcement` is what the model writes for ` The answer is:` (None: that).
    """
    ids = generation.ids if generation.cut_off else generation.ids[:-1]
    text = in_our_words(decode(tokenizer, ids), announcement)
    thinking: Thinking = "forced" if forced_steps is not None else "latent" if latent else "text"
    verdict = judge(row.answer, text, thinking, rule)
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
        searched=generation.searched,
    )
