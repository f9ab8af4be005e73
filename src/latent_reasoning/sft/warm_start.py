"""A recurrent filter that begins as soft re-embedding.

A fresh filter writes a random code that the base has never read, and a small model that is trained
for minutes may not learn to read it: what it learns then is one step, not a chain. Here the filter
alone is first regressed onto what `SRE` makes of the same states, the softmax over the vocabulary
times the embeddings, at every position of the teacher's reasoning. No label is used, and the base
does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from latent_reasoning.data.collation import bucket_by_length, collate_plain
from latent_reasoning.data.examples import PlainExample
from latent_reasoning.data.rows import DataError
from latent_reasoning.model.filters import SRE
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_rows import embedding_matrix, vocabulary_logits
from latent_reasoning.runtime.device import to_device

EXAMPLES, BATCH, RATE = 2048, 1024, 3e-3
"""Examples that are read, states in a step of the regression, and its first learning rate."""


def warm_start(
    model: LatentReasoner,
    examples: Sequence[PlainExample],
    *,
    steps: int,
    pad_id: int,
    batch_size: int,
) -> float | None:
    """Train the filter of `model` for `steps` steps, in place: seed first.

    `examples` are the teacher's, of which the first `EXAMPLES` are read in batches of `batch_size`.
    Returns the share of the targets' variance that is left unexplained; None for a filter without
    weights, which does not change. Raises `DataError` where no teacher reasons in text.
    """
    weights = list(model.recurrent_filter.parameters())
    if not weights:
        return None
    states, targets = states_and_targets(model, examples[:EXAMPLES], pad_id, batch_size)
    if not len(states):
        raise DataError(
            f"filter_warm_start: {steps} has no reasoning to learn from, for the teacher's texts "
            "hold none (drop_last_step leaves out the only step of a row); set it to 0"
        )
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(states), (BATCH,)).to(states.device)
        optimizer.zero_grad()
        functional.mse_loss(model.recurrent_filter(states[chosen]), targets[chosen]).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    with torch.no_grad():
        error = functional.mse_loss(model.recurrent_filter(states), targets)
    return (error / targets.var(0, unbiased=False).mean()).item()


@torch.no_grad()
def states_and_targets(
    model: LatentReasoner, examples: Sequence[PlainExample], pad_id: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Last hidden states `(N, d)` of the question's last token and of the reasoning, and what `SRE`
    makes of them."""
    parts = model.base, model.settings, model.special_rows
    matrix, logits = embedding_matrix(*parts), partial(vocabulary_logits, *parts)
    states, targets = [], []
    for indices in bucket_by_length([len(example) for example in examples], batch_size):
        batch = to_device(collate_plain([examples[i] for i in indices], pad_id), model.device)
        output = model(batch["input_ids"], batch["attention_mask"])
        read = batch["reasoning_map"] | batch["reasoning_map"].roll(-1, 1)
        states.append(output.last_hidden[read])
        targets.append(SRE()(states[-1], logits, matrix))
    return torch.cat(states), torch.cat(targets)
