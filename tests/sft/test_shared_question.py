"""The question is read once for teacher and student; what is learned does not change."""

from __future__ import annotations

import pytest
import torch

from latent_reasoning.config import Distillation
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.data.examples import IGNORED_LABEL
from latent_reasoning.model import reasoner
from latent_reasoning.sft import latent_sft
from latent_reasoning.sft.latent_sft import LatentReading, latent_sft_losses
from latent_reasoning.sft.shared_question import SIDES, plan_question
from tests.sft.conftest import encode

BOTH = Distillation(codi_weight=2.0, meaned_weight=3.0)


@pytest.fixture(autouse=True)
def _sharing_always_pays(monkeypatch) -> None:
    monkeypatch.setattr(reasoner, "PASS_COST", 0)


@pytest.fixture
def examples(rows, tokenizer, latent_model):
    return encode(rows[:7], tokenizer, bias=0, shift_target=True, learn_start=True)


def test_what_is_left_begins_at_the_last_token_of_the_question(examples, tokenizer, latent_model):
    batch = collate_latent(examples, tokenizer.pad_token_id)
    reading, rest = plan_question(latent_model, batch)
    state = latent_model.read(reading)
    questions = [example.student.question_length for example in examples]
    assert state.mask.sum(1).tolist() == [question - 1 for question in questions]
    for side, sequences in (
        ("", [example.teacher for example in examples]),
        ("latent_", [example.student for example in examples]),
    ):
        mask = rest[f"{side}attention_mask"].bool()
        for row, (sequence, question) in enumerate(zip(sequences, questions, strict=True)):
            ids = rest[f"{side}input_ids"][row][mask[row]].tolist()
            assert ids == sequence.input_ids[question - 1 :].tolist()
        before, after = batch[f"{side}labels"], rest[f"{side}labels"]
        assert (before != IGNORED_LABEL).sum() == (after != IGNORED_LABEL).sum()
        assert not (rest[f"{side}target_token_map"] & ~mask).any()


def test_losses_and_gradients_are_those_of_two_whole_forwards(
    examples, tokenizer, latent_model, monkeypatch
):
    batch = collate_latent(examples, tokenizer.pad_token_id)
    results = []
    for plan in (plan_question, lambda model, batch: (None, batch)):
        monkeypatch.setattr(latent_sft, "plan_question", plan)
        latent_model.zero_grad()
        reading = LatentReading.plan(latent_model, batch, BOTH)
        losses = latent_sft_losses(latent_model, reading, BOTH)
        sum(losses.values()).backward()
        results.append((losses, {n: p.grad for n, p in latent_model.named_parameters()}))
    (losses, gradients), (other_losses, other_gradients) = results
    assert losses.keys() == {"teacher_loss", "student_loss", "codi_loss", "meaned_loss"}
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(other_losses[name].item(), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-4, atol=1e-4)


def test_a_question_of_one_token_leaves_the_batch_whole(examples, tokenizer, latent_model):
    batch = collate_latent(examples, tokenizer.pad_token_id)
    second = int(batch["attention_mask"][2].argmax()) + 1
    batch["labels"][2, second] = 5
    reading, rest = plan_question(latent_model, batch)
    assert reading is None
    assert rest is batch


def test_a_question_that_costs_less_than_a_pass_is_not_shared(
    examples, tokenizer, latent_model, monkeypatch
):
    batch = collate_latent(examples, tokenizer.pad_token_id)
    shared = sum(example.student.question_length - 1 for example in examples)
    for cost, expected in ((shared, True), (shared + 1, False)):
        hidden_size = latent_model.base.config.hidden_size
        monkeypatch.setattr(reasoner, "PASS_COST", cost * hidden_size**2)
        reading, _ = plan_question(latent_model, batch)
        assert (reading is not None) == expected


def test_the_names_of_both_sides_are_those_of_the_batch(examples, tokenizer):
    batch = collate_latent(examples, tokenizer.pad_token_id)
    names = {f"{side}{name}" for side, side_names in SIDES.items() for name in side_names}
    assert set(batch) == names | {"latent_reasoning_map"}
