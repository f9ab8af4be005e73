"""HRPO: sampled chains of thought whose input is gated, and their log-probabilities.

Hybrid reasoning policy optimisation (arXiv 2505.18454; docs/rivals.md) trains a model that reads
its own thinking through a gate (`model/gated.py`) by group-relative rewards alone. Here are its
rollout, which keeps the mixtures that were read, its scoring, which takes these as constants and
reads all completions in one pass, and its reward. Advantages and loss are those of `rl/grpo.py`.

P prompts, G samples of each, U distinct completions of at most T tokens, R rows, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.data.sequences import ANSWER_PREFIX
from latent_reasoning.model.blocks import RowOrder
from latent_reasoning.model.gated import Fed, GatedReasoner
from latent_reasoning.model.heads import Targets, target_log_probabilities
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.sampling import sample_texts
from latent_reasoning.model.state import ReasoningState
from latent_reasoning.rl.rollouts import Completion, Rollout, collect
from latent_reasoning.runtime.device import to_device


class Read(NamedTuple):
    """What was read of completions but for their last tokens: `mixtures` (U, T - 1, d) where they
    were `thinking` (U, T - 1); elsewhere the tokens' embeddings, whatever the mixtures."""

    mixtures: Tensor
    thinking: Tensor


class Sampled(NamedTuple):
    """Sampled completions, what was read of them, and the mean share of a token's embedding that
    was kept where they were thinking (1: the gate did nothing)."""

    rollout: Rollout
    read: Read
    kept: float


def sample(
    model: GatedReasoner, prompts: Sequence[list[int]], uniforms: Tensor, eos_id: int
) -> Sampled:
    """Sample G completions of each of P prompts from `uniforms` (P, G, T), without gradients."""
    every: list[Fed] = []

    def read(state: ReasoningState, tokens: Tensor) -> None:
        every.append(model.feed(state, tokens))
        model.advance(state, every[-1].inputs.unsqueeze(1))

    ids, lengths, rows = sample_texts(model, prompts, uniforms, eos_id, model.choices, read)
    rollout = collect(prompts, ids, lengths)
    return Sampled(rollout, *_read(rollout, rows, every, model))


def _read(
    rollout: Rollout, rows_of: Tensor, every: Sequence[Fed], model: GatedReasoner
) -> tuple[Read, float]:
    """What was read of each completion, from the rows (P, G, T) that its samples were at each
    position and what `every` position fed; and the mean share kept."""
    completion_of = rollout.sample_completion.flatten()
    first = [int((completion_of == i).nonzero()[0]) for i in range(len(rollout.completions))]
    rows = rows_of.flatten(0, 1)[first]
    width, columns = max(len(c.ids) for c in rollout.completions) - 1, []
    lengths = torch.tensor([len(c.ids) for c in rollout.completions])
    for position, fed in enumerate(every[:width]):
        index = to_device(rows[:, position], model.device)
        is_read = to_device(position + 1 < lengths, model.device)
        columns.append((fed.mixtures[index], fed.thinking[index] & is_read, fed.kept[index]))
    if not columns:
        size = model.base.config.hidden_size
        empty = torch.zeros(len(rows), 0, size, device=model.device)
        return Read(empty, empty[..., 0].bool()), 1.0
    mixtures, thinking, kept = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))
    weights = thinking * to_device(rollout.weights, model.device)[:, None]
    share = (kept.mean(-1) * weights).sum() / weights.sum().clamp(min=1)
    return Read(mixtures, thinking), share.item() if weights.any() else 1.0


def completion_states(
    model: GatedReasoner,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    read: Read | None,
) -> Tensor:
    """The states (U, T, d) that predict each token of each completion, in one pass.

    Mixtures are constants: gradients reach the gate, the tokens' embeddings and the model. With
    `read` None all tokens are read as they are, which is the reference's way.
    """
    ids, mask = (tensor.to(model.device) for tensor in pad_prompts(prompts, 0))
    state = model.read_prompts(ids, mask)
    of = torch.tensor([completion.prompt for completion in completions])
    before = state.last_hidden[to_device(of, model.device)].unsqueeze(1)
    width = max(len(completion.ids) for completion in completions) - 1
    if not width:
        return before
    tokens = torch.zeros(len(completions), width, dtype=torch.long)
    for row, completion in zip(tokens, completions, strict=True):
        row[: len(completion.ids) - 1] = torch.tensor(completion.ids[:-1])
    lengths = torch.tensor([len(completion.ids) - 1 for completion in completions])
    tokens, is_read = to_device((tokens, torch.arange(width) < lengths[:, None]), model.device)
    inputs = model.embed(tokens) if read is None else model.gated(tokens, *read)[0]
    order = to_device(RowOrder.of(of, len(prompts)), model.device)
    rows = model.branch(state, order, state.mask[order.rows])
    return torch.cat([before, model.advance(rows, inputs, is_read)], 1)


def score(
    model: GatedReasoner,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    read: Read | None,
) -> Tensor:
    """Log-probability (U, T) of each token of each completion, 0 after its end.

    At temperature 1 and over the whole vocabulary, whatever the samples were drawn from: the
    method's own way.
    """
    hidden = completion_states(model, prompts, completions, read)
    mask = completion_mask(completions)
    tokens = torch.tensor([token for completion in completions for token in completion.ids])
    targets = Targets.of(tokens, torch.full_like(tokens, int(Kind.TEXT)), None)
    at = to_device(mask.flatten().nonzero()[:, 0], model.device)
    values = target_log_probabilities(
        model, hidden.flatten(0, 1).index_select(0, at), to_device(targets, model.device)
    )
    result = values.new_zeros(mask.numel()).index_put((at,), values)
    return result.view(mask.shape)


def completion_mask(completions: Sequence[Completion]) -> Tensor:
    """True (U, T) at the completions' tokens, EOS included."""
    lengths = torch.tensor([len(completion.ids) for completion in completions])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def is_rewarded(
    text: str, label: str, matches: Callable[[str, str], bool], marker: str = ANSWER_PREFIX
) -> bool:
    """Whether a completion earns 1, not 0: the marker occurs once, and what follows `matches`."""
    parts = text.split(marker)
    return len(parts) == 2 and matches(label, parts[1])
