"""Batches: left-padded tensors, batches of similar length, and the order in which rows are read.

Padding is on the left: id `pad_id`, mask 0, label -100, maps False.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from latent_reasoning.data.examples import IGNORED_LABEL, Ids, LatentExample, PlainExample


def collate_plain(examples: Sequence[PlainExample], pad_id: int) -> dict[str, Tensor]:
    """Left-padded batch, each tensor (B, T): `input_ids`, `attention_mask` and `labels` (int64),
    `reasoning_map` and `target_token_map` (bool)."""
    ids, mask = pad_prompts([example.input_ids for example in examples], pad_id)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": _pad_left([example.labels for example in examples], np.int64, IGNORED_LABEL),
        "reasoning_map": _pad_left([e.reasoning_map for e in examples], np.bool_, False),
        "target_token_map": _pad_left([e.target_token_map for e in examples], np.bool_, False),
    }


def collate_latent(examples: Sequence[LatentExample], pad_id: int) -> dict[str, Tensor]:
    """The teacher's batch as in `collate_plain`, the student's under the same names with `latent_`
    before them, and `latent_continue_map` (bool). The two differ in T."""
    students = [example.student for example in examples]
    student = collate_plain(students, pad_id)
    student["continue_map"] = _pad_left([s.continue_map for s in students], np.bool_, False)
    teacher = collate_plain([example.teacher for example in examples], pad_id)
    return {**teacher, **{f"latent_{name}": values for name, values in student.items()}}


def from_column(
    batch: dict[str, Tensor], names: Iterable[str], begin: Tensor, width: int
) -> dict[str, Tensor]:
    """Left-padded tensors (B, T) of a batch from the columns `begin` (B,) on: right-padded (B,
    `width`)."""
    columns = begin[:, None] + torch.arange(width)
    narrow = {}
    for name in names:
        values = batch[name]
        fill = IGNORED_LABEL if name.endswith("labels") else 0
        last = values.shape[1] - 1
        narrow[name] = values.gather(1, columns.clamp(max=last)).masked_fill(columns > last, fill)
    return narrow


def pad_prompts(prompts: Sequence[Ids], pad_id: int) -> tuple[Tensor, Tensor]:
    """Left-padded `input_ids` and `attention_mask` of prompts, int64 (B, T)."""
    ids = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    masks = [np.ones(len(prompt), dtype=np.int64) for prompt in prompts]
    return _pad_left(ids, np.int64, pad_id), _pad_left(masks, np.int64, 0)


def bucket_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches of similar length, so that there is little padding.

    The longest batch comes first: a shortage of memory then shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class StepSampler:
    """Which examples a training step reads: each epoch is a new permutation, without replacement.

    `indices` is a pure function of the seed and the step, so a resumed run needs no state. A batch
    that reaches the end of an epoch continues in the next one.
    """

    def __init__(self, n_examples: int, batch_size: int, seed: int) -> None:
        if n_examples < 1 or batch_size < 1:
            raise ValueError(f"{n_examples} examples in batches of {batch_size}: nothing to sample")
        self.n_examples = n_examples
        self.batch_size = batch_size
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(n_examples)
        )

    def indices(self, step: int) -> list[int]:
        """Positions of the examples of optimiser step `step` (from 0)."""
        first = step * self.batch_size
        return [
            int(self._permutation(position // self.n_examples)[position % self.n_examples])
            for position in range(first, first + self.batch_size)
        ]


def _pad_left(arrays: Sequence[np.ndarray], dtype: type, fill: int | bool) -> Tensor:
    width = max(len(array) for array in arrays)
    batch: np.ndarray = np.full((len(arrays), width), fill, dtype=dtype)
    for row, array in zip(batch, arrays, strict=True):
        row[width - len(array) :] = array
    return torch.from_numpy(batch)
