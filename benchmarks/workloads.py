"""The work that is timed: each workload once as the naive path does it and once as the package.

A run takes the number of the repetition, which seeds what is drawn at random, and returns the real
(unpadded) tokens of its examples: those that a row holds, or a sample reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import naive
from benchmarks.inputs import EOS, Inputs
from latent_reasoning.config import Distillation, LatentSftModel, RlModel, Runtime, Training
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.model.generation import generate
from latent_reasoning.rl.groups import Prompt, judge_completions, reward_groups
from latent_reasoning.rl.rollouts import Completion, Rollout, draw_uniforms, sample
from latent_reasoning.rl.task import AdaptiveLengthTask, GroupBatch
from latent_reasoning.sft.latent_sft import LatentSftTask
from latent_reasoning.text_training import TextTask
from latent_reasoning.training import accumulate_gradients

EVALUATION_TOKENS = 32
GROUP_SIZE = 16
DISTILLATION = Distillation(codi_weight=20.0)
RUNTIME = Runtime(device="cpu", precision="float32")

Run = Callable[[int], int]


@dataclass(frozen=True)
class Workload:
    """One kind of work on `examples` rows, prompts or samples."""

    name: str
    examples: int
    naive: Run
    fast: Run


def build_workloads(inputs: Inputs, names: Sequence[str]) -> list[Workload]:
    """The workloads of `WORKLOADS` with these names."""
    return [WORKLOADS[name](inputs, name) for name in names]


# -------------------------------------------------------------------------------------------- SFT


def _latent_sft(inputs: Inputs, name: str) -> Workload:
    """A training step, forward and backward, of latent SFT."""
    model, batch = inputs.model, collate_latent(inputs.sft, EOS)
    entry = LatentSftModel(distillation=DISTILLATION, training=_training(len(inputs.sft)))
    task = LatentSftTask(name, model, inputs.sft, entry, RUNTIME, seed=0, pad_id=EOS, validate=dict)
    tokens = int(batch["attention_mask"].sum() + batch["latent_attention_mask"].sum())

    def run_naive(repetition: int) -> int:
        model.zero_grad()
        naive.latent_sft_loss(model, batch, DISTILLATION).backward()
        return tokens

    def run_fast(repetition: int) -> int:
        model.zero_grad()
        accumulate_gradients(model, task, repetition)
        return tokens

    return Workload(name, len(inputs.sft), run_naive, run_fast)


def _cot_sft(inputs: Inputs, name: str) -> Workload:
    """A training step, forward and backward, on the teacher's text alone."""
    model, examples = inputs.model, [example.teacher for example in inputs.sft]
    batch = collate_latent(inputs.sft, EOS)
    task = TextTask(
        name,
        model,
        examples,
        _training(len(examples)),
        RUNTIME,
        seed=0,
        pad_id=EOS,
        validate=dict,
    )
    tokens = int(batch["attention_mask"].sum())

    def run_naive(repetition: int) -> int:
        model.zero_grad()
        naive.token_sft_loss(model, batch).backward()
        return tokens

    def run_fast(repetition: int) -> int:
        model.zero_grad()
        accumulate_gradients(model, task, repetition)
        return tokens

    return Workload(name, len(examples), run_naive, run_fast)


def _training(batch_size: int) -> Training:
    return Training(steps=1, batch_size=batch_size)


# ------------------------------------------------------------------------------------- evaluation


def _evaluation(inputs: Inputs, name: str, prompts: list[list[int]]) -> Workload:
    """Greedy answers to all prompts in one batch."""
    read = sum(map(len, prompts))
    settings = {"max_new_tokens": EVALUATION_TOKENS, "eos_id": EOS}

    def run_naive(repetition: int) -> int:
        written = naive.generate(inputs.model, prompts, naive.greedy, **settings)
        return read + sum(map(len, written))

    def run_fast(repetition: int) -> int:
        written = generate(inputs.model, prompts, batch_size=len(prompts), **settings)
        return read + sum(len(generation.ids) for generation in written)

    return Workload(name, len(prompts), run_naive, run_fast)


def _evaluation_adaptive(inputs: Inputs, name: str) -> Workload:
    return _evaluation(inputs, name, inputs.adaptive)


def _evaluation_forced(inputs: Inputs, name: str) -> Workload:
    return _evaluation(inputs, name, inputs.forced)


# ------------------------------------------------------------------------------------------- GRPO


class _Grpo:
    """What the three workloads of RL share: the task, and the same step without sharing."""

    def __init__(self, inputs: Inputs, name: str) -> None:
        self.model = inputs.model
        self.tokenizer = inputs.tokenizer
        self.prompts = [Prompt(ids, self.tokenizer.decode(ids), label="1") for ids in inputs.grpo]
        self.ids = inputs.grpo
        self.entry = RlModel(
            **{"from": "latent"}, group_size=GROUP_SIZE, training=_training(len(self.ids))
        )
        self.task = AdaptiveLengthTask(
            name,
            self.model,
            self.tokenizer,
            self.prompts,
            self.entry,
            RUNTIME,
            seed=0,
            validate=dict,
        )
        self.samples = len(self.ids) * GROUP_SIZE

    def draws(self, repetition: int) -> Tensor:
        """The uniform numbers of a repetition, the same for both paths."""
        return draw_uniforms(len(self.ids), GROUP_SIZE, self.entry.max_new_tokens, seed=repetition)

    def tokens(self, completions: Sequence[Completion], prompts: Sequence[list[int]]) -> int:
        """Real tokens of samples: prompt and completion, each sample counted."""
        return sum(c.count * (len(prompts[c.prompt]) + len(c.ids)) for c in completions)

    def naive_step(self, repetition: int) -> int:
        """Sample, judge, reward and take the gradient, every sample on its own."""
        completions = naive.sample(self.model, self.ids, self.draws(repetition), self.task.sampling)
        rollout = unshared(self.ids, completions)
        verdicts = judge_completions(rollout, self.prompts, self.tokenizer)
        questions = range(len(self.ids))
        advantages, _ = reward_groups([rollout], [verdicts], questions, self.entry.reward)
        self.naive_update(completions, advantages[0])
        return self.tokens(completions, self.ids)

    def naive_update(self, completions: Sequence[Completion], advantages: Tensor) -> None:
        """The gradient of the loss of given samples, each with an advantage."""
        self.model.zero_grad()
        naive.grpo_loss(
            self.model,
            self.task.start_model,
            self.ids,
            completions,
            advantages,
            self.task.sampling,
            kl_weight=self.entry.kl_weight,
        ).loss.backward()


def unshared(prompts: list[list[int]], completions: Sequence[Completion]) -> Rollout:
    """Samples as a rollout in which equal ones stay apart."""
    positions = torch.arange(len(completions)).view(len(prompts), -1)
    return Rollout(prompts, list(completions), positions)


def samples_of(rollout: Rollout) -> list[Completion]:
    """Every sample of a rollout as a completion of its own."""
    distinct = (rollout.completions[i] for i in rollout.sample_completion.flatten().tolist())
    return [Completion(completion.prompt, completion.ids) for completion in distinct]


def _grpo_rollout(inputs: Inputs, name: str) -> Workload:
    """Sampling alone."""
    grpo = _Grpo(inputs, name)

    def run_naive(repetition: int) -> int:
        draws = grpo.draws(repetition)
        completions = naive.sample(grpo.model, grpo.ids, draws, grpo.task.sampling)
        return grpo.tokens(completions, grpo.ids)

    @torch.no_grad()
    def run_fast(repetition: int) -> int:
        rollout, _ = sample(grpo.model, grpo.ids, grpo.draws(repetition), grpo.task.sampling)
        return grpo.tokens(rollout.completions, grpo.ids)

    return Workload(name, grpo.samples, run_naive, run_fast)


def _grpo_update(inputs: Inputs, name: str) -> Workload:
    """Scores under policy and reference, loss and gradient, of samples drawn beforehand."""
    grpo = _Grpo(inputs, name)
    with torch.no_grad():
        rollout, _ = sample(grpo.model, grpo.ids, grpo.draws(0), grpo.task.sampling)
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(len(rollout.completions), generator=generator)
    apart, tokens = samples_of(rollout), grpo.tokens(rollout.completions, grpo.ids)

    def run_naive(repetition: int) -> int:
        grpo.naive_update(apart, advantages[rollout.sample_completion.flatten()])
        return tokens

    def run_fast(repetition: int) -> int:
        grpo.model.zero_grad()
        batch = GroupBatch(rollout, advantages, metrics={}, trajectory=None)
        grpo.task.loss(batch).loss.backward()
        return tokens

    return Workload(name, grpo.samples, run_naive, run_fast)


def _grpo_step(inputs: Inputs, name: str) -> Workload:
    """A whole step: rollout, rewards, both scores, loss and gradient."""
    grpo = _Grpo(inputs, name)

    def run_fast(repetition: int) -> int:
        grpo.model.zero_grad()
        accumulate_gradients(grpo.model, grpo.task, repetition)
        rollouts = [batch.rollout for batch in grpo.task.micro_batches(repetition)]
        return sum(grpo.tokens(r.completions, r.prompts) for r in rollouts)

    return Workload(name, grpo.samples, grpo.naive_step, run_fast)


WORKLOADS: dict[str, Callable[[Inputs, str], Workload]] = {
    "latent_sft": _latent_sft,
    "cot_sft": _cot_sft,
    "evaluation_adaptive": _evaluation_adaptive,
    "evaluation_forced": _evaluation_forced,
    "grpo_rollout": _grpo_rollout,
    "grpo_update": _grpo_update,
    "grpo_step": _grpo_step,
}
