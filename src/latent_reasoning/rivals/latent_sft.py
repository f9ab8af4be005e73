"""Latent-SFT: latent steps are mixtures of a few words each (arXiv 2510.15522; docs/rivals.md).

This is its second stage. The target mixture of latent step j stands for the j-th `rate` tokens of
the chain of thought: how often each word occurs among them (ours, cheap), or what the first stage
(`encoder_targets.py`) has learnt to make of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, MixtureTargets
from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.examples import PlainExample, StudentExample, within_limit
from latent_reasoning.data.round_trip import check_answers
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import encode_plain_rows, reasoning_text
from latent_reasoning.model.lora import attach_lora
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
from latent_reasoning.sft.examples import without_negative_answers
from latent_reasoning.sft.start import check_positions, latent_model
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
    rows = without_negative_answers(run.training_rows(tokenizer), data)
    check_answers(tokenizer, rows)
    texts = [reasoning_text(row, natural_language=data.natural_language) for row in rows]
    plain = plain_examples(run, tokenizer, rows)
    if entry.latent_sft.targets == "encoder":
        targets = encoder_targets(run, model, tokenizer, plain, texts)
    else:
        words = (chunks(ids, entry.latent_sft.rate) for ids in read_pieces(tokenizer, texts))
        targets = [counted(row_words, model.settings.mixture_size) for row_words in words]
    examples = mixture_examples(run, model, plain, targets)
    noise = gumbel_noise(run, entry.latent_sft) if entry.latent_sft.gumbel_scale else None
    weight = entry.latent_sft.kl_weight
    return model, tokenizer, task_of(run, model, tokenizer, examples, weight, noise=noise)


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
    model, tokenizer = latent_model(run, entry)
    if entry.lora is not None:
        attach_lora(model, entry.lora)
    return model, tokenizer


def plain_examples(
    run: TrainingRun, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> list[PlainExample]:
    """The rows without reasoning."""
    prefix, none = run.experiment.data.prompt.training, [""] * len(rows)
    return encode_plain_rows(rows, tokenizer, prefix=prefix, reasonings=none)


def mixture_examples(
    run: TrainingRun,
    model: LatentReasoner,
    plain: Sequence[PlainExample],
    targets: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[MixtureExample]:
    """`plain` rows with their target mixtures; rows above the token limit are dropped.

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
    return examples


def task_of(
    run: TrainingRun,
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[MixtureExample],
    kl_weight: float,
    *,
    adds_steps: bool = False,
    own_inputs: bool = False,
    noise: Noise | None = None,
) -> MixtureTask:
    """The task of a training on these examples."""
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
        kl_weight=kl_weight,
        adds_steps=adds_steps,
        own_inputs=own_inputs,
        noise=noise,
    )


def gumbel_noise(run: TrainingRun, settings: MixtureTargets) -> Noise:
    """Gumbel noise for each example of each step, whatever the micro-batches."""

    def draw(step: int, index: int, mixture: Mixture) -> Mixture:
        purpose = seeds.MIXTURE_NOISE.format(model=run.name, step=step, row=index)
        generator = torch.Generator().manual_seed(seeds.seed_for(run.seed, purpose))
        gumbel = -torch.empty(mixture.ids.shape).exponential_(generator=generator).log()
        return noisy(mixture, gumbel, settings.gumbel_scale, settings.gumbel_temperature)

    return draw
