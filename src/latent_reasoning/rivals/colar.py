"""CoLaR: latent steps that each stand for c words of the reasoning (arXiv 2505.16552).

The words are cut into groups of c. What a latent step reads is made of its group's embeddings; a
Gaussian head (`model/gaussian.py`) on the state before learns to foretell it, and the
language-model head one word of it. With all inputs given, a batch is one parallel pass.

    loss = ce_weight CE + latent_weight LAT + entropy_weight ENT + second_weight CE2

Departures from the public code (docs/rivals.md): groups are cut row by row, so that none is empty;
the decision to continue or to stop is the stop rule, and a word counts given that it continues,
which is the public cross-entropy where the rule is `marker`; CE2 reads samples in the columns and
the units that they are made for.

B rows, T positions, L words, d hidden size, N thinking positions, K words that are foretold, M
labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latent_reasoning.config import Colar
from latent_reasoning.model.gaussian import LOG_TWO_PI, log_density
from latent_reasoning.model.given import given_inputs, read_given
from latent_reasoning.model.heads import word_log_probabilities
from latent_reasoning.model.reading import ReasonerOutput
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.training.text import Labels, cross_entropy

EPSILON = 1e-5
"""Added to a group's divisor, as in the public code."""


@dataclass(frozen=True)
class Groups:
    """A batch of B rows as it is read; planned on the host.

    `input_ids` and `mask` are (B, T), CONTINUE where a group stands. `words` (B, L) are the
    reasoning's, and `columns` (B, L) the column of the group of each, T where there is no word;
    `single` says that groups are single words, which are read as they are. `kinds` (B, T) are the
    positions'; `labels` say what is decided or written next. `thinking` (N, 2) are row and column
    of the states that foretell a latent input; each of `foretold` (K, 3) is row and column of such
    a state, and a word of the group that comes next. `latent_scale` () makes LAT and ENT, means
    over thinking positions, exact in a step whose micro-batches are weighted otherwise.
    """

    input_ids: Tensor
    mask: Tensor
    words: Tensor
    columns: Tensor
    single: bool
    kinds: Tensor
    labels: Labels
    thinking: Tensor
    foretold: Tensor
    latent_scale: Tensor


@dataclass(frozen=True)
class Foretold:
    """What the head foretells in a batch that has been read: `inputs` and `hidden` (B, T, d), all
    else (N, d) in units of the embeddings' std. `samples` have the batch's noise."""

    inputs: Tensor
    hidden: Tensor
    mean: Tensor
    log_std: Tensor
    target: Tensor
    samples: Tensor


def colar_losses(model: LatentReasoner, batch: Groups, settings: Colar) -> dict[str, Tensor]:
    """The weighted parts of the loss of a batch on the model's device; their sum is the loss.

    The host waits for nothing here.
    """
    return weighted_losses(model, batch, settings, foretell(model, batch, settings))


def foretell(
    model: LatentReasoner, batch: Groups, settings: Colar, noise: Tensor | None = None
) -> Foretold:
    """Read a batch; `noise` (N, d) is standard normal, None: from torch's generator."""
    inputs = batch_inputs(model, batch, settings)
    hidden = read_given(model, inputs, batch.mask)
    rows, columns = batch.thinking.T
    mean, log_std = model.recurrent_filter.distribution(hidden[rows, columns])
    target = inputs[rows, columns + 1].detach() / model.recurrent_filter.embedding_std
    noise = torch.randn_like(mean) if noise is None else noise
    return Foretold(inputs, hidden, mean, log_std, target, mean + log_std.exp() * noise)


def weighted_losses(
    model: LatentReasoner, batch: Groups, settings: Colar, foretold: Foretold
) -> dict[str, Tensor]:
    """The parts of the loss by their names; ENT and CE2 are left out where they have no weight."""
    latent = latent_loss(settings.latent_loss, foretold) * batch.latent_scale
    words = words_cross_entropy(model, foretold.hidden, batch, settings)
    losses = {
        "ce_loss": settings.ce_weight * words,
        "latent_loss": settings.latent_weight * latent,
    }
    if settings.entropy_weight:
        of_heads = entropy(foretold.log_std) * batch.latent_scale
        losses["entropy_loss"] = settings.entropy_weight * of_heads
    if settings.second_weight:
        rows, columns = batch.thinking.T
        is_step = batch.input_ids[rows, columns + 1] == model.settings.continue_id
        inputs, unit = foretold.inputs, model.recurrent_filter.embedding_std
        samples = (unit * foretold.samples[is_step]).to(inputs.dtype)
        second = inputs.index_put((rows[is_step], columns[is_step] + 1), samples)
        hidden = read_given(model, second, batch.mask)
        again = words_cross_entropy(model, hidden, batch, settings)
        losses["second_loss"] = settings.second_weight * again
    return losses


def batch_inputs(model: LatentReasoner, batch: Groups, settings: Colar) -> Tensor:
    """Input embeddings (B, T, d) of a batch, its groups' included."""
    embedded, width = model.embed(batch.words), batch.input_ids.shape[1]
    groups = group_embeddings(embedded, batch.columns, width, batch.single, settings.pooling)
    return given_inputs(model, batch.input_ids, groups)


def group_embeddings(
    embedded: Tensor, columns: Tensor, width: int, single: bool, pooling: str = "sqrt_mean"
) -> Tensor:
    """What groups are read as, `(B, width, d)`: the sum of their words' embeddings `(B, L, d)` over
    the root of their number (`pooling: mean`: their number). 0 in columns without a group."""
    count, _, size = embedded.shape
    sums = embedded.new_zeros(count, width + 1, size)
    sums = sums.scatter_add(1, columns.unsqueeze(-1).expand(-1, -1, size), embedded)[:, :-1]
    if single:
        return sums
    ones = torch.ones_like(columns, dtype=embedded.dtype)
    members = embedded.new_zeros(count, width + 1).scatter_add(1, columns, ones)[:, :-1]
    divisor = members if pooling == "mean" else members.sqrt()
    return sums / (divisor + EPSILON).unsqueeze(-1)


def latent_loss(kind: str, foretold: Foretold) -> Tensor:
    """LAT: the mean over features and positions of the squared error of the samples (`mse`), or of
    the targets' negative log density (`nll`)."""
    if kind == "nll":
        return -log_density(foretold.target, foretold.mean, foretold.log_std).mean()
    return (foretold.samples - foretold.target).square().mean(-1).mean()


def entropy(log_std: Tensor) -> Tensor:
    """ENT: the mean over features and positions of the entropy, in nats, of (N, d) normals."""
    return (log_std + (1 + LOG_TWO_PI) / 2).mean(-1).mean()


def words_cross_entropy(
    model: LatentReasoner, hidden: Tensor, batch: Groups, settings: Colar
) -> Tensor:
    """CE: the mean over the M labels of the cross-entropy of what comes next, after states (B, T,
    d). A group counts as the decision to go on and one of its words given this decision."""
    output = ReasonerOutput(hidden, None, batch.kinds)
    decisions = cross_entropy(model, output, batch.labels, settings.stop_label_smoothing)
    rows, columns, words = batch.foretold.T
    log_probs = word_log_probabilities(model, hidden[rows, columns], words)
    return decisions - log_probs.sum() / len(batch.labels.rows)
