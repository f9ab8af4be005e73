"""Sampled chains of latent steps and their answers, scored in one parallel pass.

The latent inputs of a chain are known once it is sampled: to score it, no step has to wait for the
one before.

R rows that are samples, T columns, N latent steps at most, W tokens of a completion at most, d
hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.model.heads import Targets, target_log_probabilities
from latent_reasoning.model.passes import kinds_of
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings

Pair = tuple[Tensor, Tensor]
"""Of tokens, and of latent inputs."""


@dataclass(frozen=True)
class Chains:
    """R samples as they are scored; planned on the host.

    `input_ids` and `mask` (R, T) are prompts and completions. `latent_at` (K, 2) are row and column
    of the latent inputs, `steps` (K,) their numbers in their chains. `rows` and `columns` (M,) say
    where `targets` (M,) are predicted, `tokens` (M,) which tokens of the completions these are.
    """

    input_ids: Tensor
    mask: Tensor
    latent_at: Tensor
    steps: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor
    targets: Targets

    @classmethod
    def plan(
        cls,
        prompts: Sequence[list[int]],
        completions: Sequence[Sequence[int]],
        special: LatentSettings,
    ) -> Chains:
        """Completion i continues prompt i, which ends in START."""
        input_ids, mask = pad_prompts(
            [[*p, *c] for p, c in zip(prompts, completions, strict=True)], pad_id=0
        )
        kinds, width = kinds_of(input_ids, mask.bool(), special), input_ids.shape[1]
        places = [
            (r, t, width - len(c) + t) for r, c in enumerate(completions) for t in range(len(c))
        ]
        rows, tokens, columns = torch.tensor(places).T
        # Every latent input follows START: its number is that of the token in the completion. One
        # at which a sample was cut off is the last column, which nothing reads.
        is_latent = (input_ids[rows, columns] == special.continue_id) & (columns + 1 < width)
        targets = Targets.of(input_ids[rows, columns], kinds[rows, columns - 1], special)
        latent_at = torch.stack([rows[is_latent], columns[is_latent]], 1)
        return cls(
            input_ids, mask, latent_at, tokens[is_latent], rows, columns - 1, tokens, targets
        )

    def token_scores(self, model: LatentReasoner, hidden: Tensor, temperature: float) -> Tensor:
        """Log-probabilities `(R, W)` of the completions' tokens after states `(R, T, d)`, 0 after
        their ends."""
        predicting = hidden[self.rows, self.columns]
        log_probs = target_log_probabilities(model, predicting, self.targets, temperature)
        scores = log_probs.new_zeros(len(self.input_ids), int(self.tokens.max()) + 1)
        return scores.index_put((self.rows, self.tokens), log_probs)

    def step_scores(self, values: Tensor, steps: int) -> Tensor:
        """Scores `(R, steps)` of the latent inputs from those in order `(K,)`, 0 where is none."""
        scores = values.new_zeros(len(self.input_ids), steps)
        return scores.index_put((self.latent_at[:, 0], self.steps), values)
