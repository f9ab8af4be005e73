"""PonderNet's halting on a trained latent model (arXiv 2107.05407; docs/rivals.md).

The stop head defines a distribution over the number of latent steps. The loss is the expected loss
of the answer under it, plus its divergence from a geometric prior, which says how long to think.
Nothing is sampled: the answer is scored after every number of steps, on one trajectory a prompt.

P prompts, N the bound on latent steps, T tokens of a completion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, Reward, RivalPolicyModel
from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.sequences import ANSWER_WORDS, COLON
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rivals.policy_task import PolicyTask, check_fixed
from latent_reasoning.rl.build import policy_task
from latent_reasoning.rl.rollouts import Completion, SamplingSettings
from latent_reasoning.rl.scoring import loss_mask, score_completions
from latent_reasoning.runtime.device import to_device
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.task import LossOutput


class Ponder(NamedTuple):
    """Means over prompts: `loss` with its graph, the expected loss of the answer, the divergence
    from the prior in nats, and the expected number of latent steps."""

    loss: Tensor
    answer_loss: Tensor
    divergence: Tensor
    expected_steps: Tensor


def geometric_prior(rate: float, steps: int) -> Tensor:
    """Log-probabilities (N + 1,) of 0 to N steps, each ending with probability `rate`: the
    distribution is cut at N and scaled to sum to one."""
    counts = torch.arange(steps + 1)
    return (math.log(rate) + counts * math.log1p(-rate)).log_softmax(0)


def ponder(log_stops: Tensor, losses: Tensor, prior: Tensor, weight: float) -> Ponder:
    """The loss from log-probabilities and answer losses (P, N + 1) of each number of steps.

    `prior` (N + 1,) are the prior's log-probabilities, `weight` is that of the divergence.
    """
    probabilities = log_stops.exp()
    expected = (probabilities * losses).sum(-1).mean()
    divergence = (probabilities * (log_stops - prior)).sum(-1).mean()
    counts = torch.arange(log_stops.shape[1], device=log_stops.device)
    steps = (probabilities.detach() * counts).sum(-1).mean()
    return Ponder(expected + weight * divergence, expected.detach(), divergence.detach(), steps)


class PonderTask(PolicyTask[list[int]]):
    """Learn when to stop from the expected loss of the answer.

    A micro-batch are the places of its prompts; `answers` are their right answers as tokens, what
    announces them and EOS included.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps: int = self.entry.max_latent_steps
        self.model.change_settings(max_latent_steps=self.steps)
        self.prior = geometric_prior(self.entry.ponder.rate, self.steps).to(self.model.device)
        words, colon = read_pieces(self.tokenizer, [ANSWER_WORDS, COLON])
        labels = read_pieces(self.tokenizer, [f" {prompt.label}" for prompt in self.prompts])
        eos_id = self.tokenizer.eos_token_id
        self.answers = [(*words, *colon, *label, eos_id) for label in labels]

    def _sample(self, round_: int) -> list[list[int]]:
        """The prompts of each of this process's micro-batches; nothing is drawn."""
        return self.processes.share(self.plan.micro_batches(round_))

    def loss(self, micro_batch: list[int]) -> LossOutput:
        """The loss of some prompts, weighted by their number."""
        log_stops, losses = self.scores(micro_batch)
        result = ponder(log_stops, losses, self.prior, self.entry.ponder.weight)
        metrics: dict[str, float | Tensor] = {
            "answer_loss": result.answer_loss,
            "kl": result.divergence,
            "reasoning_tokens": result.expected_steps + 2,
        }
        return LossOutput(result.loss, len(micro_batch), metrics)

    def scores(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and mean losses of the answer's tokens, both (P, N + 1), of each number
        of latent steps; a STOP that the bound forces is certain."""
        special, counts = self.model.settings, range(self.steps + 1)
        completions = [
            Completion(place, (*[special.continue_id] * n, special.stop_id, *self.answers[index]))
            for place, index in enumerate(chosen)
            for n in counts
        ]
        log_probs = score_completions(
            self.model,
            [self.prompts[index].ids for index in chosen],
            completions,
            SamplingSettings(temperature=1.0, max_new_tokens=self.entry.max_new_tokens, eos_id=-1),
        )
        decides = torch.arange(log_probs.shape[1]) <= torch.tensor(list(counts))[:, None]
        decides = decides.repeat(len(chosen), 1)
        counted = loss_mask(completions, special)
        decided, answered = to_device((decides & counted, counted & ~decides), log_probs.device)
        log_stops = torch.where(decided, log_probs, 0).sum(1)
        losses = -torch.where(answered, log_probs, 0).sum(1) / answered.sum(1)
        return log_stops.view(len(chosen), -1), losses.view(len(chosen), -1)


def build(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase, PonderTask]:
    """The latent model that it starts from, its tokenizer and the task.

    Raises `ConfigError` where the model takes no decision to stop, or without a bound on steps.
    """
    entry: RivalPolicyModel = run.entry
    parent = run.parents[entry.start]
    model, tokenizer = load(parent, run.device.type), load_tokenizer(parent)
    if model.settings is None or model.settings.stop_rule != "head":
        raise ConfigError(f"models.{run.name}.from: {entry.start} has no stop head to be trained")
    if entry.max_latent_steps is None:
        raise ConfigError(
            f"models.{run.name}.max_latent_steps: PonderNet scores every number of latent steps up "
            "to it; set it"
        )
    reason = "scores right answers, all numbers of steps at once"
    check_fixed(run.name, entry, reason, reward=Reward(), iterations=1)
    return model, tokenizer, policy_task(run, PonderTask, model, tokenizer)
