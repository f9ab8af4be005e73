"""The naive paths give what the package gives, so that the benchmark compares the same work."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import naive
from benchmarks.workloads import samples_of
from latent_reasoning.config import Distillation
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.data.examples import LatentExample, PlainExample, StudentExample
from latent_reasoning.model import reasoner
from latent_reasoning.model.generation import generate
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.grpo import policy_loss
from latent_reasoning.rl.rollouts import SamplingSettings, draw_uniforms, sample
from latent_reasoning.rl.scoring import loss_mask, score_completions
from latent_reasoning.sft.latent_sft import LatentReading, latent_sft_losses
from latent_reasoning.training.text import Labels, cross_entropy
from tests.model.models import CONTINUE, EOS, START, STOP, build_reasoner

VARIANTS = [
    {},
    {"tied": False, "recurrent_filter": "none", "stop_head_temperature": 1.7},
    {"modules": True, "recurrent_filter": "SRE"},
    {"architecture": "gpt2", "detach_stop_head": True},
    {"architecture": "qwen2", "recurrent_filter": "linear_ln"},
]
# Question, teacher's reasoning, latent steps and answer of ragged rows, two of them alike.
ROWS = [(3, 4, 2, 3), (7, 0, 0, 4), (1, 2, 5, 2), (5, 6, 1, 6), (3, 4, 2, 3)]
PROMPTS = [[2, 9, 7, START], [5, START], [2, 4, 8, 6, 3, 9, START]]


@pytest.fixture(autouse=True)
def _every_fast_path_pays(monkeypatch) -> None:
    """On models as small as these, another pass costs more than what it saves."""
    monkeypatch.setattr(reasoner, "PASS_COST", 0)


def words(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 30, count).tolist()


def example(question: int, reasoning: int, steps: int, answer: int) -> LatentExample:
    """A row of random words; rows of equal lengths are equal."""
    asked, answered = words(question, seed=question), [*words(answer - 1, seed=answer), EOS]

    def read(kind: type[PlainExample], run: list[int]) -> PlainExample:
        ids = np.array([*asked, *run, *answered], dtype=np.int32)
        return kind(ids, question, len(run), question, question + len(run) + 1)

    latent = [START, *[CONTINUE] * steps, STOP]
    return LatentExample(read(PlainExample, words(reasoning, 7)), read(StudentExample, latent))


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return collate_latent([example(*row) for row in ROWS], EOS)


def gradients(model: LatentReasoner, loss: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient; the one of nothing is zero."""
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_same(model: LatentReasoner, own: Tensor, other: Tensor) -> None:
    """Two losses and all their gradients agree to nine digits."""
    torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
    others = gradients(model, other)
    largest = max(gradient.norm().item() for gradient in others.values())
    assert largest > 0
    for name, gradient in gradients(model, own).items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-9, atol=1e-9 * largest)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "distillation",
    [Distillation(), Distillation(codi_weight=0.0, meaned_weight=3.0, normalise="std")],
)
def test_latent_sft_has_the_packages_loss_and_gradients(batch, variant, distillation):
    model = build_reasoner(**variant)
    own = naive.latent_sft_loss(model, batch, distillation)
    reading = LatentReading.plan(model, batch, distillation)
    assert_same(model, own, sum(latent_sft_losses(model, reading, distillation).values()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_sft_has_the_packages_loss_and_gradients(batch, variant):
    model = build_reasoner(**variant)
    output = model(batch["input_ids"], batch["attention_mask"])
    own = naive.token_sft_loss(model, batch)
    labels = Labels.of(batch["labels"], output.kinds, model.settings)
    assert_same(model, own, cross_entropy(model, output, labels))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("end", [[], [CONTINUE] * 3 + [STOP, 4]], ids=["adaptive", "forced"])
@pytest.mark.parametrize("allow_rethinking", [False, True])
def test_greedy_answers_are_the_packages(variant, end, allow_rethinking):
    model = build_reasoner(**variant, allow_rethinking=allow_rethinking)
    prompts = [prompt + end for prompt in PROMPTS]
    own = naive.generate(model, prompts, naive.greedy, max_new_tokens=9, eos_id=EOS)
    expected = generate(model, prompts, max_new_tokens=9, eos_id=EOS, batch_size=2)
    assert own == [generation.ids for generation in expected]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("allow_rethinking", [False, True])
def test_grpo_has_the_packages_samples_loss_and_gradients(variant, allow_rethinking):
    model = build_reasoner(**variant, allow_rethinking=allow_rethinking)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    settings = SamplingSettings(temperature=0.8, max_new_tokens=9, eos_id=EOS)
    draws = draw_uniforms(len(PROMPTS), 6, settings.max_new_tokens, seed=3)
    rollout, _ = sample(model, PROMPTS, draws, settings)

    completions = naive.sample(model, PROMPTS, draws, settings)
    assert completions == samples_of(rollout)
    assert len({completion.ids for completion in completions}) > 4

    advantages = torch.randn(len(rollout.completions), dtype=torch.float64)
    own = naive.grpo_loss(
        model,
        reference,
        PROMPTS,
        completions,
        advantages[rollout.sample_completion.flatten()],
        settings,
        kl_weight=0.1,
    )
    with torch.no_grad():
        reference_log_probs = score_completions(reference, PROMPTS, rollout.completions, settings)
    expected = policy_loss(
        score_completions(model, PROMPTS, rollout.completions, settings),
        advantages,
        loss_mask(rollout.completions, model.settings),
        kind="bnpo",
        epsilon=0.2,
        kl_weight=0.1,
        max_completion_length=settings.max_new_tokens,
        weights=rollout.weights,
        reference=reference_log_probs,
    )
    assert own.kl.item() > 0
    assert_same(model, own.loss, expected.loss)
