"""LatentSeek in evaluation: greedy answers improved by `model/latentseek.py`, and its rewards.

The published rewards are the model's own verdicts on four questions about its answer. A small model
cannot judge itself in words, so `verifier` is a stand-in of the same form: each verifier is a chain
that the model draws at random, and approves of an answer that is its own. `confidence` needs one
pass; `oracle` reads the label.

B rows, K verifiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import NumberRule
from latent_reasoning.data.answers import answers_match, find_number, judge, split_completion
from latent_reasoning.data.context import decode
from latent_reasoning.data.rows import Row
from latent_reasoning.model.generation import Generation, generate
from latent_reasoning.model.heads import Targets, target_log_probabilities
from latent_reasoning.model.latentseek import Search, SeekingReasoner, answer_states
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.sampling import sample_texts
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.device import to_device


@dataclass(frozen=True)
class Seeking:
    """How the answers of some rows are sought: `prompts` are theirs, an answer has at most
    `max_new_tokens`, and `rule` says how numbers are read."""

    model: SeekingReasoner
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Row]
    prompts: Sequence[list[int]]
    max_new_tokens: int
    batch_size: int
    rule: NumberRule

    def improved(self, greedy: Sequence[Generation]) -> list[Generation]:
        """The answers that the search ends with, from the `greedy` ones of all rows.

        Whether gradients are enabled is no matter; mode (eval) and autocast are the caller's.
        """
        found: list[Generation] = []
        for first in range(0, len(self.rows), self.batch_size):
            part = slice(first, first + self.batch_size)
            search = Search(
                self.model,
                self.prompts[part],
                [generation.ids for generation in greedy[part]],
                self.model.seek_settings,
                self._write,
                _Rewards.of(self, first, len(self.rows[part])),
            )
            found += map(self._generation, search.run(), search.history)
        return found

    def _write(self, texts: list[list[int]]) -> list[list[int]]:
        written = generate(
            self.model,
            texts,
            max_new_tokens=self.max_new_tokens,
            eos_id=self.tokenizer.eos_token_id,
            batch_size=self.batch_size,
        )
        return [generation.ids for generation in written]

    def _generation(self, answer: list[int], history: list[float]) -> Generation:
        ids, settings = self.ended(answer), self.model.seek_settings
        searched = len(history) - 1 + (settings.samples if settings.reward == "verifier" else 0)
        cut_off = ids[-1:] != [self.tokenizer.eos_token_id]
        return Generation(ids, [], 0, cut_off, searched)

    def ended(self, answer: Sequence[int]) -> list[int]:
        """An answer to its first EOS: the search may put one among the tokens that it chooses."""
        answer, eos_id = list(answer[: self.max_new_tokens]), self.tokenizer.eos_token_id
        return answer[: answer.index(eos_id) + 1] if eos_id in answer else answer

    def text(self, answer: Sequence[int]) -> str:
        """The text of an answer, without EOS."""
        eos_id = self.tokenizer.eos_token_id
        return decode(self.tokenizer, [token for token in self.ended(answer) if token != eos_id])

    def number(self, answer: Sequence[int]) -> str | None:
        """The number that an answer comes to, None without one."""
        parts = split_completion(self.text(answer))
        return None if parts is None else find_number(parts[1], self.rule)


@dataclass(frozen=True)
class _Rewards:
    """The rewards of a batch of rows, the first of which is `first` of all; `verdicts` are the
    numbers that each row's verifiers come to."""

    seeking: Seeking
    first: int
    verdicts: list[list[str | None]]

    @classmethod
    def of(cls, seeking: Seeking, first: int, count: int) -> _Rewards:
        verdicts = []
        if seeking.model.seek_settings.reward == "verifier":
            verdicts = _verifiers(seeking, first, count)
        return cls(seeking, first, verdicts)

    def __call__(self, rows: list[int], answers: list[list[int]]) -> Tensor:
        """Rewards (R,) of answers to some of the batch's rows."""
        seeking = self.seeking
        kind = seeking.model.seek_settings.reward
        if kind == "confidence":
            prompts = [seeking.prompts[self.first + row] for row in rows]
            return confidence(seeking.model, prompts, list(map(seeking.ended, answers)))
        if kind == "verifier":
            return torch.stack(
                [self._approved(row, own) for row, own in zip(rows, answers, strict=True)]
            )
        labels = [seeking.rows[self.first + row].answer for row in rows]
        right = [
            judge(label, seeking.text(own), "text", seeking.rule).correct
            for label, own in zip(labels, answers, strict=True)
        ]
        return torch.tensor(right).float() - 1

    def _approved(self, row: int, answer: list[int]) -> Tensor:
        number, rule = self.seeking.number(answer), self.seeking.rule
        approved = [
            None not in (own, number) and answers_match(own, number, rule)
            for own in self.verdicts[row]
        ]
        return verifiers_reward(torch.tensor(approved))


def verifiers_reward(
    approved: Tensor, weights: Tensor | None = None, total: float | None = None
) -> Tensor:
    """Minus the weight of the verifiers (.., K) that do not approve, over the `total` (None: that
    of all, so that the reward is in [-1, 0])."""
    weights = torch.ones(approved.shape[-1]) if weights is None else weights
    return -(weights * ~approved).sum(-1) / (weights.sum() if total is None else total)


@torch.no_grad()
def confidence(
    model: SeekingReasoner, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> Tensor:
    """Mean log-probability (R,) of an answer's tokens."""
    hidden = torch.cat(answer_states(model, prompts, answers))
    tokens = torch.tensor([token for answer in answers for token in answer])
    targets = Targets.of(tokens, torch.full_like(tokens, int(Kind.TEXT)), None)
    values = target_log_probabilities(model, hidden, to_device(targets, model.device))
    return torch.stack([own.mean() for own in values.split([len(a) for a in answers])])


def _verifiers(seeking: Seeking, first: int, count: int) -> list[list[str | None]]:
    """The numbers that K sampled chains come to, for each of `count` rows."""
    model, settings = seeking.model, seeking.model.seek_settings
    draws = [
        torch.rand(
            settings.samples,
            seeking.max_new_tokens,
            generator=torch.Generator().manual_seed(
                seeds.seed_for(settings.seed, seeds.VERIFIERS.format(row=row.id))
            ),
        )
        for row in seeking.rows[first : first + count]
    ]

    def choices(hidden: Tensor) -> Tensor:
        return (model.logits(hidden).double() / settings.temperature).softmax(-1)

    sampled = sample_texts(
        model,
        seeking.prompts[first : first + count],
        torch.stack(draws),
        seeking.tokenizer.eos_token_id,
        choices,
        model.read_tokens,
    )
    return [[seeking.number(ids) for ids in group] for group in sampled.ids.tolist()]
