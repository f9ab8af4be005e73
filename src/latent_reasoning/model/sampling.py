"""Sampled texts of a token reasoner, from uniform numbers that are drawn in advance.

Samples that agree so far share one row of the model, which is split where they differ. A sample
depends neither on how prompts are batched nor on which samples share a row.

P prompts, G samples of each, T tokens at most, R rows, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.state import ReasoningState
from latent_reasoning.runtime.device import to_device


class SampledTexts(NamedTuple):
    """Ids (P, G, T), EOS after the end, of which the first `lengths` (P, G) were sampled; `rows`
    (P, G, T): the row that each sample was when its token at a position was read. On the host."""

    ids: Tensor
    lengths: Tensor
    rows: Tensor


@torch.no_grad()
def sample_texts(
    model: LatentReasoner,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    eos_id: int,
    choices: Callable[[Tensor], Tensor],
    read: Callable[[ReasoningState, Tensor], object],
) -> SampledTexts:
    """Sample G completions of each of P prompts from `uniforms` (P, G, T), until EOS or T tokens.

    `choices` gives the probabilities (R, V) after states (R, d); a token is the first one whose
    cumulated probability exceeds its number. `read` reads one more token (R,) of each row. Mode
    (train, eval) and autocast are the caller's.
    """
    state = model.read_prompts(*to_device(pad_prompts(prompts, eos_id), model.device))
    count, size, longest = uniforms.shape
    ids = torch.full(uniforms.shape, eos_id)
    lengths, rows = torch.zeros(count, size, dtype=torch.long), torch.zeros_like(ids)
    prompt = torch.arange(count)
    of, member = prompt.repeat_interleave(size), torch.arange(size).repeat(count)
    row = of
    for position in range(longest):
        cumulated = choices(state.last_hidden).double().cumsum(-1)
        draws = to_device(uniforms[prompt, :, position].double(), model.device)
        drawn = torch.searchsorted(cumulated, draws * cumulated[:, -1:], right=True)
        tokens = drawn.cpu()[row, member]
        ids[of, member, position] = tokens
        lengths[of, member] = position + 1
        going_on = (tokens != eos_id) & (position + 1 < longest)
        if not going_on.any():
            break
        of, member = of[going_on], member[going_on]
        children, row = torch.stack([row, tokens])[:, going_on].unique(dim=1, return_inverse=True)
        parents, tokens = children
        state, prompt = state.select(parents), prompt[parents]
        read(state, to_device(tokens, model.device))
        rows[of, member, position] = row
    return SampledTexts(ids, lengths, rows)
