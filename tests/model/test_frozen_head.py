"""The loss without stored logits equals the plain one: values and every gradient."""

from __future__ import annotations

import pytest
import torch

from latent_reasoning.config import Lora
from latent_reasoning.model import frozen_head
from latent_reasoning.model.frozen_head import frozen_head_log_probabilities, has_frozen_head
from latent_reasoning.model.heads import Targets, target_log_probabilities
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reasoner import LatentReasoner
from tests.model.families import family_reasoner
from tests.model.models import HIDDEN, START, build_base, build_reasoner

KINDS = torch.tensor([Kind.TEXT, Kind.ANSWER, Kind.ANSWER, Kind.TEXT, Kind.TEXT, Kind.ANSWER])
TOKENS = torch.tensor([3, 7, 1, START, 9, 0])
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.5], dtype=torch.float64)


def results(model: LatentReasoner, compute) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, and the gradients by states and START's row of a weighted sum of them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    values = compute(hidden)
    model.zero_grad()
    (values * WEIGHTS).sum().backward()
    start = [] if model.settings is None else [model.special_rows.output_row("start")._base.grad]
    return values.detach(), hidden.grad, *start


@pytest.mark.parametrize("chunk", [2048, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("tied", "settings"),
    [(True, {"allow_rethinking": True}), (False, {}), (True, None)],
)
def test_values_and_gradients_are_those_of_the_plain_loss(
    monkeypatch, chunk, temperature, tied, settings
):
    monkeypatch.setattr(frozen_head, "CHUNK", chunk)
    if settings is None:
        model = LatentReasoner(build_base(), None)
    else:
        model = build_reasoner(tied=tied, **settings)
    attach_lora(model, Lora(r=2, alpha=4, dropout=0.0))
    model.double()
    assert has_frozen_head(model)
    learned = Targets.of(TOKENS, KINDS, model.settings)
    expected = results(
        model, lambda hidden: target_log_probabilities(model, hidden, learned, temperature)
    )
    found = results(
        model,
        lambda hidden: frozen_head_log_probabilities(model, hidden, KINDS, TOKENS, temperature),
    )
    assert len(found) == (2 if settings is None else 3)
    for own, other in zip(found, expected, strict=True):
        assert (own - other).abs().max() < 1e-9


def test_it_is_for_frozen_plain_matrices_alone():
    model = build_reasoner()
    assert not has_frozen_head(model)
    attach_lora(model, Lora(r=2, alpha=4))
    assert has_frozen_head(model)
    with torch.no_grad():
        assert not has_frozen_head(model)
    capped = family_reasoner("Gemma 2")
    attach_lora(capped, Lora(r=2, alpha=4))
    assert not has_frozen_head(capped)


def test_in_mixed_precision_it_is_as_exact_as_the_plain_loss():
    model = build_reasoner()
    attach_lora(model, Lora(r=2, alpha=4))
    learned = Targets.of(TOKENS, KINDS, model.settings)
    exact = results(model, lambda hidden: target_log_probabilities(model, hidden, learned))
    model.float()

    def errors(compute) -> list[float]:
        def mixed(hidden: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return compute(hidden.float())

        found = results(model, mixed)
        return [(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]

    plain = errors(lambda hidden: target_log_probabilities(model, hidden, learned))
    own = errors(lambda hidden: frozen_head_log_probabilities(model, hidden, KINDS, TOKENS, 1.0))
    for error, other in zip(own, plain, strict=True):
        assert error < max(2 * other, 1e-3) < 0.05
