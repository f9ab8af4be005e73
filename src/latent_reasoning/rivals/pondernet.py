"""PonderNet's halting on a trained latent model (arXiv 2107.05407; docs/rivals.md).

The stop head defines a distribution over the number of latent steps. The loss is the expected loss
of the answer under it, plus its divergence from a geometric prior, which says how long to think.
Nothing is sampled: the answer is scored after every number of steps, on one trajectory a prompt.

P prompts, N the bound on latent steps, T tokens of a completion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, RivalPolicyModel, Runtime
from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.sequences import ANSWER_WORDS, COLON
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.build import begin_policy
from latent_reasoning.rl.prompts import RlPrompt
from latent_reasoning.rl.rollouts import Completion, SamplingSettings
from latent_reasoning.rl.scoring import loss_mask, score_completions
from latent_reasoning.runtime.device import to_device
from latent_reasoning.runtime.parallel import ALONE, OneProcess
from latent_reasoning.training.batches import BatchPlan
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.task import LossOutput, Planned


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


@dataclass
class PonderTask:
    """Learn when to stop from the expected loss of the answer, as a task of the training loop.

    `answers` are the prompts' right answers as tokens, what announces them and EOS included.
    """

    name: str
    model: LatentReasoner
    prompts: Sequence[RlPrompt]
    answers: Sequence[tuple[int, ...]]
    entry: RivalPolicyModel
    runtime: Runtime
    seed: int
    validate: Callable[[], dict[str, float]]
    processes: OneProcess = ALONE

    def __post_init__(self) -> None:
        self.iterations = 1
        self.steps: int = self.entry.max_latent_steps
        self.model.change_settings(max_latent_steps=self.steps)
        self.prior = geometric_prior(self.entry.ponder.rate, self.steps).to(self.model.device)
        self.plan = BatchPlan(
            [len(prompt.ids) for prompt in self.prompts],
            self.entry.training,
            self.runtime,
            self.seed,
            self.name,
            processes=self.processes,
        )

    def micro_batches(self, step: int) -> list[list[int]]:
        """Positions of the prompts of each of this process's micro-batches."""
        return self.processes.share(self.plan.micro_batches(step))

    def prepare(self, step: int) -> None:
        """Nothing: there is little to prepare."""

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

    def planned(self, micro_batch: list[int]) -> Planned | None:
        """None: it is not captured."""
        return None

    def program(self, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Nothing is planned for it."""
        raise NotImplementedError


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
    prompts = begin_policy(run, model, tokenizer)
    words, colon = read_pieces(tokenizer, [ANSWER_WORDS, COLON])
    labels = read_pieces(tokenizer, [f" {prompt.label}" for prompt in prompts])
    task = PonderTask(
        run.name,
        model,
        prompts,
        [(*words, *colon, *label, tokenizer.eos_token_id) for label in labels],
        entry,
        run.experiment.runtime,
        seed=run.seed,
        validate=run.validation(model, tokenizer, longest_completion=entry.max_new_tokens),
        processes=run.processes,
    )
    return model, tokenizer, task
