"""Latent-SFT: latent steps are mixtures of a few words each (arXiv 2510.15522; docs/rivals.md).

This is its second stage. The target mixture of latent step j stands for the j-th `rate` tokens of
the chain of thought: how often each word occurs among them (ours, cheap), or what the first stage
(`encoder_targets.py`) has learnt to make of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, MixtureTargets
from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.examples import PlainExample, StudentExample, within_limit
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import encode_plain_rows, reasoning_text
from latent_reasoning.model.mixtures import Mixture
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.rivals.encoder_targets import encoder_targets
from latent_reasoning.rivals.mixture_sft import (
    MixtureExample,
    MixtureTask,
    Noise,
    counted,
    noisy,
)
from latent_reasoning.runtime import seeds
from latent_reasoning.sft.start import check_positions, checked_rows, latent_model
from latent_reasoning.training.run import TrainingRun


def build(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase, MixtureTask]:
    """The model of `run` before training, its tokenizer and its task.

    Raises `ConfigError` where it cannot start from its parent, `DataError` where no row is left.
    """
    entry, data = run.entry, run.experiment.data
    if entry.model.stop_rule == "fixed":
        raise ConfigError(
            f"models.{run.name}.model.stop_rule: fixed, but latent_sft takes as many latent steps "
            "as a row's chain of thought needs; set it to marker or head"
        )
    model, tokenizer = mixture_model(run)
    rows = checked_rows(run, tokenizer)
    texts = [reasoning_text(row, natural_language=data.natural_language) for row in rows]
    plain = plain_examples(run, tokenizer, rows)
    if entry.latent_sft.targets == "encoder":
        targets = encoder_targets(run, model, tokenizer, plain, texts)
    else:
        rate, size = entry.latent_sft.rate, model.settings.mixture_size
        targets = [counted(chunks(ids, rate), size) for ids in read_pieces(tokenizer, texts)]
    noise = gumbel_noise(run, entry.latent_sft) if entry.latent_sft.gumbel_scale else None
    weight = entry.latent_sft.kl_weight
    task = mixture_task(run, model, tokenizer, plain, targets, kl_weight=weight, noise=noise)
    return model, tokenizer, task


def with_latent_run(example: PlainExample, n: int, settings: LatentSettings) -> StudentExample:
    """A row without reasoning, with START, n CONTINUE and STOP in its place.

    Of these the two-way stop head learns CONTINUE and STOP. Where the language-model head decides
    when to stop, the divergences say what else comes, and STOP alone is a label; where the number
    of steps is fixed, none is.
    """
    run = [settings.start_id, *[settings.continue_id] * n, settings.stop_id]
    ids, begin = example.input_ids, example.question_length
    first = {"head": 1, "marker": 1 + n, "fixed": len(run)}[settings.stop_rule]
    return StudentExample(
        np.concatenate([ids[:begin], np.array(run, dtype=ids.dtype), ids[begin:]]),
        begin,
        len(run),
        begin + first,
        example.target_position + len(run),
    )


def chunks(ids: Sequence[int], rate: int) -> list[Sequence[int]]:
    """`ids` in groups of `rate`, the last of which may be shorter."""
    return [ids[first : first + rate] for first in range(0, len(ids), rate)]


def mixture_model(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    """The model that a training on mixtures starts from, and its tokenizer.

    Raises `ConfigError` where its filter mixes no words.
    """
    entry = run.entry
    if entry.model.recurrent_filter not in ("mixture", "SRE"):
        raise ConfigError(
            f"models.{run.name}.model.recurrent_filter: {entry.model.recurrent_filter}, but "
            f"{entry.method} reasons in mixtures of words; set it to mixture or SRE"
        )
    return latent_model(run, entry)


def plain_examples(
    run: TrainingRun, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> list[PlainExample]:
    """The rows without reasoning."""
    prefix, none = run.experiment.data.prompt.training, [""] * len(rows)
    return encode_plain_rows(rows, tokenizer, prefix=prefix, reasonings=none)


def mixture_task(
    run: TrainingRun,
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    plain: Sequence[PlainExample],
    targets: Sequence[tuple[np.ndarray, np.ndarray]],
    **how: Any,
) -> MixtureTask:
    """The task of a training on `plain` rows with their target mixtures; rows above the token limit
    are dropped. `how` are further arguments of the task.

    Raises `DataError` where no row is left.
    """
    data = run.experiment.data
    examples = [
        MixtureExample(student, *target)
        for example, target in zip(plain, targets, strict=True)
        for student in (with_latent_run(example, len(target[1]), model.settings),)
        if within_limit(student, data.max_tokens)
    ]
    if not examples:
        raise DataError(
            f"all {len(plain)} rows of {run.name} are longer than data.max_tokens: "
            f"{data.max_tokens} allows"
        )
    check_positions(model, max(map(len, examples)), data)
    longest = max(len(e) - e.student.question_length for e in examples)
    return MixtureTask(
        run.name,
        model,
        examples,
        run.entry.training,
        run.experiment.runtime,
        seed=run.seed,
        pad_id=tokenizer.pad_token_id,
        validate=run.validation(model, tokenizer, longest_completion=longest),
        processes=run.processes,
        **how,
    )


def gumbel_noise(run: TrainingRun, settings: MixtureTargets) -> Noise:
    """Gumbel noise for each example of each step, whatever the micro-batches."""

    def draw(step: int, index: int, mixture: Mixture) -> Mixture:
        purpose = seeds.MIXTURE_NOISE.format(model=run.name, step=step, row=index)
        generator = torch.Generator().manual_seed(seeds.seed_for(run.seed, purpose))
        gumbel = -torch.empty(mixture.ids.shape).exponential_(generator=generator).log()
        return noisy(mixture, gumbel, settings.gumbel_scale, settings.gumbel_temperature)

    return draw
