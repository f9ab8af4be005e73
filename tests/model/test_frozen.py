"""Frozen weights in bfloat16: what is computed is the same to the bit, and so is what is merged."""

from __future__ import annotations

import copy

import pytest
import torch

from latent_reasoning.config import Distillation, Lora
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.model.frozen import hold_frozen
from latent_reasoning.model.lora import adapter_disabled, attach_lora, merge_lora
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.sft.latent_sft import LatentReading, latent_sft_losses
from tests.model.models import CONTINUE, EOS, START, STOP, build_reasoner, latent_example, pad

EXAMPLES = [latent_example([3, 4, 5, 6], [12, 13], steps=3), latent_example([9, 8], [7], steps=1)]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}


def adapted(architecture: str) -> LatentReasoner:
    model = build_reasoner(architecture).float()
    attach_lora(model, Lora(r=2, alpha=4, dropout=0.0, target_modules=TARGETS[architecture]))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model


def step(model: LatentReasoner) -> dict[str, torch.Tensor]:
    """Loss, gradients and the reference policy's states of a step in mixed precision."""
    distillation = Distillation(codi_weight=2.0)
    reading = LatentReading.plan(model, collate_latent(EXAMPLES, EOS), distillation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sum(latent_sft_losses(model, reading, distillation).values())
        with adapter_disabled(model), torch.no_grad():
            reference = model(*pad([[2, 3, START, CONTINUE, STOP, 5]])).last_hidden
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {"loss": loss.detach(), "reference": reference}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_frozen_weights_are_cast_once_and_nothing_else_changes(architecture):
    plain = adapted(architecture)
    held = copy.deepcopy(plain)
    hold_frozen(held, torch.bfloat16)
    for name, parameter in held.named_parameters():
        in_blocks = "base." in name and parameter.ndim == 2 and "lora_" not in name
        is_table = any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
        if parameter.requires_grad or is_table or "norm" in name or ".ln_" in name:
            assert parameter.dtype == torch.float32, name
        elif in_blocks:
            assert parameter.dtype == torch.bfloat16, name
    expected, found = step(plain), step(held)
    assert expected.keys() == found.keys()
    assert len(found) > 10
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    merge_lora(plain)
    merge_lora(held)
    for name, tensor in plain.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(held.state_dict()[name], tensor), name


def test_a_reference_policy_of_its_own_keeps_no_second_copy():
    model = build_reasoner().float().requires_grad_(False)
    hold_frozen(model, torch.bfloat16)
    assert model.base.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.base.get_output_embeddings().weight.dtype == torch.float32
    trained = build_reasoner().float()
    hold_frozen(trained, torch.bfloat16)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
