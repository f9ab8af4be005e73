"""The work that is timed: each workload once as the naive path does it and once as the package.

A run takes the number of the repetition, which seeds what is drawn at random, and returns what it
read and wrote: both paths do the same work, so that this is equal too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import flops, naive
from benchmarks.inputs import Inputs
from latent_reasoning.config import Distillation, LatentSftModel, RlModel, Runtime, Training
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.model.generation import generate, generate_forced
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.rl.prompts import RlPrompt
from latent_reasoning.rl.reward import judge_completions, reward_groups
from latent_reasoning.rl.rollouts import Completion, Rollout, draw_uniforms, sample
from latent_reasoning.rl.task import AdaptiveLengthTask, GroupBatch
from latent_reasoning.sft.latent_sft import LatentSftTask
from latent_reasoning.training.loop import accumulate_gradients
from latent_reasoning.training.text import TextTask

FORCED_STEPS = 10
"""End of the curve of forced accuracies, as in the laptop experiment."""
DISTILLATION = Distillation(codi_weight=20.0)
RUNTIME = Runtime(device="cpu", precision="float32")
BELOW_ONE = 1 - 2**-24
"""The largest float32 below 1."""


@dataclass(frozen=True)
class Work:
    """What a run read and what it wrote after it, an entry a text; nothing is written in SFT."""

    read: Sequence[Sequence[int]]
    written: Sequence[Sequence[int]] = ()

    def texts(self, special: LatentSettings) -> list[flops.Text]:
        """What was read before and while writing, and what of it was needed."""
        pairs = zip(self.read, self.written, strict=True)
        return [flops.answered(read, written, special) for read, written in pairs]

    @property
    def tokens(self) -> int:
        """Real (unpadded) tokens: those that the texts hold, a sample's prompt each time."""
        return sum(map(len, self.read)) + sum(map(len, self.written))


Run = Callable[[int], Work]


@dataclass(frozen=True)
class Workload:
    """One kind of work on `examples` rows, prompts or samples.

    `minimum` is how many FLOPs the work that a run did takes at least.
    """

    name: str
    examples: int
    naive: Run
    fast: Run
    minimum: Callable[[Work], int]


def build_workloads(inputs: Inputs, names: Sequence[str]) -> list[Workload]:
    """The workloads of `WORKLOADS` with these names."""
    return [WORKLOADS[name](inputs, name) for name in names]


# -------------------------------------------------------------------------------------------- SFT


def _latent_sft(inputs: Inputs, name: str) -> Workload:
    """A training step, forward and backward, of latent SFT."""
    model, pad_id = inputs.model, inputs.tokenizer.eos_token_id
    batch = collate_latent(inputs.sft, pad_id)
    entry = LatentSftModel(distillation=DISTILLATION, training=_training(len(inputs.sft)))
    task = LatentSftTask(
        name, model, inputs.sft, entry, RUNTIME, seed=0, pad_id=pad_id, validate=dict
    )
    work = Work([side.input_ids for row in inputs.sft for side in (row.teacher, row.student)])

    def run_naive(repetition: int) -> Work:
        model.zero_grad()
        naive.latent_sft_loss(model, batch, DISTILLATION).backward()
        return work

    def run_fast(repetition: int) -> Work:
        model.zero_grad()
        accumulate_gradients(model, task, repetition)
        return work

    def minimum(work: Work) -> int:
        rows = (flops.taught(row, model.settings) for row in inputs.sft)
        return flops.TRAINING * flops.minimum(model, rows)

    return Workload(name, len(inputs.sft), run_naive, run_fast, minimum)


def _cot_sft(inputs: Inputs, name: str) -> Workload:
    """A training step, forward and backward, on the teacher's text alone."""
    model, examples = inputs.model, [example.teacher for example in inputs.sft]
    pad_id = inputs.tokenizer.eos_token_id
    batch = collate_latent(inputs.sft, pad_id)
    training = _training(len(examples))
    task = TextTask(name, model, examples, training, RUNTIME, seed=0, pad_id=pad_id, validate=dict)
    work = Work([example.input_ids for example in examples])

    def run_naive(repetition: int) -> Work:
        model.zero_grad()
        naive.token_sft_loss(model, batch).backward()
        return work

    def run_fast(repetition: int) -> Work:
        model.zero_grad()
        accumulate_gradients(model, task, repetition)
        return work

    def minimum(work: Work) -> int:
        rows = ([flops.written(example, model.settings)] for example in examples)
        return flops.TRAINING * flops.minimum(model, rows)

    return Workload(name, len(examples), run_naive, run_fast, minimum)


def _training(batch_size: int) -> Training:
    return Training(steps=1, batch_size=batch_size)


# ------------------------------------------------------------------------------------- evaluation


class _Evaluation:
    """Greedy answers as both paths write them.

    The naive path takes the prompts in their order, a padded batch after the other.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.model, self.inputs = inputs.model, inputs
        self.batch_size = inputs.batch_size or len(inputs.adaptive)
        self.settings = {
            "max_new_tokens": inputs.evaluation_tokens,
            "eos_id": inputs.tokenizer.eos_token_id,
        }

    def naive(self, prompts: list[list[int]]) -> Work:
        """One padded batch after the other, each until its last row is done."""
        answers = []
        for first in range(0, len(prompts), self.batch_size):
            batch = prompts[first : first + self.batch_size]
            answers += naive.generate(self.model, batch, naive.greedy, **self.settings)
        return Work(prompts, answers)

    def fast(self, prompts: list[list[int]]) -> Work:
        """As the package evaluates."""
        written = generate(self.model, prompts, batch_size=self.batch_size, **self.settings)
        return Work(prompts, [generation.ids for generation in written])

    def forced_prompts(self, steps: int) -> list[list[int]]:
        """The prompts of so many forced latent steps."""
        end = [self.model.settings.continue_id] * steps + self.inputs.ending
        return [prompt + end for prompt in self.inputs.adaptive]

    def fast_curve(self) -> list[Work]:
        """Answers after 0, 1, .. forced latent steps, as the package evaluates them."""
        curve = generate_forced(
            self.model,
            self.inputs.adaptive,
            self.inputs.ending,
            last=FORCED_STEPS,
            batch_size=self.batch_size,
            **self.settings,
        )
        return [
            Work(self.forced_prompts(steps), [generation.ids for generation in written])
            for steps, written in enumerate(curve)
        ]

    def minimum(self, work: Work) -> int:
        """Each prompt with all that was written after it, forced or not, is one example."""
        texts, rows = work.texts(self.model.settings), len(self.inputs.adaptive)
        return flops.FORWARD * flops.minimum(self.model, (texts[i::rows] for i in range(rows)))


def _evaluation_of(inputs: Inputs, name: str, prompts: list[list[int]]) -> Workload:
    """Greedy answers to the prompts."""
    paths = _Evaluation(inputs)
    return Workload(
        name,
        len(prompts),
        lambda repetition: paths.naive(prompts),
        lambda repetition: paths.fast(prompts),
        paths.minimum,
    )


def _evaluation_adaptive(inputs: Inputs, name: str) -> Workload:
    return _evaluation_of(inputs, name, inputs.adaptive)


def _evaluation_forced(inputs: Inputs, name: str) -> Workload:
    return _evaluation_of(inputs, name, inputs.forced)


def _evaluation(inputs: Inputs, name: str) -> Workload:
    """The pipeline's whole job: adaptive answers, and those at every forced number of steps.

    The naive path reads the prompts anew for each number.
    """
    paths = _Evaluation(inputs)

    def run_naive(repetition: int) -> Work:
        forced = (paths.naive(paths.forced_prompts(steps)) for steps in range(FORCED_STEPS + 1))
        return _together([paths.naive(inputs.adaptive), *forced])

    def run_fast(repetition: int) -> Work:
        return _together([paths.fast(inputs.adaptive), *paths.fast_curve()])

    answers = (FORCED_STEPS + 2) * len(inputs.adaptive)
    return Workload(name, answers, run_naive, run_fast, paths.minimum)


def _together(parts: Sequence[Work]) -> Work:
    return Work(
        [text for part in parts for text in part.read],
        [text for part in parts for text in part.written],
    )


# ------------------------------------------------------------------------------------------- GRPO


class _GivenDraws(AdaptiveLengthTask):
    """The task of the package, which samples from given uniform numbers, by round."""

    given: Callable[[int], Tensor]

    def _draws(self, round_: int) -> tuple[Tensor, ...]:
        return (self.given(round_),)


class _Grpo:
    """What the three workloads of RL share: the task, and the same step without sharing."""

    def __init__(self, inputs: Inputs, name: str) -> None:
        self.inputs, self.model, self.tokenizer = inputs, inputs.model, inputs.tokenizer
        self.prompts = inputs.grpo
        self.entry = RlModel(
            **{"from": "latent"},
            group_size=inputs.group_size,
            max_new_tokens=inputs.rollout_tokens,
            training=_training(len(self.prompts)),
        )
        self.task = _GivenDraws(
            name,
            self.model,
            self.tokenizer,
            self.prompts,
            self.entry,
            RUNTIME,
            seed=0,
            validate=dict,
        )
        self.task.given = self.draws
        self.samples = len(self.prompts) * inputs.group_size

    def draws(self, repetition: int) -> Tensor:
        """The uniform numbers of a repetition, the same for both paths.

        A decision continues below its probability: 0 always does, `BELOW_ONE` never.
        """
        shape = len(self.prompts), self.inputs.group_size, self.entry.max_new_tokens
        draws = draw_uniforms(*shape, seed=repetition)
        steps = self.inputs.sampled_steps
        if steps is not None:
            draws[:, :, :steps] = 0
            draws[:, :, steps : steps + 1] = BELOW_ONE
        return draws

    def naive_rollout(self, prompts: Sequence[RlPrompt], repetition: int) -> list[Completion]:
        """Every sample a row of its own."""
        ids = [prompt.ids for prompt in prompts]
        return naive.sample(self.model, ids, self.draws(repetition), self.task.sampling)

    def naive_step(self, repetition: int) -> Work:
        """Sample, judge, reward and take the gradient, every sample on its own."""
        (order,) = self.task.plan.micro_batches(repetition)
        prompts = [self.prompts[index] for index in order]
        completions = self.naive_rollout(prompts, repetition)
        rollout = unshared([prompt.ids for prompt in prompts], completions)
        verdicts = judge_completions(rollout, prompts, self.tokenizer)
        questions = [prompt.text for prompt in prompts]
        advantages, _ = reward_groups([rollout], [verdicts], questions, self.entry.reward)
        self.naive_update(rollout, advantages[0])
        return sampled(rollout)

    def naive_update(self, rollout: Rollout, advantages: Tensor) -> None:
        """The gradient of the loss of samples, each with an advantage."""
        self.model.zero_grad()
        naive.grpo_loss(
            self.model,
            self.task.start_model,
            rollout.prompts,
            rollout.completions,
            advantages,
            self.task.sampling,
            kl_weight=self.entry.kl_weight,
        ).loss.backward()

    def minimum(self, work: Work) -> int:
        """FLOPs of one forward over the samples: those of a prompt are one example."""
        texts = work.texts(self.model.settings)
        size = self.inputs.group_size
        groups = (texts[first : first + size] for first in range(0, len(texts), size))
        return flops.minimum(self.model, groups)


def unshared(prompts: list[list[int]], completions: Sequence[Completion]) -> Rollout:
    """Samples as a rollout in which equal ones stay apart."""
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
    ids = [prompt.ids for prompt in grpo.prompts]

    def run_naive(repetition: int) -> Work:
        return sampled(unshared(ids, grpo.naive_rollout(grpo.prompts, repetition)))

    @torch.no_grad()
    def run_fast(repetition: int) -> Work:
        rollout, _ = sample(grpo.model, ids, grpo.draws(repetition), grpo.task.sampling)
        return sampled(rollout)

    return Workload(
        name, grpo.samples, run_naive, run_fast, lambda work: flops.FORWARD * grpo.minimum(work)
    )


def _grpo_update(inputs: Inputs, name: str) -> Workload:
    """Scores under policy and reference, loss and gradient, of samples drawn beforehand."""
    grpo = _Grpo(inputs, name)
    ids = [prompt.ids for prompt in grpo.prompts]
    with torch.no_grad():
        rollout, _ = sample(grpo.model, ids, grpo.draws(0), grpo.task.sampling)
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(len(rollout.completions), generator=generator)
    apart, samples = unshared(ids, samples_of(rollout)), sampled(rollout)
    # Nothing is written here: the samples are read.
    work = Work(
        [[*read, *written] for read, written in zip(samples.read, samples.written, strict=True)]
    )

    def run_naive(repetition: int) -> Work:
        grpo.naive_update(apart, advantages[rollout.sample_completion.flatten()])
        return work

    def run_fast(repetition: int) -> Work:
        grpo.model.zero_grad()
        reference = grpo.task.reference_log_probs(rollout)
        batch = GroupBatch(rollout, advantages, {}, reference, trajectory=None)
        grpo.task.loss(batch).loss.backward()
        return work

    def minimum(work: Work) -> int:
        """Policy forward and backward, reference forward."""
        return (flops.TRAINING + flops.FORWARD) * grpo.minimum(samples)

    return Workload(name, grpo.samples, run_naive, run_fast, minimum)


def _grpo_step(inputs: Inputs, name: str) -> Workload:
    """A whole step: rollout, rewards, both scores, loss and gradient."""
    grpo = _Grpo(inputs, name)

    def run_fast(repetition: int) -> Work:
        grpo.model.zero_grad()
        accumulate_gradients(grpo.model, grpo.task, repetition)
        (batch,) = grpo.task.micro_batches(repetition)
        return sampled(batch.rollout)

    def minimum(work: Work) -> int:
        """The forward of sampling is the policy's; then its backward, and the reference."""
        return (flops.TRAINING + flops.FORWARD) * grpo.minimum(work)

    return Workload(name, grpo.samples, grpo.naive_step, run_fast, minimum)


WORKLOADS: dict[str, Callable[[Inputs, str], Workload]] = {
    "latent_sft": _latent_sft,
    "cot_sft": _cot_sft,
    "evaluation_adaptive": _evaluation_adaptive,
    "evaluation_forced": _evaluation_forced,
    "evaluation": _evaluation,
    "grpo_rollout": _grpo_rollout,
    "grpo_update": _grpo_update,
    "grpo_step": _grpo_step,
}
