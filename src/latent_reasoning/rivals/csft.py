"""CoT2's continuous supervised fine-tuning (arXiv 2505.23648; docs/rivals.md).

Every row takes the same number of latent steps. The target of step t is the distribution of the
t-th tokens of several chains of thought for the row: samples of a teacher, or the data's one. A
chain that has ended continues with the first word of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.data.collation import bucket_by_length
from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import ANSWER_WORDS, encode_prompts, reasoning_text
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.sampling import sample_texts
from latent_reasoning.rivals.latent_sft import mixture_model, mixture_task, plain_examples
from latent_reasoning.rivals.mixture_sft import MixtureTask, counted
from latent_reasoning.runtime import seeds
from latent_reasoning.sft.start import checked_rows
from latent_reasoning.training.run import TrainingRun


def build(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase, MixtureTask]:
    """The model of `run` before training, its tokenizer and its task.

    Raises `ConfigError` where it cannot start from its parent, `DataError` where no row is left.
    """
    model, tokenizer = mixture_model(run)
    settings, data = run.entry.csft, run.experiment.data
    rows = checked_rows(run, tokenizer)
    ((after, *_),) = read_pieces(tokenizer, [ANSWER_WORDS])
    texts = [reasoning_text(row, natural_language=data.natural_language) for row in rows]
    traces = [[ids] for ids in read_pieces(tokenizer, texts)]
    if settings.teacher is not None:
        limit = settings.steps or max(len(ids) for (ids,) in traces)
        traces = teacher_samples(run, rows, after, limit)
    steps = settings.steps or max(len(trace) for samples in traces for trace in samples)
    targets = [counted(aligned(samples, steps, after)) for samples in traces]
    model.change_settings(stop_rule="fixed", max_latent_steps=steps)
    plain = plain_examples(run, tokenizer, rows)
    task = mixture_task(
        run,
        model,
        tokenizer,
        plain,
        targets,
        kl_weight=settings.kl_weight,
        adds_steps=True,
        own_inputs=settings.inputs == "own",
    )
    return model, tokenizer, task


def aligned(traces: Sequence[Sequence[int]], steps: int, after: int) -> list[list[int]]:
    """The t-th tokens of all traces, for t below `steps`; `after` is what follows a trace."""
    return [
        [trace[step] if step < len(trace) else after for trace in traces] for step in range(steps)
    ]


def teacher_samples(
    run: TrainingRun, rows: Sequence[Row], after: int, limit: int
) -> list[list[list[int]]]:
    """Chains of thought that the teacher samples for each row: at most `limit` tokens before
    `after`."""
    settings, runtime = run.entry.csft, run.experiment.runtime
    temperature = settings.trace_temperature
    folder = run.parents[settings.teacher]
    teacher, tokenizer = load(folder, run.device.type), load_tokenizer(folder)
    prefix = run.experiment.data.prompt.training
    prompts = encode_prompts(rows, tokenizer, prefix=prefix, latent=False)
    seed = seeds.seed_for(run.seed, seeds.TRACES.format(model=run.name))
    generator = torch.Generator().manual_seed(seed)
    samples: dict[int, list[list[int]]] = {}
    at_once = max(1, runtime.evaluation_batch_size // settings.traces)
    for batch in bucket_by_length([len(prompt) for prompt in prompts], at_once):
        uniforms = torch.rand(len(batch), settings.traces, limit, generator=generator)
        ids, lengths, _ = sample_texts(
            teacher,
            [prompts[row] for row in batch],
            uniforms,
            after,
            lambda hidden: (teacher.logits(hidden).float() / temperature).softmax(-1),
            teacher.read_tokens,
        )
        for row, own, ends in zip(batch, ids.tolist(), lengths.tolist(), strict=True):
            traces = [trace[:end] for trace, end in zip(own, ends, strict=True)]
            samples[row] = [t[:-1] if t[-1] == after else t for t in traces]
    return [samples[row] for row in range(len(rows))]
