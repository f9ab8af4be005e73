"""Captured programs add the gradients that the eager way adds."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from latent_reasoning.config import Distillation, Lora, Runtime
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.runtime.graphs import Sizes, signature
from latent_reasoning.training.gradients import (
    SEEN_BEFORE,
    Backward,
    CapturedBackward,
    accumulate_gradients,
    backward_of,
)
from latent_reasoning.training.task import Task
from tests.data.generated import generated_rows
from tests.sft.conftest import encode
from tests.sft.test_latent_sft import make_task
from tests.sft.test_token_sft import examples_of
from tests.sft.test_token_sft import make_task as make_text_task


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
        ),
    ]
)
def device(request) -> torch.device:
    """Where there is no GPU, what would be captured is run anew each time."""
    return torch.device(request.param)


def gradients(task: Task, backward: Backward, steps: int) -> Iterator[tuple[dict, dict]]:
    """Metrics and gradients of the first steps."""
    for step in range(steps):
        backward.zero_gradients()
        values = accumulate_gradients(task.model, task, step, 1.0, backward)
        own = {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}
        yield values, own


def assert_the_same(eager: Task, captured: Task) -> list[str]:
    """Compare three steps, before and after gradients and programs are forgotten."""
    log: list[str] = []
    captured.model.sizes = Sizes()
    program = CapturedBackward(captured, captured.model.device, log.append)
    expected = list(gradients(eager, Backward(eager), 3))
    found = list(gradients(captured, program, 2))
    program.forget()
    found += list(gradients(captured, program, 3))[2:]
    for (values, own), (other_values, other) in zip(expected, found, strict=True):
        assert other_values == pytest.approx(values, rel=1e-9, abs=1e-12)
        assert other.keys() == own.keys()
        for name, gradient in own.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-8, atol=1e-11)
    return log


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("accumulation", ["tokens", "examples"])
def test_latent_sft(rows, tokenizer, latent_model, device, lora, micro_batch, accumulation):
    model = latent_model.double()
    if lora:
        attach_lora(model, Lora(r=2, alpha=4, dropout=0.0))
    model.to(device)
    distillation = Distillation(codi_weight=2.0, meaned_weight=1.0)
    examples = encode(rows, tokenizer)
    options = {
        "distillation": distillation,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
    }
    tasks = [make_task(m, tokenizer, examples, **options) for m in (model, copy.deepcopy(model))]
    log = assert_the_same(*tasks)
    assert log[0] == "latent: 1 shape captured"


def test_text(rows, tokenizer, base_model, device):
    model = base_model.double().to(device)
    examples = examples_of(rows, tokenizer)
    tasks = [
        make_text_task(m, tokenizer, examples, 7, accumulation="tokens")
        for m in (model, copy.deepcopy(model))
    ]
    assert_the_same(*tasks)


def test_a_cpu_and_a_base_that_is_not_a_llama_are_not_captured(rows, tokenizer, base_model):
    task = make_text_task(base_model, tokenizer, examples_of(rows, tokenizer))
    assert type(backward_of(task, Runtime(), print)) is Backward
    assert base_model.sizes is None


def test_an_epoch_needs_few_shapes_and_reads_little_padding(tokenizer, latent_model):
    latent_model.sizes = Sizes()
    examples = encode(generated_rows(120), tokenizer)
    task = make_task(
        latent_model, tokenizer, examples, batch_size=32, micro_batch=16, accumulation="tokens"
    )
    for step in range(SEEN_BEFORE):
        task.micro_batches(step)
    shapes, read, tokens = set(), 0, 0
    for step in range(SEEN_BEFORE, SEEN_BEFORE + 30):
        for micro_batch in task.micro_batches(step):
            shapes.add(signature(micro_batch.inputs, []))
            text = micro_batch.inputs.reading.teacher.reading.passes[0]
            read, tokens = read + len(text.packed), tokens + int(text.mask.sum())
    assert len(shapes) <= 4  # two micro-batches a step, and what has grown since
    assert tokens <= read < 1.3 * tokens
