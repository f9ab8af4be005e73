"""The work that is timed: each workload once by the naive path and once by the package.

A run takes the number of the repetition, which seeds all random draws, and returns what it read and
wrote. Both paths do the same work, so that this is equal too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import naive
from benchmarks.inputs import STEPS, Inputs
from latent_reasoning.config import Distillation, LatentSftModel, RlModel, Runtime, Training
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.model.generation import generate, generate_forced
from latent_reasoning.rl.reward import judge_completions, reward_groups
from latent_reasoning.rl.rollouts import Completion, Rollout, draw_uniforms, sample
from latent_reasoning.rl.task import AdaptiveLengthTask, GroupBatch
from latent_reasoning.sft.latent_sft import LatentSftTask
from latent_reasoning.training.gradients import accumulate_gradients
from latent_reasoning.training.task import Task
from latent_reasoning.training.text import TextTask

FORCED_STEPS = 10
"""Largest number of forced latent steps, as in the laptop experiment."""
DISTILLATION = Distillation(codi_weight=20.0)
RUNTIME = Runtime(device="cpu", precision="float32")
BELOW_ONE = 1 - 2**-24
"""The largest float32 below 1."""


@dataclass(frozen=True)
class Work:
    """What a run read, and what it wrote after that, one entry per text; SFT writes nothing."""

    read: Sequence[Sequence[int]]
    written: Sequence[Sequence[int]] = ()

    def __add__(self, other: Work) -> Work:
        return Work([*self.read, *other.read], [*self.written, *other.written])

    @property
    def tokens(self) -> int:
        """Number of real (unpadded) tokens of all texts; each sample counts its prompt anew."""
        return sum(map(len, self.read)) + sum(map(len, self.written))


Run = Callable[[int], Work]


@dataclass(frozen=True)
class Workload:
    """One kind of work on a number of `examples`: rows, prompts or samples."""

    name: str
    examples: int
    naive: Run
    fast: Run


def build_workloads(inputs: Inputs, names: Sequence[str]) -> list[Workload]:
    """The workloads with these names."""
    return [WORKLOADS[name](inputs, name) for name in names]


# -------------------------------------------------------------------------------------------- SFT


def _latent_sft(inputs: Inputs, name: str) -> Workload:
    """A training step of latent SFT, forward and backward."""
    model, pad_id = inputs.model, inputs.tokenizer.eos_token_id
    batch = collate_latent(inputs.sft, pad_id)
    entry = LatentSftModel(distillation=DISTILLATION, training=_training(len(inputs.sft)))
    task = LatentSftTask(
        name, model, inputs.sft, entry, RUNTIME, seed=0, pad_id=pad_id, validate=dict
    )
    texts = [side.input_ids for row in inputs.sft for side in (row.teacher, row.student)]
    return _sft(inputs, task, lambda: naive.latent_sft_loss(model, batch, DISTILLATION), texts)


def _cot_sft(inputs: Inputs, name: str) -> Workload:
    """A training step on the teacher's text alone, forward and backward."""
    model, examples = inputs.model, [example.teacher for example in inputs.sft]
    pad_id = inputs.tokenizer.eos_token_id
    batch = collate_latent(inputs.sft, pad_id)
    training = _training(len(examples))
    task = TextTask(name, model, examples, training, RUNTIME, seed=0, pad_id=pad_id, validate=dict)
    texts = [example.input_ids for example in examples]
    return _sft(inputs, task, lambda: naive.token_sft_loss(model, batch), texts)


def _sft(
    inputs: Inputs, task: Task, naive_loss: Callable[[], Tensor], texts: list[Sequence[int]]
) -> Workload:
    """The gradient of a loss over all rows, by the naive path and by the package's task."""
    model, work = inputs.model, Work(texts)
    return Workload(
        task.name,
        len(inputs.sft),
        _gradient(model, work, lambda _: naive_loss().backward()),
        _gradient(model, work, lambda step: accumulate_gradients(model, task, step)),
    )


def _gradient(model: nn.Module, work: Work, compute: Callable[[int], object]) -> Run:
    """A run that computes a gradient anew, by `compute`, and always does the same work."""

    def run(repetition: int) -> Work:
        model.zero_grad()
        compute(repetition)
        return work

    return run


def _training(batch_size: int) -> Training:
    return Training(steps=1, batch_size=batch_size)


# ------------------------------------------------------------------------------------- evaluation


def _naive_answers(inputs: Inputs, prompts: list[list[int]]) -> Work:
    """Greedy answers, one padded batch after the other, each until its last row ends."""
    answers = []
    for first in range(0, len(prompts), inputs.batch_size):
        batch = prompts[first : first + inputs.batch_size]
        answers += naive.generate(inputs.model, batch, naive.greedy, **inputs.decoding)
    return Work(prompts, answers)


def _fast_answers(inputs: Inputs, prompts: list[list[int]]) -> Work:
    """Greedy answers as the package evaluates."""
    written = generate(inputs.model, prompts, batch_size=inputs.batch_size, **inputs.decoding)
    return Work(prompts, [generation.ids for generation in written])


def _answers(inputs: Inputs, name: str, prompts: list[list[int]]) -> Workload:
    return Workload(
        name,
        len(prompts),
        lambda _: _naive_answers(inputs, prompts),
        lambda _: _fast_answers(inputs, prompts),
    )


def _evaluation(inputs: Inputs, name: str) -> Workload:
    """The whole evaluation of the pipeline: adaptive answers, and those at every forced length.

    The naive path reads the prompts anew for each length.
    """
    forced = [inputs.forced(steps) for steps in range(FORCED_STEPS + 1)]

    def run_naive(repetition: int) -> Work:
        curve = (_naive_answers(inputs, prompts) for prompts in forced)
        return sum(curve, _naive_answers(inputs, inputs.prompts))

    def run_fast(repetition: int) -> Work:
        curve = generate_forced(
            inputs.model,
            inputs.prompts,
            inputs.ending,
            last=FORCED_STEPS,
            batch_size=inputs.batch_size,
            **inputs.decoding,
        )
        works = (
            Work(prompts, [generation.ids for generation in written])
            for prompts, written in zip(forced, curve, strict=True)
        )
        return sum(works, _fast_answers(inputs, inputs.prompts))

    return Workload(name, (FORCED_STEPS + 2) * len(inputs.prompts), run_naive, run_fast)


# ------------------------------------------------------------------------------------------- GRPO


class _Grpo:
    """What the three workloads of RL share: the task, and the naive version of its step."""

    def __init__(self, inputs: Inputs, name: str) -> None:
        self.tokenizer, self.shape = inputs.tokenizer, inputs.shape
        self.model, self.prompts = inputs.model, inputs.grpo
        self.ids = [prompt.ids for prompt in self.prompts]
        self.samples = len(self.prompts) * self.shape.group_size
        self.entry = RlModel(
            **{"from": "latent"},
            group_size=self.shape.group_size,
            max_new_tokens=self.shape.rollout_tokens,
            training=_training(len(self.prompts)),
        )
        of = name, self.model, self.tokenizer, self.prompts, self.entry, RUNTIME
        self.task = AdaptiveLengthTask(*of, seed=0, validate=dict)
        self.task._draws = lambda round_: (self.draws(round_),)

    def draws(self, repetition: int) -> Tensor:
        """The uniform numbers of a repetition, the same for both paths.

        A decision continues if the draw is below its probability: 0 always does, `BELOW_ONE` never.
        """
        size = len(self.prompts), self.shape.group_size, self.shape.rollout_tokens
        draws, steps = draw_uniforms(*size, seed=repetition), self.shape.sampled_steps
        if steps is not None:
            draws[:, :, :steps] = 0
            draws[:, :, steps : steps + 1] = BELOW_ONE
        return draws

    def naive_rollout(self, ids: list[list[int]], repetition: int) -> Rollout:
        """A rollout in which every sample is a row of its own."""
        draws = self.draws(repetition)
        return unshared(ids, naive.sample(self.model, ids, draws, self.task.sampling))

    def naive_step(self, repetition: int) -> Work:
        """Sample, judge, reward and take the gradient, every sample on its own."""
        (order,) = self.task.plan.micro_batches(repetition)
        prompts = [self.prompts[index] for index in order]
        rollout = self.naive_rollout([prompt.ids for prompt in prompts], repetition)
        verdicts = judge_completions(rollout, prompts, self.tokenizer)
        questions = [prompt.text for prompt in prompts]
        advantages, _ = reward_groups([rollout], [verdicts], questions, self.entry.reward)
        self.model.zero_grad()
        self.naive_update(rollout, advantages[0])
        return sampled(rollout)

    def naive_update(self, rollout: Rollout, advantages: Tensor) -> None:
        """The gradient of the loss of `rollout`, whose samples have these `advantages`."""
        naive.grpo_loss(
            self.model,
            self.task.start_model,
            rollout.prompts,
            rollout.completions,
            advantages,
            self.task.sampling,
            kl_weight=self.entry.kl_weight,
        ).loss.backward()


def unshared(prompts: list[list[int]], completions: Sequence[Completion]) -> Rollout:
    """Samples as a rollout in which equal samples stay separate."""
    positions = torch.arange(len(completions)).view(len(prompts), -1)
    return Rollout(prompts, list(completions), positions)


def samples_of(rollout: Rollout) -> list[Completion]:
    """Every sample of a rollout as a completion of its own."""
    distinct = (rollout.completions[i] for i in rollout.sample_completion.flatten().tolist())
    return [Completion(completion.prompt, completion.ids) for completion in distinct]


def sampled(rollout: Rollout) -> Work:
    """The samples as work: each reads its prompt and writes its completion."""
    samples = samples_of(rollout)
    return Work([rollout.prompts[s.prompt] for s in samples], [s.ids for s in samples])


def _grpo_rollout(inputs: Inputs, name: str) -> Workload:
    """Sampling alone."""
    grpo = _Grpo(inputs, name)

    @torch.no_grad()
    def run_fast(repetition: int) -> Work:
        rollout, _ = sample(grpo.model, grpo.ids, grpo.draws(repetition), grpo.task.sampling)
        return sampled(rollout)

    return Workload(
        name, grpo.samples, lambda number: sampled(grpo.naive_rollout(grpo.ids, number)), run_fast
    )


def _grpo_update(inputs: Inputs, name: str) -> Workload:
    """Scores under policy and reference, loss and gradient, of samples drawn in advance."""
    grpo = _Grpo(inputs, name)
    with torch.no_grad():
        rollout, _ = sample(grpo.model, grpo.ids, grpo.draws(0), grpo.task.sampling)
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(len(rollout.completions), generator=generator)
    apart, samples = unshared(grpo.ids, samples_of(rollout)), sampled(rollout)
    # The update only reads: the samples count as read.
    work = Work(
        [[*read, *written] for read, written in zip(samples.read, samples.written, strict=True)]
    )

    def naive_update(_: int) -> None:
        grpo.naive_update(apart, advantages[rollout.sample_completion.flatten()])

    def fast_update(_: int) -> None:
        reference = grpo.task.reference_log_probs(rollout)
        batch = GroupBatch(rollout, advantages, {}, reference, trajectory=None)
        grpo.task.loss(batch).loss.backward()

    runs = (_gradient(grpo.model, work, update) for update in (naive_update, fast_update))
    return Workload(name, grpo.samples, *runs)


def _grpo_step(inputs: Inputs, name: str) -> Workload:
    """A whole step: rollout, rewards, both scores, loss and gradient."""
    grpo = _Grpo(inputs, name)

    def run_fast(repetition: int) -> Work:
        grpo.model.zero_grad()
        accumulate_gradients(grpo.model, grpo.task, repetition)
        (batch,) = grpo.task.micro_batches(repetition)
        return sampled(batch.rollout)

    return Workload(name, grpo.samples, grpo.naive_step, run_fast)


WORKLOADS: dict[str, Callable[[Inputs, str], Workload]] = {
    "latent_sft": _latent_sft,
    "cot_sft": _cot_sft,
    "evaluation_adaptive": lambda inputs, name: _answers(inputs, name, inputs.prompts),
    "evaluation_forced": lambda inputs, name: _answers(inputs, name, inputs.forced(STEPS)),
    "evaluation": _evaluation,
    "grpo_rollout": _grpo_rollout,
    "grpo_update": _grpo_update,
    "grpo_step": _grpo_step,
}
