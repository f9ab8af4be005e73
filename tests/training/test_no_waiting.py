"""Once planned, the loss and the gradient of a step need no look at a tensor: a GPU never waits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import pytest
import torch

from latent_reasoning.config import Distillation, Lora
from latent_reasoning.data.collation import collate_latent, collate_plain
from latent_reasoning.model import blocks, heads, reasoner
from latent_reasoning.model.frozen_head import has_frozen_head
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reading import plan_reading
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.static_rows import Beginning, Filling, Shape, StaticRows, Writing
from latent_reasoning.rl.grpo import mean_over, policy_loss
from latent_reasoning.rl.rollouts import Completion
from latent_reasoning.rl.scoring import Scoring, loss_mask, score
from latent_reasoning.runtime.graphs import Sizes
from latent_reasoning.sft.distillation import StateSummary
from latent_reasoning.sft.latent_sft import LatentReading, latent_sft_losses
from latent_reasoning.training.text import Labels, cross_entropy
from tests.device import META, nothing_waits, on_meta
from tests.model.models import CONTINUE, EOS, START, STOP, build_reasoner, latent_example

EXAMPLES = [
    latent_example([3, 4, 5, 6, 7, 8], [12, 13, 14], steps=3),
    latent_example([9, 10, 11], [12, 18], steps=1),
    latent_example([9, 10, 2, 6], [], steps=2),
]
PROMPTS = [[5, 6, START], [4, 3, 9, START]]
COMPLETIONS = [
    Completion(0, (CONTINUE, STOP, 7, 8, EOS)),
    Completion(1, (STOP, 6, EOS)),
    Completion(0, (CONTINUE, CONTINUE, CONTINUE)),
    Completion(1, (CONTINUE, STOP, 5, START, CONTINUE, STOP, 2, EOS)),
]


def meta_reasoner(*, lora: bool = True, **settings) -> LatentReasoner:
    """A latent reasoner in train mode, without values."""
    model = build_reasoner(modules=lora, **settings)
    if lora:
        attach_lora(model, Lora(r=2, alpha=4, dropout=0.1))
    return model.to(META).train()


def assert_nothing_waits(model: LatentReasoner, loss: Callable[[], torch.Tensor]) -> None:
    """Forward and backward once as they are, to make what is made once, then under guard."""
    for guard in (contextlib.nullcontext, nothing_waits):
        model.zero_grad()
        with guard():
            loss().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.grad is not None for p in trained) > len(trained) / 2


@pytest.mark.parametrize(
    ("lora", "tied", "recurrent_filter"),
    [(True, True, "MLP"), (True, False, "SRE"), (False, True, "linear")],
)
def test_latent_sft(lora, tied, recurrent_filter):
    model = meta_reasoner(lora=lora, tied=tied, recurrent_filter=recurrent_filter)
    distillation = Distillation(codi_weight=2.0, meaned_weight=3.0, block_range=(0, 1))
    batch = collate_latent(EXAMPLES, pad_id=EOS)
    reading = LatentReading.plan(model, batch, distillation)
    assert (reading.question is None) == (model.pass_cost > 10)
    reading = on_meta(reading)

    def loss():
        parts = latent_sft_losses(model, reading, distillation, stop_label_smoothing=0.1)
        return sum(parts.values())

    assert_nothing_waits(model, loss)


def loss_and_gradients(model: LatentReasoner, settings: Distillation, frozen) -> dict:
    """Those of latent SFT and of RL's scores, in float64."""
    results: dict = {}
    reading = LatentReading.plan(model, collate_latent(EXAMPLES, EOS), settings, frozen)
    losses = latent_sft_losses(model, reading, settings, stop_label_smoothing=0.1)
    scores = score(model, Scoring.plan(model, PROMPTS, COMPLETIONS), 0.7)
    scores = scores[scores.isfinite()]  # a token that no policy may write has none
    for name, value in (("sft", sum(losses.values())), ("rl", (scores * scores.detach()).sum())):
        model.zero_grad()
        value.backward()
        results[name] = value.detach()
        results |= {(name, n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return results


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("recurrent_filter", ["none", "MLP", "linear", "linear_ln", "SRE"])
@pytest.mark.parametrize(
    ("lora", "tied", "meaned", "frozen"),
    [(True, True, 3.0, False), (True, False, 0.0, True), (False, False, 3.0, False)],
)
def test_the_program_for_a_gpu_gives_the_numbers_of_the_one_for_a_cpu(
    monkeypatch, recurrent_filter, lora, tied, meaned, frozen, few_shapes
):
    monkeypatch.setattr(reasoner, "PASS_COST", 0)
    model = build_reasoner(modules=lora, tied=tied, recurrent_filter=recurrent_filter)
    if lora:
        attach_lora(model, Lora(r=2, alpha=4, dropout=0.0))
    model.double().train()
    distillation = Distillation(codi_weight=2.0, meaned_weight=meaned)
    states = torch.randn(2, 3, 16, dtype=torch.float64)
    teacher = StateSummary(states, states, torch.ones(3, dtype=torch.bool)) if frozen else None
    expected = loss_and_gradients(model, distillation, teacher)
    monkeypatch.setattr(LatentReasoner, "allowance", math.inf)
    model.sizes = Sizes() if few_shapes else None
    monkeypatch.setattr(heads, "_stores_no_logits", has_frozen_head)
    monkeypatch.setattr(blocks, "_takes_groups", lambda queries, visible: visible is None)
    found = loss_and_gradients(model, distillation, teacher)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-9 * max(1.0, value.abs().max()), name


@pytest.mark.parametrize("shared", [True, False])
def test_a_question_read_once_and_a_frozen_teacher(shared, monkeypatch):
    monkeypatch.setattr(reasoner, "PASS_COST", 0)
    model = meta_reasoner()
    distillation = Distillation(codi_weight=2.0)
    states = torch.randn(2, 3, 16, dtype=torch.float64)
    frozen = None if shared else StateSummary(states, states, torch.ones(3, dtype=torch.bool))
    reading = LatentReading.plan(model, collate_latent(EXAMPLES, EOS), distillation, frozen)
    assert (reading.question is not None) == shared
    reading = on_meta(reading)
    assert_nothing_waits(
        model, lambda: sum(latent_sft_losses(model, reading, distillation).values())
    )


def test_token_sft():
    model = meta_reasoner()
    batch = collate_plain([example.teacher for example in EXAMPLES], EOS)
    reading = plan_reading(model, batch["input_ids"], batch["attention_mask"])
    labels = on_meta(Labels.of(batch["labels"], reading.kinds, model.settings))
    reading = on_meta(reading)
    assert_nothing_waits(model, lambda: cross_entropy(model, model.run(reading), labels))


@pytest.mark.parametrize(
    ("kind", "completions"), [("bnpo", COMPLETIONS), ("grpo", COMPLETIONS[:2])]
)
def test_an_update_of_rl(kind, completions):
    model = meta_reasoner(allow_rethinking=True, max_latent_steps=3)
    scoring = on_meta(Scoring.plan(model, PROMPTS, completions))
    mask, weights = loss_mask(completions, model.settings), torch.ones(len(completions))
    denominator = mean_over(mask, weights, kind, 8)
    advantages, mask, weights = on_meta((torch.randn(len(completions)), mask, weights))

    def loss():
        result = policy_loss(
            score(model, scoring, 0.7),
            advantages,
            mask,
            kind=kind,
            epsilon=0.2,
            kl_weight=0.1,
            max_completion_length=8,
            weights=weights,
            reference=torch.zeros(scoring.shape, device=META),
            denominator=denominator,
        )
        return result.loss + 0 * (result.kl + result.clip_low + result.clip_high)

    assert_nothing_waits(model, loss)


@pytest.mark.parametrize("stop_rule", ["head", "marker", "fixed"])
def test_a_stop_decision(stop_rule):
    model = meta_reasoner(lora=False, stop_rule=stop_rule)
    hidden = torch.zeros(2, 16, dtype=torch.float64, device=META)
    for guard in (contextlib.nullcontext, nothing_waits):
        with guard():
            assert model.stop_logits(hidden).shape == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("temperature", "lora", "recurrent_filter"),
    [(None, False, "MLP"), (None, True, "SRE"), (0.7, True, "MLP"), (0.7, True, "none")],
)
def test_a_decoded_token(temperature, lora, recurrent_filter):
    model = meta_reasoner(lora=lora, max_latent_steps=2, recurrent_filter=recurrent_filter)
    model.train(temperature is not None)
    rows = StaticRows(model, Writing(EOS, 5, temperature), Shape(4, 96, 8))
    begun = [Beginning.of(model.settings, [*prompt, STOP, 3]) for prompt in (*PROMPTS, PROMPTS[0])]
    rows.fill(Filling.plan([0, 3, 1], begun, tokens=8, new=5))
    names = [name for name, value in vars(rows).items() if isinstance(value, torch.Tensor)]
    held = {name: (getattr(rows, name), getattr(rows, name).shape) for name in names}
    for guard in (contextlib.nullcontext, nothing_waits):
        with guard():
            rows.step(64)
    # What a graph works on must neither move nor change its shape.
    for name, (tensor, shape) in held.items():
        assert getattr(rows, name) is tensor, name
        assert tensor.shape == shape, name


@pytest.mark.parametrize(
    ("wait", "problem"),
    [
        (lambda states: states.nonzero(), "nonzero.*depends on values"),
        (lambda states: states[states > 0], "nonzero|mask"),
        (lambda states: bool(states.any()), "_local_scalar_dense.*reads a number"),
        (lambda states: states + torch.ones(2), "works on .*cpu"),
        (lambda states: torch.ones(2).to(META), "works on .*cpu"),
        (lambda states: torch.tensor([1.0], device=META), "numbers of the host"),
    ],
)
def test_the_guard_refuses_what_waits(wait, problem):
    with nothing_waits(), pytest.raises(Exception, match=problem):
        wait(torch.ones(2, device=META))
