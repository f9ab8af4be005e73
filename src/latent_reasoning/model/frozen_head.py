"""Log-probabilities of next tokens against a frozen output matrix, without stored logits.

Where the matrix has no gradient, that of a log-probability with respect to its hidden state is
known as soon as the softmax is. So the states are taken `CHUNK` at a time: logits, softmax,
log-probability and gradient, after which the logits are gone. That is two products with the matrix
in all, where recomputing the logits for the backward pass takes three.

M positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_reasoning.model.bases import adjusts_logits
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.projection import mixed_precision
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_rows import ids_on

CHUNK = 2048
"""Positions whose logits are in memory at once: 1 GiB in float32 at Llama 3.2's vocabulary."""


def has_frozen_head(model: LatentReasoner) -> bool:
    """Whether gradients are asked for and the output matrix takes none: under LoRA.

    Special tokens' rows are then modules of their own. A bias, or logits that are scaled or capped,
    are left to the general way.
    """
    head = model.base.get_output_embeddings()
    return (
        torch.is_grad_enabled()
        and not head.weight.requires_grad
        and getattr(head, "bias", None) is None
        and not adjusts_logits(model.base)
        and (model.settings is None or model.special_rows is not None)
    )


def frozen_head_log_probabilities(
    model: LatentReasoner, hidden: Tensor, kinds: Tensor, tokens: Tensor, temperature: float
) -> Tensor:
    """Log-probabilities `(M,)` of next `tokens` `(M,)` at states `(M, d)` that are not THINKING.

    They equal those of `model.logits(hidden, kinds) / temperature`, and so do their gradients.
    """
    matrix, settings = model.base.get_output_embeddings().weight, model.settings
    never = start_row = may_start = None
    if settings is not None:
        never = ids_on(hidden.device, settings.end_id, settings.continue_id, settings.stop_id)
        start_row = model.special_rows.output_row("start")
        may_start = torch.ones_like(kinds, dtype=torch.bool)
        if not settings.allow_rethinking:
            may_start = kinds != Kind.ANSWER
    start_id = None if settings is None else settings.start_id
    return _LogProbabilities.apply(
        hidden, matrix, tokens, temperature, never, start_id, start_row, may_start
    )


class _LogProbabilities(torch.autograd.Function):
    """Nothing predicts the tokens `never`; `start_row` (d,) stands for the matrix's row `start_id`,
    which only the positions `may_start` (M,) predict."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        tokens: Tensor,
        temperature: float,
        never: Tensor | None,
        start_id: int | None,
        start_row: Tensor | None,
        may_start: Tensor | None,
    ) -> Tensor:
        low = mixed_precision(hidden) or hidden.dtype
        matrix = matrix.to(low)
        gradient = torch.empty_like(hidden)
        high = torch.promote_types(hidden.dtype, torch.float32)
        result = torch.empty(len(hidden), dtype=high, device=hidden.device)
        start_share = torch.zeros_like(result)
        for first in range(0, len(hidden), CHUNK):
            part = slice(first, first + CHUNK)
            states, target = hidden[part].to(low), tokens[part, None]
            logits = (states @ matrix.T).to(high)
            if start_id is not None:
                logits.index_fill_(1, never, -torch.inf)
                start = (states @ start_row.to(low)).to(high)
                logits[:, start_id] = torch.where(may_start[part], start, -torch.inf)
            logits /= temperature
            total = logits.logsumexp(1, keepdim=True)
            result[part] = (logits.gather(1, target) - total)[:, 0]
            # The derivative by the logits: 1 at the target, less the probability.
            slope = logits.sub_(total).exp_().neg_()
            slope.scatter_add_(1, target, torch.ones_like(total)).div_(temperature)
            if start_id is not None:
                start_share[part] = slope[:, start_id]
                slope[:, start_id] = 0
            gradient[part] = slope.to(low) @ matrix
            if start_id is not None:
                gradient[part] += start_share[part, None] * start_row
        ctx.save_for_backward(hidden, gradient, start_share, start_row)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gradient, start_share, start_row = ctx.saved_tensors
        by_hidden = gradient * upstream[:, None].to(gradient.dtype)
        by_start = None
        if start_row is not None:
            by_start = ((upstream * start_share) @ hidden.to(upstream.dtype)).to(start_row.dtype)
        return by_hidden, None, None, None, None, None, by_start, None
