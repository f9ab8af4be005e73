"""Soft Thinking: a language model that reads mixtures of words while it thinks, without training.

Zhang et al., arXiv 2505.15778 (docs/rivals.md). As long as a row thinks, its next token is the
likeliest one, but what it reads is the mixture of the likeliest words. Thinking ends where its
tokens are the end of thinking (` The answer is:`), which is read as it is, or where it has been
sure of its next token for long: the end of thinking is then written for it. Departures from the
public code: rows that answer are greedy, and being sure while answering does not end a row.

R rows, T columns, d hidden size, V vocabulary, k words in a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from latent_reasoning.model.bases import scaled_rows
from latent_reasoning.model.mixtures import Mixture, entropy, truncated
from latent_reasoning.model.reasoner import LatentReasoner

SOFT_THINKING = "soft_thinking.json"
"""The settings' file in a model folder."""


@dataclass(frozen=True)
class SoftThinking:
    """How a model thinks softly, as its folder says.

    Logits are divided by `temperature`; the distribution is cut by `top_k`, `top_p` and `min_p`
    (`mixtures.truncated`), and a mixture holds its `size` likeliest words. The row is sure of a
    token where the entropy of the uncut distribution, in nats, is below `sure_below` (0: never);
    after `patience` such tokens in a row it stops to think. `end` are the ids that end thinking.
    """

    end: tuple[int, ...]
    temperature: float = 0.6
    size: int = 10
    top_k: int | None = 30
    top_p: float = 0.95
    min_p: float = 0.001
    sure_below: float = 0.01
    patience: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", tuple(self.end))  # a list, as read from a folder


class SoftThinker(LatentReasoner):
    """A plain language model that thinks softly."""

    def __init__(self, base: PreTrainedModel, how: SoftThinking) -> None:
        super().__init__(base, None)
        self.how = how


@dataclass(frozen=True)
class SoftStep:
    """What was chosen after R states: `token` (R,) is written, `mixture` (R, k) is read, which is
    the token alone where the row does not think. `entropy` (R,) is in nats; `thinking` (R,) says
    which rows were thinking when they chose."""

    token: Tensor
    mixture: Mixture
    entropy: Tensor
    thinking: Tensor


@dataclass(frozen=True)
class SoftRows:
    """R rows: which are `thinking`, for how many tokens they have been `sure`, the last tokens
    (R, m), -1 before the first, and how many tokens of the end of thinking are `written` for them
    (-1: none will be)."""

    how: SoftThinking
    thinking: Tensor
    sure: Tensor
    last: Tensor
    written: Tensor

    @classmethod
    def begin(cls, how: SoftThinking, input_ids: Tensor, attention_mask: Tensor) -> SoftRows:
        """Rows after prompts `(R, T)`, padded on the left: they think, unless the prompt ends with
        the end of thinking."""
        width = len(how.end)
        ids = torch.where(attention_mask.bool(), input_ids, -1)
        last = functional.pad(ids, (width, 0), value=-1)[:, -width:]
        zeros = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        return cls(how, ~_ends(last, how.end), zeros, last, zeros - 1)

    def select(self, rows: Tensor) -> SoftRows:
        """Some of the rows (R',)."""
        parts = (self.thinking, self.sure, self.last, self.written)
        return SoftRows(self.how, *(part[rows] for part in parts))

    def answer(self, probabilities: Tensor) -> Tensor:
        """The next tokens (R,) of rows that answer, from distributions (R, V)."""
        return probabilities.argmax(-1)

    def choose(self, model: LatentReasoner, hidden: Tensor) -> tuple[SoftStep, SoftRows]:
        """Choose the next tokens after states `(R, d)`; also returns the rows after them."""
        logits = model.logits(hidden).float() / self.how.temperature
        probabilities = logits.softmax(-1)
        uncertainty = entropy(probabilities)
        cut = truncated(probabilities, self.how.top_k, self.how.top_p, self.how.min_p)
        highest, ids = cut.topk(min(self.how.size, cut.shape[-1]), dim=-1)
        soft = Mixture(highest / highest.sum(-1, keepdim=True), ids)
        token = torch.where(self.thinking, ids[:, 0], self.answer(probabilities))
        sure = torch.where(self.thinking & (uncertainty < self.how.sure_below), self.sure + 1, 0)
        gives_up = sure >= self.how.patience
        begun = torch.where(gives_up, _matched(self.last, self.how.end), self.written)
        is_forced = begun >= 0
        end = torch.tensor(self.how.end, device=token.device)
        token = torch.where(is_forced, end[begun.clamp(min=0)], token)
        last = torch.cat([self.last, token[:, None]], 1)[:, 1:]
        ends = self.thinking & (gives_up | _ends(last, self.how.end))
        alone = ends | ~self.thinking
        certain = torch.zeros_like(soft.probabilities)
        certain[:, 0] = 1
        mixture = Mixture(
            torch.where(alone[:, None], certain, soft.probabilities),
            torch.where(alone[:, None], token[:, None], soft.ids),
        )
        written = torch.where(is_forced & (begun + 1 < len(end)), begun + 1, -1)
        rows = replace(
            self,
            thinking=self.thinking & ~ends,
            sure=torch.where(ends, 0, sure),
            last=last,
            written=written,
        )
        return SoftStep(token, mixture, uncertainty, self.thinking), rows


def read_mixture(model: LatentReasoner, mixture: Mixture) -> Tensor:
    """The input embeddings `(R, d)` of mixtures of words (R, k)."""
    return mixture.embed(scaled_rows(model.base, model.base.get_input_embeddings().weight))


def _ends(last: Tensor, end: Sequence[int]) -> Tensor:
    """Which rows' last tokens (R, m) are the end of thinking."""
    return (last == torch.tensor(end, device=last.device)).all(1)


def _matched(last: Tensor, end: Sequence[int]) -> Tensor:
    """How many tokens of the end of thinking each row (R, m) has written already, (R,)."""
    matched = torch.zeros(len(last), dtype=torch.long, device=last.device)
    for count in range(1, len(end)):
        begun = _ends(last[:, len(end) - count :], end[:count])
        matched = torch.where(begun, count, matched)
    return matched
