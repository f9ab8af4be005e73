"""HRPO as a task of the training loop: what is particular is in `hrpo.py`.

A step samples a group of gated chains of thought for each of its prompts, rewards a right answer
with 1 and all else with 0, and takes the gradient of the GRPO loss at these samples, once. The
reference is the model at its start, which reads tokens as they are.

U distinct completions of at most T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, Reward, RivalPolicyModel
from latent_reasoning.data.answers import answers_match, split_completion
from latent_reasoning.data.context import decode
from latent_reasoning.evaluation.metrics import reasoning_length
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.frozen import hold_frozen
from latent_reasoning.model.gated import GatedReasoner, GateSettings, ThinkingGate
from latent_reasoning.model.lora import adapter_disabled
from latent_reasoning.model.marker import answer_marker_table
from latent_reasoning.rivals.hrpo import Read, completion_mask, is_rewarded, sample, score
from latent_reasoning.rivals.policy_task import PolicyTask, check_fixed
from latent_reasoning.rl.build import policy_task
from latent_reasoning.rl.grpo import mean_over, policy_loss
from latent_reasoning.rl.prompts import RlPrompt
from latent_reasoning.rl.reward import Outcome, reward_groups
from latent_reasoning.rl.rollouts import Rollout
from latent_reasoning.runtime.device import held_precision, to_device
from latent_reasoning.runtime.memory import memory_shortage
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.task import LossOutput

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


class GatedPolicyTask(PolicyTask[GatedBatch]):
    """Learn from right answers to chains of thought that read themselves through a gate.

    `model` must be in its initial state, with the adapter attached: that, without its gate, is the
    reference policy.
    """

    model: GatedReasoner

    def __post_init__(self) -> None:
        super().__post_init__()
        gate = self.entry.gate
        rates = {
            "gate.recurrence.": gate.learning_rate,
            "gate.input.": gate.learning_rate,
            "gate.decay": gate.decay_learning_rate,
        }
        self.learning_rates = {name: rate for name, rate in rates.items() if rate is not None}
        self.start_model: GatedReasoner | None = None
        if self.entry.kl_weight and self.model.adapter is None:
            self.start_model = copy.deepcopy(self.model).requires_grad_(False).eval()
            hold_frozen(self.start_model, held_precision(self.runtime.precision, self.model.device))

    def _sample(self, round_: int) -> list[GatedBatch]:
        """Sample and judge this process's share of a step's groups; reward those of all."""
        asked, eos_id = self._asked(round_, self.entry.max_new_tokens), self.tokenizer.eos_token_id
        with memory_shortage(self.processes), torch.no_grad():
            sampled = [
                sample(self.model, [prompt.ids for prompt in prompts], uniforms, eos_id)
                for prompts, uniforms, _ in asked
            ]
            references = [self._reference(each.rollout) for each in sampled]
        judged = [
            (each.rollout, *self._judge(each.rollout, prompts), each.kept)
            for each, (prompts, *_) in zip(sampled, asked, strict=True)
        ]
        rollouts, outcomes, bad, kept = zip(*self.processes.gather(judged), strict=True)
        plan = self.plan.micro_batches(round_)
        questions = [self.prompts[index].text for part in plan for index in part]
        advantages, metrics = reward_groups(rollouts, outcomes, questions, RIGHT_OR_NOT)
        counts = [rollout.sample_completion.numel() for rollout in rollouts]
        metrics["badly_formatted_share"] = sum(bad) / sum(counts)
        # Of a token's embedding.
        shares = sum(count * share for count, share in zip(counts, kept, strict=True))
        metrics["kept_share"] = shares / sum(counts)
        return [
            GatedBatch(each.rollout, each.read, own, reference, metrics)
            for each, own, reference in zip(
                sampled, self.processes.share(advantages), references, strict=True
            )
        ]

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

    def _judge(self, rollout: Rollout, prompts: Sequence[RlPrompt]) -> tuple[list[Outcome], int]:
        """The outcome of each distinct completion, and how many samples have no answer: these earn
        as much as wrong ones."""
        outcomes, bad, eos_id = [], 0, self.tokenizer.eos_token_id
        for completion in rollout.completions:
            text = decode(self.tokenizer, [token for token in completion.ids if token != eos_id])
            prompt = prompts[completion.prompt]
            matches = partial(answers_match, rule=prompt.number_rule)
            length, _ = reasoning_length(text, self.tokenizer, latent=False, forced_steps=None)
            outcomes.append(Outcome(True, is_rewarded(text, prompt.label, matches), length))
            bad += completion.count * (split_completion(text) is None)
        return outcomes, bad


def build(run: TrainingRun) -> tuple[GatedReasoner, PreTrainedTokenizerBase, GatedPolicyTask]:
    """The model that HRPO starts from, its gate new, its tokenizer and the task.

    Raises `ConfigError` where it cannot start from its parent, or a setting has no meaning here.
    """
    entry: RivalPolicyModel = run.entry
    check_fixed(run.name, entry, "rewards a right answer by 1 and others by 0", reward=Reward())
    check_fixed(run.name, entry, "updates once on its samples", iterations=1)
    check_fixed(run.name, entry, "takes no latent steps", max_latent_steps=None)
    parent = run.parents[entry.start]
    plain, tokenizer = load(parent, "cpu"), load_tokenizer(parent)
    if plain.settings is not None or isinstance(plain, GatedReasoner):
        raise ConfigError(
            f"models.{run.name}.from: {entry.start} is no plain language model; HRPO starts from "
            "one, such as token SFT of form cot"
        )
    model = with_new_gate(plain.base, tokenizer, entry).to(run.device)
    return model, tokenizer, policy_task(run, GatedPolicyTask, model, tokenizer)


def with_new_gate(
    base: Any, tokenizer: PreTrainedTokenizerBase, entry: RivalPolicyModel
) -> GatedReasoner:
    """A gated model around a plain one, its gate drawn from torch's generator."""
    rows, hidden_size = base.get_input_embeddings().weight.shape
    gate = ThinkingGate(hidden_size)
    gate.begin(*entry.gate.keep, std=getattr(base.config, "initializer_range", 0.02))
    settings = GateSettings(entry.temperature, entry.gate.top_k)
    return GatedReasoner(base, settings, gate, answer_marker_table(tokenizer, rows))
