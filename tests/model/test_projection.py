"""Adapters in mixed precision compute what peft's own modules compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from latent_reasoning.config import Lora
from latent_reasoning.model.lora import adapter_disabled, attach_lora
from latent_reasoning.model.projection import project, weights_cast_once
from latent_reasoning.model.reasoner import LatentReasoner
from tests.model.models import build_reasoner


def adapted(dropout: float = 0.0, targets: list[str] | None = None) -> LatentReasoner:
    """A model with adapters that do something, in float64."""
    model = build_reasoner(modules=True)
    targets = targets or ["q_proj", "k_proj", "v_proj", "up_proj"]
    attach_lora(model, Lora(r=2, alpha=6, dropout=dropout, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.double().train()


def modules_of(model: LatentReasoner) -> list[nn.Module]:
    attention = model.base.model.layers[0].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def gradients(model: LatentReasoner, inputs: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """Of a sum that weighs all outputs differently, by the inputs and what is trained."""
    trained = [p for m in modules_of(model) for p in m.parameters() if p.requires_grad]
    total = sum(
        (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum() for output in outputs
    )
    return list(torch.autograd.grad(total, [inputs, *trained]))


@pytest.mark.parametrize("together", [1, 2, 3])
def test_outputs_and_gradients_are_peft_s(together):
    model = adapted()
    modules = modules_of(model)
    inputs = torch.randn(3, 4, 16, dtype=torch.float64, requires_grad=True)
    expected = [module(inputs) for module in modules]
    with weights_cast_once():
        found = project(modules[:together], inputs) + [
            output for module in modules[together:] for output in project([module], inputs)
        ]
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs)
    for own, theirs in zip(
        gradients(model, inputs, found), gradients(model, inputs, expected), strict=True
    ):
        torch.testing.assert_close(own, theirs)


def test_dropout_is_the_same_noise_for_modules_that_read_the_same():
    model = adapted(dropout=0.5)
    modules = modules_of(model)
    inputs = torch.randn(3, 4, 16, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    found = project(modules, inputs)
    torch.manual_seed(5)
    noisy = torch.native_dropout(inputs.flatten(0, 1), 0.5, True)[0].view_as(inputs)
    assert 0.2 < (noisy == 0).double().mean() < 0.8
    expected = [
        module.get_base_layer()(inputs)
        + 3.0 * module.lora_B["default"](module.lora_A["default"](noisy))
        for module in modules
    ]
    for own, theirs in zip(
        [*found, *gradients(model, inputs, found)],
        [*expected, *gradients(model, inputs, expected)],
        strict=True,
    ):
        torch.testing.assert_close(own, theirs)


def test_what_has_no_adapter_of_the_kind_is_called_as_it_is():
    model = adapted(targets=["q_proj"])
    inputs = torch.randn(2, 3, 16, dtype=torch.float64)
    expected = [module(inputs) for module in modules_of(model)]
    assert all(map(torch.equal, project(modules_of(model), inputs), expected))
    with adapter_disabled(model):
        off = project(modules_of(model), inputs)
        assert all(map(torch.equal, off, [module(inputs) for module in modules_of(model)]))
    assert not torch.equal(off[0], expected[0])


def test_weights_are_cast_once():
    model = adapted().float()
    inputs = torch.randn(2, 3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), weights_cast_once():
        first, second = (project(modules_of(model)[:1], inputs.bfloat16())[0] for _ in range(2))
    nodes = [output.grad_fn.next_functions[0][0].next_functions for output in (first, second)]
    assert nodes[0][3] == nodes[1][3]  # the same cast of the first factor
    assert first.dtype == torch.bfloat16
