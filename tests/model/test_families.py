"""Each family of docs/bases.md, tiny and random: SFT, RL and evaluation against slow loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from latent_reasoning.config import Distillation
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.data.examples import (
    IGNORED_LABEL,
    LatentExample,
)
from latent_reasoning.model import reasoner
from latent_reasoning.model.generation import generate, generate_forced
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.rollouts import SamplingSettings, draw_uniforms, sample
from latent_reasoning.rl.scoring import score_completions
from latent_reasoning.sft.latent_sft import LatentReading, latent_sft_losses
from tests.model.families import (
    CONTINUE,
    EOS,
    FAMILIES,
    POSITIONS,
    START,
    STOP,
    family_reasoner,
    slow_forward,
)
from tests.model.models import latent_example

SPECIAL = (START, CONTINUE, STOP)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PROMPTS = [[3, 4, 5, 6, 7, 8, START], [9, 10, 11, START]]


def gradients(model: LatentReasoner, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: LatentReasoner, own: Tensor, slow: Tensor) -> None:
    """Equal values, and equal gradients of every parameter (each against the largest of all)."""
    torch.testing.assert_close(own, slow, **CLOSE)
    expected = gradients(model, slow.sum())
    found = gradients(model, own.sum())
    largest = max(gradient.norm() for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        difference = (found.get(name, torch.zeros_like(gradient)) - gradient).norm()
        assert difference <= 1e-3 * largest, name


def slow_losses(model: LatentReasoner, example: LatentExample) -> list[tuple]:
    """For teacher and student: states at the target, their mean, log-probabilities of labels."""
    parts = []
    for side in (example.teacher, example.student):
        states, logits = slow_forward(model, side.input_ids.tolist())
        blocks = torch.stack(states[1:])
        span = side.reasoning_map if side is example.teacher else side.continue_map
        labels = torch.from_numpy(side.labels)[1:]
        learned = labels != IGNORED_LABEL
        log_probs = logits[:-1][learned].log_softmax(-1)
        log_probs = log_probs.gather(1, labels[learned][:, None])[:, 0]
        parts.append((blocks[:, side.target_position], blocks[:, span].mean(1), log_probs))
    return parts


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_latent_sft(name, monkeypatch):
    monkeypatch.setattr(reasoner, "PASS_COST", 0)  # the shared question is read once
    model = family_reasoner(name)
    examples = [
        latent_example([3, 4, 5, 6, 7, 8], [12, 13, 14], steps=3, special=SPECIAL),
        latent_example([9, 10, 11], [12, 18], steps=1, special=SPECIAL),
    ]
    settings = Distillation(codi_weight=2.0, meaned_weight=3.0, normalise="none")
    reading = LatentReading.plan(model, collate_latent(examples, pad_id=EOS), settings)
    own = latent_sft_losses(model, reading, settings)
    teacher, student = zip(*(slow_losses(model, example) for example in examples), strict=True)
    distances = [
        functional.smooth_l1_loss(
            torch.stack([side[part] for side in student]),
            torch.stack([side[part] for side in teacher]).detach(),
        )
        for part in (0, 1)
    ]
    expected = [
        -torch.cat([side[2] for side in teacher]).mean(),
        -torch.cat([side[2] for side in student]).mean(),
        2.0 * distances[0],
        3.0 * distances[1],
    ]
    assert_same(model, torch.stack(list(own.values())), torch.stack(expected))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_rl(name):
    """In train mode, as RL runs: the base's own dropout is off, so the slow loop is the same."""
    model = family_reasoner(name, max_latent_steps=4)
    model.base_dropout = False
    model.train()
    settings = SamplingSettings(temperature=0.8, max_new_tokens=7, eos_id=EOS)
    rollout, trajectory = sample(model, PROMPTS, draw_uniforms(2, 4, 7, seed=0), settings)
    assert len({c.ids.count(CONTINUE) for c in rollout.completions}) > 1
    own = score_completions(model, PROMPTS, rollout.completions, settings, trajectory)
    model.eval()
    slow = []
    for completion in rollout.completions:
        prompt = PROMPTS[completion.prompt]
        _, logits = slow_forward(model, [*prompt, *completion.ids[:-1]])
        log_probs = (logits[len(prompt) - 1 :] / settings.temperature).log_softmax(-1)
        slow.append(log_probs.gather(1, torch.tensor(completion.ids)[:, None])[:, 0])
    found = [row[: len(scores)] for row, scores in zip(own, slow, strict=True)]
    assert_same(model, torch.cat(found), torch.cat(slow))


def slow_greedy(model: LatentReasoner, prompt: list[int], max_new_tokens: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens and ids[-1] != EOS:
        bound = model.settings.max_latent_steps
        token = int(slow_forward(model, ids)[1][-1].argmax())
        ids.append(STOP if ids[-bound:] == [CONTINUE] * bound else token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_an_evaluation(name):
    model = family_reasoner(name, max_latent_steps=3)
    options = {"max_new_tokens": 8, "eos_id": EOS, "batch_size": 2}
    own = [generation.ids for generation in generate(model, PROMPTS, **options)]
    assert own == [slow_greedy(model, prompt, 8) for prompt in PROMPTS]
    options["max_new_tokens"] = 4
    curve = generate_forced(model, PROMPTS, [STOP, 15], last=2, **options)
    for steps, generations in enumerate(curve):
        forced = [[*prompt, *[CONTINUE] * steps, STOP, 15] for prompt in PROMPTS]
        assert [g.ids for g in generations] == [slow_greedy(model, ids, 4) for ids in forced]


@pytest.mark.parametrize("name", ["GPT-2", "MPT"])
@torch.no_grad()
def test_a_short_row_is_written_on_after_a_long_one_has_met_the_last_position(name):
    """Columns that only the long row used must go with it: MPT has distances for 40 of them."""
    model, new = family_reasoner(name, max_latent_steps=3), 12
    prompts = [[*range(2, 38), START], PROMPTS[1]]
    own = generate(model, prompts, max_new_tokens=new, eos_id=EOS, batch_size=2)
    room = POSITIONS + 1 - len(prompts[0])
    assert own[0].ids == slow_greedy(model, prompts[0], room)
    assert own[1].ids == slow_greedy(model, prompts[1], new)
    assert own[0].cut_off
    assert len(own[1].ids) > len(own[0].ids) == room
