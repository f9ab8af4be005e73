"""HRPO as a task of the training loop: what is particular is in `hrpo.py`.

A step samples a group of gated chains of thought for each of its prompts, rewards a right answer
with 1 and all else with 0, and takes the gradient of the GRPO loss at these samples, once. The
reference is the model at its start, which reads tokens as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, Reward, RivalPolicyModel, Runtime
from latent_reasoning.data.answers import answers_match, split_completion
from latent_reasoning.data.context import decode
from latent_reasoning.evaluation.metrics import reasoning_length
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.frozen import hold_frozen
from latent_reasoning.model.gated import GatedReasoner, GateSettings, ThinkingGate
from latent_reasoning.model.lora import adapter_disabled
from latent_reasoning.model.marker import answer_marker_table
from latent_reasoning.rivals.hrpo import Read, Sampled, completion_mask, is_rewarded, sample, score
from latent_reasoning.rl.build import begin_policy
from latent_reasoning.rl.grpo import mean_over, policy_loss
from latent_reasoning.rl.prompts import RlPrompt
from latent_reasoning.rl.reward import Outcome, reward_groups
from latent_reasoning.rl.rollouts import Rollout, draw_uniforms
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.device import held_precision, to_device
from latent_reasoning.runtime.memory import memory_shortage
from latent_reasoning.runtime.parallel import ALONE, OneProcess
from latent_reasoning.training.batches import BatchPlan
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.task import LossOutput, Planned

RIGHT_OR_NOT = Reward(penalty=0.0, bonus=None)
"""1 for a right answer, 0 for another, whatever the length."""


@dataclass(frozen=True)
class GatedBatch:
    """The judged samples of a micro-batch: U distinct completions of at most T tokens, what was
    read of them, `advantages` (U,), and `reference` (U, T), None without a KL term. `metrics` are
    the means of the whole step."""

    rollout: Rollout
    read: Read
    advantages: Tensor
    reference: Tensor | None
    metrics: dict[str, float]


@dataclass
class GatedPolicyTask:
    """Learn from right answers to chains of thought that read themselves through a gate.

    `model` must be in its initial state, with the adapter attached: that, without its gate, is the
    reference policy.
    """

    name: str
    model: GatedReasoner
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[RlPrompt]
    entry: RivalPolicyModel
    runtime: Runtime
    seed: int
    validate: Callable[[], dict[str, float]]
    processes: OneProcess = ALONE

    def __post_init__(self) -> None:
        self.iterations = 1
        gate = self.entry.gate
        rates = {
            "gate.recurrence.": gate.learning_rate,
            "gate.input.": gate.learning_rate,
            "gate.decay": gate.decay_learning_rate,
        }
        self.learning_rates = {name: rate for name, rate in rates.items() if rate is not None}
        self.plan = BatchPlan(
            [len(prompt.ids) for prompt in self.prompts],
            self.entry.training,
            self.runtime,
            self.seed,
            self.name,
            processes=self.processes,
        )
        self.start_model: GatedReasoner | None = None
        if self.entry.kl_weight and self.model.adapter is None:
            self.start_model = copy.deepcopy(self.model).requires_grad_(False).eval()
            hold_frozen(self.start_model, held_precision(self.runtime.precision, self.model.device))

    def micro_batches(self, step: int) -> list[GatedBatch]:
        """Sample and judge this process's share of a step's groups; reward those of all."""
        plan = self.plan.micro_batches(step)
        draws = self._draws(step).split([len(part) for part in plan])
        parts = [[self.prompts[index] for index in part] for part in self.processes.share(plan)]
        with memory_shortage(self.processes), torch.no_grad():
            sampled = [
                sample(self.model, [p.ids for p in part], own, self.tokenizer.eos_token_id)
                for part, own in zip(parts, self.processes.share(draws), strict=True)
            ]
            references = [self._reference(each.rollout) for each in sampled]
        texts = [self._texts(each.rollout) for each in sampled]
        outcomes = [
            self._judge(each.rollout, own, part)
            for each, own, part in zip(sampled, texts, parts, strict=True)
        ]
        advantages, metrics = reward_groups(
            self.processes.gather([each.rollout for each in sampled]),
            self.processes.gather(outcomes),
            [self.prompts[index].text for part in plan for index in part],
            RIGHT_OR_NOT,
        )
        metrics |= self._further_metrics(sampled, texts)
        return [
            GatedBatch(each.rollout, each.read, own, reference, metrics)
            for each, own, reference in zip(
                sampled, self.processes.share(advantages), references, strict=True
            )
        ]

    def prepare(self, step: int) -> None:
        """Nothing: samples depend on the weights."""

    def loss(self, micro_batch: GatedBatch) -> LossOutput:
        """The GRPO loss of one micro-batch, weighted by its own denominator."""
        rollout, entry = micro_batch.rollout, self.entry
        mask, weights = completion_mask(rollout.completions), rollout.weights
        denominator = mean_over(mask, weights, entry.loss, entry.max_new_tokens)
        advantages, mask, weights = to_device(
            (micro_batch.advantages, mask, weights), self.model.device
        )
        result = policy_loss(
            score(self.model, rollout.prompts, rollout.completions, micro_batch.read),
            advantages,
            mask,
            kind=entry.loss,
            epsilon=entry.epsilon,
            kl_weight=entry.kl_weight,
            max_completion_length=entry.max_new_tokens,
            weights=weights,
            reference=micro_batch.reference,
            denominator=denominator,
        )
        return LossOutput(result.loss, denominator, {"kl": result.kl} | micro_batch.metrics)

    def planned(self, micro_batch: GatedBatch) -> Planned | None:
        """None: a gated chain is not captured."""
        return None

    def program(self, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Nothing is planned for it."""
        raise NotImplementedError

    def _draws(self, step: int) -> Tensor:
        """The uniform random numbers of all prompts of a step, in the plan's order."""
        purpose = seeds.ROLLOUTS.format(model=self.name, round=step)
        seed = seeds.seed_for(self.seed, purpose, self.plan.rollbacks)
        entry = self.entry
        return draw_uniforms(
            entry.training.batch_size, entry.group_size, entry.max_new_tokens, seed
        )

    def _reference(self, rollout: Rollout) -> Tensor | None:
        """Log-probabilities (U, T) under the initial model without its gate."""
        if not self.entry.kl_weight:
            return None
        compute = partial(
            score, prompts=rollout.prompts, completions=rollout.completions, read=None
        )
        if self.start_model is not None:
            return compute(self.start_model)
        with adapter_disabled(self.model):
            return compute(self.model)

    def _texts(self, rollout: Rollout) -> list[str]:
        """The text of each distinct completion, without EOS."""
        eos_id = self.tokenizer.eos_token_id
        return [
            decode(self.tokenizer, [token for token in completion.ids if token != eos_id])
            for completion in rollout.completions
        ]

    def _judge(
        self, rollout: Rollout, texts: Sequence[str], prompts: Sequence[RlPrompt]
    ) -> list[Outcome]:
        """The outcome of each distinct completion; a bad format earns as much as a wrong answer."""
        outcomes = []
        for completion, text in zip(rollout.completions, texts, strict=True):
            prompt = prompts[completion.prompt]
            matches = partial(answers_match, rule=prompt.number_rule)
            length, _ = reasoning_length(text, self.tokenizer, latent=False, forced_steps=None)
            outcomes.append(Outcome(True, is_rewarded(text, prompt.label, matches), length))
        return outcomes

    def _further_metrics(
        self, sampled: Sequence[Sampled], texts: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        """The share of samples without an answer, and the mean share of a token's embedding kept:
        means over all processes."""
        without = [
            (count, count * (split_completion(text) is None), each.kept)
            for each, own in zip(sampled, texts, strict=True)
            for count, text in zip(each.rollout.weights.tolist(), own, strict=True)
        ]
        counts, bad, kept = zip(*self.processes.gather(without), strict=True)
        total = sum(counts)
        mean = sum(count * share for count, share in zip(counts, kept, strict=True)) / total
        return {"badly_formatted_share": sum(bad) / total, "kept_share": mean}


# ------------------------------------------------------------------------------------------ build


def build(run: TrainingRun) -> tuple[GatedReasoner, PreTrainedTokenizerBase, GatedPolicyTask]:
    """The model that HRPO starts from, its gate new, its tokenizer and the task.

    Raises `ConfigError` where it cannot start from its parent, or a setting has no meaning here.
    """
    entry: RivalPolicyModel = run.entry
    _check_settings(run.name, entry)
    parent = run.parents[entry.start]
    plain, tokenizer = load(parent, "cpu"), load_tokenizer(parent)
    if plain.settings is not None or isinstance(plain, GatedReasoner):
        raise ConfigError(
            f"models.{run.name}.from: {entry.start} is no plain language model; HRPO starts from "
            "one, such as token SFT of form cot"
        )
    model = with_new_gate(plain.base, tokenizer, entry).to(run.device)
    prompts = begin_policy(run, model, tokenizer)
    task = GatedPolicyTask(
        run.name,
        model,
        tokenizer,
        prompts,
        entry,
        run.experiment.runtime,
        seed=run.seed,
        validate=run.validation(model, tokenizer, longest_completion=entry.max_new_tokens),
        processes=run.processes,
    )
    return model, tokenizer, task


def with_new_gate(
    base: Any, tokenizer: PreTrainedTokenizerBase, entry: RivalPolicyModel
) -> GatedReasoner:
    """A gated model around a plain one, its gate drawn from torch's generator."""
    rows, hidden_size = base.get_input_embeddings().weight.shape
    gate = ThinkingGate(hidden_size)
    gate.begin(*entry.gate.keep, std=getattr(base.config, "initializer_range", 0.02))
    settings = GateSettings(entry.temperature, entry.gate.top_k)
    return GatedReasoner(base, settings, gate, answer_marker_table(tokenizer, rows))


def _check_settings(name: str, entry: RivalPolicyModel) -> None:
    fixed = {"reward": Reward(), "iterations": 1, "max_latent_steps": None}
    for key, value in fixed.items():
        if getattr(entry, key) != value:
            raise ConfigError(
                f"models.{name}.{key}: has no meaning for HRPO, whose reward is 1 or 0 and which "
                "updates once on its samples; leave it out"
            )
