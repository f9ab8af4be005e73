"""The distributions that a latent reasoner's hidden states define: stop decisions, next tokens.

There is one stop distribution, from which decisions are sampled (rollouts), taken greedily
(generation) and scored (training and RL); and one log-probability of a next token, over the two
decisions or over the vocabulary, depending on the position.

M positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from latent_reasoning.model.frozen_head import frozen_head_log_probabilities, has_frozen_head
from latent_reasoning.model.passes import Kind, SpecialIds
from latent_reasoning.model.reading import padded
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.stop_rules import marker_logits, word_logits
from latent_reasoning.runtime.graphs import Sizes

CONTINUES, STOPS = 0, 1
"""Order of the two decisions in the stop head's logits."""

LOGITS_AT_ONCE = 2**26
"""256 MiB of logits in float32: 523 positions of Llama 3.2's vocabulary."""


def decision_logits(
    model: LatentReasoner,
    hidden: Tensor,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The stop distribution at states `(.., d)`: logits `(.., 2)` of CONTINUE and STOP.

    They are divided by the sampling temperature, in the precision of `dtype` at least.
    """
    logits = model.stop_logits(hidden)
    return logits.to(torch.promote_types(logits.dtype, dtype)) / temperature


def greedy_stops(model: LatentReasoner, hidden: Tensor, decisions: Tensor) -> Tensor:
    """Where a greedy model stops `(..)`, at states `(.., d)` with the stop distribution's logits
    `decisions` `(.., 2)`: where STOP is likelier, or by a marker that is the likeliest word."""
    if model.settings.stop_rule == "marker":
        decisions = marker_logits(model.vocabulary_logits(hidden), model.settings, greedy=True)
    return decisions[..., STOPS] > decisions[..., CONTINUES]


def word_log_probabilities(model: LatentReasoner, hidden: Tensor, words: Tensor) -> Tensor:
    """Log-probabilities `(K,)` of `words` (K,) at states `(K, d)` among all words that are neither
    special tokens nor a marker: given that a model continues."""
    logits = word_logits(model.vocabulary_logits(hidden), model.settings)
    return -_cross_entropy(logits.to(_at_least_float32(logits.dtype)), words)


@dataclass(frozen=True)
class Targets:
    """Next tokens `tokens` (M,) at positions of `kinds` (M,), sorted out on the host.

    `text` and `thinking` are the places among these M of next tokens and of stop decisions.
    """

    tokens: Tensor
    kinds: Tensor
    text: Tensor
    thinking: Tensor

    @classmethod
    def of(cls, tokens: Tensor, kinds: Tensor, special: SpecialIds | None) -> Targets:
        """The targets of a model with these special tokens; a plain one takes no decisions."""
        is_thinking = kinds == Kind.THINKING
        if special is None:
            is_thinking = torch.zeros_like(is_thinking)
        text, thinking = ((~is_thinking).nonzero()[:, 0], is_thinking.nonzero()[:, 0])
        return cls(tokens, kinds, text, thinking)

    def of_few_shapes(self, sizes: Sizes) -> tuple[Tensor, Tensor, Targets]:
        """The same in one of few sizes: next tokens first, then stop decisions.

        Also returns which of these M targets stands in each place of the new ones, and float32
        `counts`: 1 where it does, 0 where it only makes up the number.
        """
        places, counts, borders = [], [], [0]
        for kind, part in (("next tokens", self.text), ("decisions", self.thinking)):
            count = sizes(kind, len(part))
            places.append(padded(part, count))
            counts.append((torch.arange(count) < len(part)).float())
            borders.append(borders[-1] + count)
        place = torch.cat(places)
        text, thinking = (torch.arange(*ends) for ends in itertools.pairwise(borders))
        targets = Targets(self.tokens[place], self.kinds[place], text, thinking)
        return place, torch.cat(counts), targets

    def decisions(self, tokens: Tensor) -> Targets:
        """The stop decisions alone, with other `tokens`."""
        kinds = self.kinds[self.thinking]
        places = torch.arange(len(tokens), device=tokens.device)
        return Targets(tokens, kinds, places[:0], places)


def target_log_probabilities(
    model: LatentReasoner, hidden: Tensor, targets: Targets, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities `(M,)` of `targets` at states `(M, d)`.

    They equal those of `model.logits(..) / temperature`, but stop decisions cost two logits instead
    of V, and of a large vocabulary at most `LOGITS_AT_ONCE` logits are in memory: the backward pass
    computes them again. In float32 at least.
    """
    result = hidden.new_zeros(len(hidden), dtype=_at_least_float32(hidden.dtype))
    text, thinking, kinds, tokens = targets.text, targets.thinking, targets.kinds, targets.tokens
    if len(text) and _stores_no_logits(model):
        log_probs = frozen_head_log_probabilities(
            model, hidden[text], kinds[text], tokens[text], temperature
        )
        result, text = result.index_add(0, text, log_probs), text[:0]
    count = max(1, LOGITS_AT_ONCE // model.base.config.vocab_size)
    for part in text.split(count) if len(text) else ():
        compute = functools.partial(_text_log_probabilities, model, temperature=temperature)
        if len(text) > count and torch.is_grad_enabled():
            compute = functools.partial(
                checkpoint, compute, use_reentrant=False, preserve_rng_state=False
            )
        log_probs = compute(hidden[part], kinds[part], tokens[part])
        result = result.index_add(0, part, log_probs)
    if len(thinking):
        logits = decision_logits(model, hidden[thinking], temperature, result.dtype)
        choice = torch.where(tokens[thinking] == model.settings.stop_id, STOPS, CONTINUES)
        result = result.index_add(0, thinking, -_cross_entropy(logits, choice))
    return result


def _stores_no_logits(model: LatentReasoner) -> bool:
    """On a CPU the general way is kept: its numbers are those of earlier results, to the bit."""
    return model.device.type != "cpu" and has_frozen_head(model)


def _text_log_probabilities(
    model: LatentReasoner, hidden: Tensor, kinds: Tensor, targets: Tensor, temperature: float
) -> Tensor:
    """Log-probabilities `(M,)` over the vocabulary."""
    logits = model.logits(hidden, kinds)
    return -_cross_entropy(logits.to(_at_least_float32(logits.dtype)) / temperature, targets)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="none")
