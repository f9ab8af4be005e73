"""LatentSeek: the hidden states of the first part of an answer, optimised at test time.

(arXiv 2505.13308; docs/rivals.md.) No weight changes. The last hidden states that chose the first
tokens of a greedy answer are free parameters. A step follows the gradient of the log-probability of
the tokens that they choose, times a reward of the answer; the tokens that they choose then are read
as ordinary tokens, and the rest of the answer is decoded greedily after them.

B rows, which do not depend on each other, of at most U optimised states; d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.model.reasoner import LatentReasoner

SEEK_SETTINGS = "seek.json"
LONGEST = 300
"""Most states of an answer that are optimised."""
SPARED = 1e-8, 1e-10
"""Added to a probability, and to it again in the logarithm."""

Write = Callable[[list[list[int]]], list[list[int]]]
"""Greedy continuations of texts."""
Reward = Callable[[list[int], list[list[int]]], Tensor]
"""Rewards (R,) of the answers of some of the rows, whose places come first."""


@dataclass(frozen=True)
class SeekSettings:
    """How a model seeks, and what for.

    The first `share` of an answer's tokens is optimised by `steps` of Adam at most, until the
    reward is above `threshold`. `confidence`: mean log-probability of the answer. `verifier`: minus
    the share of `samples` chains, drawn at `temperature` from `seed`, that come to another answer.
    `oracle`: 0 for the right answer and -1 for another; it knows the label, and is an upper bound
    that nobody can reach.
    """

    reward: Literal["confidence", "verifier", "oracle"] = "confidence"
    share: float = 0.1
    learning_rate: float = 0.03
    steps: int = 10
    threshold: float = -0.2
    max_grad_norm: float | None = None
    samples: int = 8
    temperature: float = 1.0
    seed: int = 0


class SeekingReasoner(LatentReasoner):
    """A plain language model whose answers the evaluation improves by `Search`."""

    def __init__(self, base: PreTrainedModel, settings: SeekSettings) -> None:
        super().__init__(base, None)
        self.seek_settings = settings


class Search:
    """Answers of B prompts being improved; the rows that are `open` are not done.

    `answers` are the latest ones, EOS included; `history` their rewards so far. `hidden` (B, U, d)
    are the optimised states, of which the first `counts` (B,) are in use; `gradients` (B, U, d) and
    `losses` (B,) are those of the last step.
    """

    def __init__(
        self,
        model: LatentReasoner,
        prompts: Sequence[list[int]],
        answers: Sequence[list[int]],
        settings: SeekSettings,
        write: Write,
        reward: Reward,
    ) -> None:
        """Start from given answers, which are judged first."""
        self.model, self.prompts, self.settings = model, prompts, settings
        self._write, self._reward = write, reward
        self.answers = [list(answer) for answer in answers]
        self.counts = [min(math.floor(settings.share * len(a)), LONGEST) for a in answers]
        states = answer_states(model, prompts, answers)
        width = max(self.counts, default=0)
        size = model.base.config.hidden_size
        self.hidden = states[0].new_zeros(len(prompts), width, size)
        for row, (own, count) in enumerate(zip(states, self.counts, strict=True)):
            self.hidden[row, :count] = own[:count]
        self.hidden.requires_grad_()
        counts = torch.tensor(self.counts, device=model.device)[:, None]
        self.used = torch.arange(width, device=model.device) < counts
        self.optimizer = torch.optim.Adam([self.hidden], lr=settings.learning_rate)
        everything = list(range(len(prompts)))
        self.history = [[value] for value in reward(everything, self.answers).tolist()]
        self.open = self._not_done(everything)

    def step(self) -> None:
        """One update of the open rows' states, and their new answers with their rewards."""
        rows = self.open
        rewards = self.hidden.new_zeros(len(self.prompts))
        rewards[rows] = rewards.new_tensor([self.history[row][-1] for row in rows])
        with torch.enable_grad():
            probabilities = self._logits().softmax(-1) + SPARED[0]
            chosen = torch.log(probabilities.amax(-1) + SPARED[1]) * self.used
            losses = -rewards * chosen.sum(-1)
            (self.hidden.grad,) = torch.autograd.grad(losses.sum(), self.hidden)
        self.losses, self.gradients = losses.detach(), self._clipped(self.hidden.grad)
        self.hidden.grad = self.gradients
        self.optimizer.step()
        with torch.no_grad():
            tokens = self._logits().argmax(-1).tolist()
        begun = [tokens[row][: self.counts[row]] for row in rows]
        texts = [[*self.prompts[row], *first] for row, first in zip(rows, begun, strict=True)]
        for row, first, rest in zip(rows, begun, self._write(texts), strict=True):
            self.answers[row] = [*first, *rest]
        new = self._reward(rows, [self.answers[row] for row in rows]).tolist()
        for row, value in zip(rows, new, strict=True):
            self.history[row].append(value)
        self.open = self._not_done(rows)

    def run(self) -> list[list[int]]:
        """Step until no row is open; returns the latest answers, of which one before may have
        earned more."""
        while self.open:
            self.step()
        return self.answers

    def _logits(self) -> Tensor:
        return self.model.logits(self.hidden).float()

    def _clipped(self, gradients: Tensor) -> Tensor:
        """Gradients (B, U, d) of which no row's norm is above the bound."""
        if self.settings.max_grad_norm is None:
            return gradients
        norms = gradients.flatten(1).norm(dim=1)[:, None, None]
        return gradients * (self.settings.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)

    def _not_done(self, rows: list[int]) -> list[int]:
        settings = self.settings
        return [
            row
            for row in rows
            if self.counts[row]
            and self.history[row][-1] <= settings.threshold
            and len(self.history[row]) <= settings.steps
        ]


@torch.no_grad()
def answer_states(
    model: LatentReasoner, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[Tensor]:
    """The states (N, d) that choose the N tokens of each answer, by one pass over all rows."""
    texts = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    hidden = model(*(part.to(model.device) for part in pad_prompts(texts, 0))).last_hidden
    return [own[-len(answer) :] for own, answer in zip(hidden, answers, strict=True)]
