"""Left-padded batches, batches of similar length, and the order of training examples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from latent_reasoning.data.collation import (
    StepSampler,
    bucket_by_length,
    collate_latent,
    collate_plain,
    pad_prompts,
)
from latent_reasoning.data.examples import LatentExample, PlainExample, StudentExample


def plain(ids: list[int]) -> PlainExample:
    """Two ids of question, one of reasoning, the target last but one."""
    return PlainExample(np.array(ids, dtype=np.int32), 2, 1, 2, len(ids) - 2)


def student(ids: list[int]) -> StudentExample:
    """One id of question, then START, CONTINUE .., STOP, and two more."""
    return StudentExample(np.array(ids, dtype=np.int32), 1, len(ids) - 3, 2, len(ids) - 2)


def test_plain_examples_are_padded_on_the_left() -> None:
    batch = collate_plain([plain([5, 6, 7, 8, 9]), plain([1, 2, 3, 4])], pad_id=99)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [99, 1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9], [-100, -100, -100, 3, 4]]
    assert batch["reasoning_map"].int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert batch["target_token_map"].int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]
    assert [values.dtype for values in batch.values()] == [torch.int64] * 3 + [torch.bool] * 2


def test_teacher_and_student_are_padded_apart() -> None:
    batch = collate_latent(
        [
            LatentExample(plain([5, 6, 7, 8]), student([1, 60, 62, 62, 63, 3, 4])),
            LatentExample(plain([5, 6, 7, 8, 9]), student([1, 60, 63, 3, 4])),
        ],
        pad_id=0,
    )
    assert batch["input_ids"].shape == (2, 5)
    assert batch["latent_input_ids"].shape == (2, 7)
    assert batch["latent_continue_map"].int().tolist() == [[0, 0, 1, 1, 0, 0, 0], [0] * 7]
    assert batch["latent_labels"].tolist()[1] == [-100, -100, -100, -100, 63, 3, 4]
    assert set(batch) == {
        *("input_ids", "attention_mask", "labels", "reasoning_map", "target_token_map"),
        *("latent_input_ids", "latent_attention_mask", "latent_labels", "latent_reasoning_map"),
        *("latent_target_token_map", "latent_continue_map"),
    }


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = pad_prompts([[1, 2, 3], [4]], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_buckets_hold_every_position_once_longest_first() -> None:
    assert bucket_by_length([3, 9, 5, 9, 1], 2) == [[1, 3], [2, 0], [4]]


def test_an_epoch_reads_every_example_once_and_the_next_in_another_order() -> None:
    sampler = StepSampler(n_examples=10, batch_size=4, seed=0)
    read = [index for step in range(5) for index in sampler.indices(step)]
    assert sorted(read[:10]) == sorted(read[10:20]) == list(range(10))
    assert read[:10] != read[10:20]


def test_a_step_is_the_same_whatever_was_read_before() -> None:
    sampler = StepSampler(n_examples=1000, batch_size=8, seed=3)
    late = sampler.indices(700)
    assert late == StepSampler(n_examples=1000, batch_size=8, seed=3).indices(700)
    assert late != StepSampler(n_examples=1000, batch_size=8, seed=4).indices(700)


def test_a_batch_larger_than_the_data_repeats_examples_evenly() -> None:
    indices = StepSampler(n_examples=3, batch_size=9, seed=0).indices(0)
    assert Counter(indices) == {0: 3, 1: 3, 2: 3}


def test_nothing_to_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="0 examples"):
        StepSampler(n_examples=0, batch_size=4, seed=0)
