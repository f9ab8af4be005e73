"""Supervised training of latent steps whose inputs are given mixtures of words (docs/rivals.md).

    loss = CE(labels) + kl_weight * KL(target mixture || next word) before each latent step

Latent-SFT's second stage and CoT2's continuous supervised fine-tuning are this; they differ in
where the mixtures come from. The target mixture of a latent step is its input too, so that a batch
is one parallel pass without a chain.

B rows, T positions, M latent steps of a batch, k words in a mixture, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from latent_reasoning.data.collation import collate_plain
from latent_reasoning.data.examples import StudentExample
from latent_reasoning.model.given import read_given
from latent_reasoning.model.mixtures import Mixture
from latent_reasoning.model.passes import kinds_of
from latent_reasoning.model.reading import Reading, ReasonerOutput, plan_reading
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_rows import embedding_matrix
from latent_reasoning.training.batches import BatchesAhead, BatchPlan
from latent_reasoning.training.task import Planned
from latent_reasoning.training.text import Labels, TextTask, count_labels, cross_entropy

Noise = Callable[[int, int, Mixture], Mixture]
"""The mixtures of an example, by a step of the training and its number, under noise."""


@dataclass(frozen=True, slots=True)
class MixtureExample:
    """A row with the target mixtures of its n latent steps: float32 and int32 (n, k)."""

    student: StudentExample
    probabilities: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.student)


@dataclass(frozen=True)
class Steps:
    """The M latent steps of a batch (B, T): where they stand, `rows` and `columns` (M,), their
    mixtures (M, k), and how much the loss of each counts, `weights` (M,)."""

    rows: Tensor
    columns: Tensor
    mixture: Mixture
    weights: Tensor


@dataclass(frozen=True)
class MixtureBatch:
    """A micro-batch; `label_scale` () makes its mean over labels exact in the whole step.

    `reading` is the latent forward of the rows, where latent steps read the model's own mixtures.
    """

    input_ids: Tensor
    mask: Tensor
    steps: Steps
    labels: Labels
    label_scale: Tensor
    reading: Reading | None


def with_mixtures(model: LatentReasoner, inputs: Tensor, steps: Steps) -> Tensor:
    """Input embeddings `(B, T, d)` of tokens, with the mixtures in the places of latent steps."""
    matrix = embedding_matrix(model.base, model.settings, model.special_rows)
    mixed = steps.mixture.embed(matrix).to(inputs.dtype)
    return inputs.index_put((steps.rows, steps.columns), mixed)


def mixture_kl(model: LatentReasoner, hidden: Tensor, target: Mixture) -> Tensor:
    """KL(target || next word) `(M,)`, in nats, of target mixtures (M, k), normalised here, against
    the distribution over all words after states `(M, d)`."""
    logits = model.vocabulary_logits(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = logits.log_softmax(-1).gather(-1, target.ids)
    wanted = target.probabilities.to(log_probs.dtype)
    wanted = wanted / wanted.sum(-1, keepdim=True)
    return (torch.xlogy(wanted, wanted) - wanted * log_probs).sum(-1)


def mixture_losses(model: LatentReasoner, batch: MixtureBatch) -> dict[str, Tensor]:
    """Cross-entropy of the labels, and the weighted sum of the latent steps' divergences."""
    if batch.reading is None:
        inputs = with_mixtures(model, model.embed(batch.input_ids), batch.steps)
        hidden = read_given(model, inputs, batch.mask)
    else:
        hidden = model.run(batch.reading).last_hidden
    output = ReasonerOutput(hidden, None, batch.mask)
    before = hidden[batch.steps.rows, batch.steps.columns - 1]
    divergence = mixture_kl(model, before, batch.steps.mixture)
    return {
        "ce": cross_entropy(model, output, batch.labels) * batch.label_scale,
        "kl": (divergence * batch.steps.weights).sum(),
    }


@dataclass
class MixtureTask(TextTask):
    """Learn to reason in mixtures.

    The divergences of a row's latent steps are averaged, or added (`adds_steps`). With
    `own_inputs` latent steps read the model's own mixtures, and gradients flow through the chain.
    """

    examples: Sequence[MixtureExample]  # type: ignore[assignment]
    kl_weight: float = field(default=1.0, kw_only=True)
    adds_steps: bool = field(default=False, kw_only=True)
    own_inputs: bool = field(default=False, kw_only=True)
    noise: Noise | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        # Unlike text, a batch is not cut for speed.
        self.plan = BatchPlan(
            [len(example) for example in self.examples],
            self.training,
            self.runtime,
            self.seed,
            self.name,
            processes=self.processes,
        )
        self.ahead = BatchesAhead(self._make, self.plan)

    def planned(self, micro_batch: Planned) -> None:
        """Not captured: a pass has few kernels, and many shapes."""

    def program(  # type: ignore[override]  # another task's own batches
        self, inputs: MixtureBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of both parts, which are metrics too, on the model's device."""
        parts = mixture_losses(self.model, inputs)
        return parts["ce"] + self.kl_weight * parts["kl"], parts

    def _make(self, step: int) -> list[Planned]:
        parts = self.plan.micro_batches(step)
        students = [[self.examples[index].student for index in part] for part in parts]
        collated = [collate_plain(rows, self.pad_id) for rows in students]
        labels = sum(count_labels(batch["labels"]) for batch in collated)
        rows = sum(map(len, parts))
        planned = []
        for part, batch in self.processes.share(list(zip(parts, collated, strict=True))):
            share = count_labels(batch["labels"]) * rows / (labels * len(part))
            made = self._batch(batch, self._steps(step, part, batch), share)
            planned.append(Planned(made, len(part)))
        return planned

    def _batch(self, batch: dict[str, Tensor], steps: Steps, label_scale: float) -> MixtureBatch:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        reading = plan_reading(self.model, ids, mask) if self.own_inputs else None
        kinds = kinds_of(ids, mask.bool(), self.model.settings)
        labels = Labels.of(batch["labels"], kinds, self.model.settings)
        scale = torch.tensor(label_scale)
        return MixtureBatch(ids, mask.bool(), steps, labels, scale, reading)

    def _steps(self, step: int, indices: list[int], batch: dict[str, Tensor]) -> Steps:
        examples = [self.examples[index] for index in indices]
        mixtures = []
        for index, example in zip(indices, examples, strict=True):
            mixture = Mixture(
                torch.from_numpy(example.probabilities), torch.from_numpy(example.ids).long()
            )
            mixtures.append(mixture if self.noise is None else self.noise(step, index, mixture))
        counts = torch.tensor([len(example.ids) for example in examples])
        weights = torch.ones(len(counts)) if self.adds_steps else 1 / counts.clamp(min=1)
        is_step = batch["input_ids"] == self.model.settings.continue_id
        is_step &= batch["attention_mask"].bool()
        rows, columns = is_step.nonzero(as_tuple=True)
        return Steps(rows, columns, joined(mixtures), weights[rows] / len(examples))


def noisy(mixture: Mixture, gumbel: Tensor, scale: float, temperature: float) -> Mixture:
    """The mixture under `scale` times Gumbel noise, which is cut as in the public code."""
    return mixture.perturbed((scale * gumbel).clamp(*NOISE_RANGE), temperature)


NOISE_RANGE = (-1.5, 3.0)
"""The noise on log-probabilities in training."""


def joined(mixtures: Sequence[Mixture]) -> Mixture:
    """Mixtures (n, k) of several rows as one (M, k), the shorter filled with probability 0."""
    width = max((mixture.ids.shape[-1] for mixture in mixtures), default=1)
    padded = [
        replace(
            mixture,
            probabilities=torch.nn.functional.pad(mixture.probabilities, (0, missing)),
            ids=torch.nn.functional.pad(mixture.ids, (0, missing)),
        )
        for mixture in mixtures
        for missing in (width - mixture.ids.shape[-1],)
    ]
    return Mixture(
        torch.cat([mixture.probabilities for mixture in padded]),
        torch.cat([mixture.ids for mixture in padded]),
    )


def counted(
    words: Sequence[Sequence[int]], size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The empirical distributions of n lists of words, the `size` commonest each (None: all), as
    float32 and int32 (n, k): words that are as common in the order of their ids."""
    pairs = []
    for chunk in words:
        ids, counts = np.unique(np.asarray(chunk, dtype=np.int32), return_counts=True)
        order = np.argsort(-counts, kind="stable")[:size]
        pairs.append((ids[order], counts[order] / counts[order].sum()))
    width = max((len(ids) for ids, _ in pairs), default=1)
    all_ids = np.zeros((len(pairs), width), dtype=np.int32)
    probabilities = np.zeros((len(pairs), width), dtype=np.float32)
    for row, (ids, shares) in enumerate(pairs):
        all_ids[row, : len(ids)], probabilities[row, : len(ids)] = ids, shares
    return probabilities, all_ids
