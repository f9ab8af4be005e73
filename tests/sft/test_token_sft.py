"""The text task, which token SFT shares with the base model's pretraining."""

from __future__ import annotations

import copy

import pytest
import torch

from latent_reasoning.config import Data, Runtime, SftModel, Training
from latent_reasoning.sft.examples import token_sft_examples
from latent_reasoning.training.batches import BatchPlan
from latent_reasoning.training.gradients import accumulate_gradients
from latent_reasoning.training.text import TextTask

TRAINING = Training(steps=4, batch_size=20)


def examples_of(rows, tokenizer):
    return token_sft_examples(rows, tokenizer, SftModel(training=TRAINING), Data())


def make_task(model, tokenizer, examples, micro_batch_size=None, **training) -> TextTask:
    return TextTask(
        "text",
        model,
        examples,
        Training(**({"steps": 4, "batch_size": 20} | training)),
        Runtime(device="cpu", micro_batch_size=micro_batch_size),
        seed=0,
        pad_id=tokenizer.pad_token_id,
        validate=dict,
    )


def gradients(model, task):
    values = accumulate_gradients(model, task, 0)
    return values["loss"], {name: p.grad for name, p in model.named_parameters()}


def test_a_whole_batch_cut_for_speed_has_the_loss_of_the_whole_batch(rows, tokenizer, base_model):
    examples = examples_of(rows, tokenizer)
    task = make_task(base_model, tokenizer, examples)
    batches = task.micro_batches(0)
    assert [len(batch.inputs.reading.kinds) for batch in batches] == [16, 4]
    loss, own = gradients(base_model, task)
    reference = copy.deepcopy(base_model)
    expected, whole = gradients(reference, make_task(reference, tokenizer, examples, 20))
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-6)


def test_weighting_by_examples_depends_on_the_micro_batch_and_by_tokens_does_not(
    rows, tokenizer, base_model
):
    examples = examples_of(rows, tokenizer)
    losses = {
        (kind, size): accumulate_gradients(
            base_model, make_task(base_model, tokenizer, examples, size, accumulation=kind), 0
        )["loss"]
        for kind in ("examples", "tokens")
        for size in (20, 5)
    }
    assert losses["tokens", 5] == pytest.approx(losses["tokens", 20], rel=1e-5)
    assert losses["examples", 20] == pytest.approx(losses["tokens", 20], rel=1e-5)
    assert abs(losses["examples", 5] - losses["tokens", 5]) > 1e-4


def plan_of(lengths):
    runtime = Runtime(device="cpu", micro_batch_size=4)
    return BatchPlan(lengths, Training(steps=1, batch_size=12), runtime, 5, "x")


def test_micro_batches_hold_examples_of_similar_length_and_are_a_function_of_the_step():
    plan, other = plan_of(list(range(40))), plan_of(list(range(40)))
    batches = plan.micro_batches(2)
    flat = [index for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)
    assert len(set(flat)) == 12
    other.micro_batches(0)
    assert other.micro_batches(2) == batches
    assert other.micro_batches(1) != batches


def test_after_a_rollback_a_step_reads_other_examples():
    plan = plan_of([1] * 400)
    first = plan.micro_batches(2)
    plan.reorder(rollbacks=1)
    second = plan.micro_batches(2)
    assert not {i for batch in first for i in batch} & {i for batch in second for i in batch}
    plan.reorder(rollbacks=0)
    assert plan.micro_batches(2) == first
