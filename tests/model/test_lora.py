"""LoRA: attach, train, switch off, save, load, merge."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from latent_reasoning.config import ConfigError, Lora
from latent_reasoning.model.lora import (
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    adapter_disabled,
    attach_lora,
    load_adapter,
    merge_lora,
    save_adapter,
)
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.tensors import CheckpointError
from tests.model.families import LLAMA as LLAMA_SHAPE
from tests.model.models import CONTINUE, END, IDS, START, STOP, build_base, build_reasoner, pad

ROWS = [[5, 6, START, CONTINUE, CONTINUE, STOP, 7], [4, START, CONTINUE, STOP, 8, 9]]
LLAMA = Lora(r=4, alpha=8, dropout=0.0)
GPT2 = Lora(r=4, alpha=8, dropout=0.0, target_modules=["c_attn", "c_proj", "c_fc"])


def logits_of(model: LatentReasoner) -> torch.Tensor:
    return model.full_logits(model(*pad(ROWS))).nan_to_num()


def trained(architecture: str = "llama", tied: bool = True) -> LatentReasoner:
    """A model whose adapter and latent modules have moved."""
    model = build_reasoner(architecture, tied)
    torch.manual_seed(3)
    attach_lora(model, GPT2 if architecture == "gpt2" else LLAMA)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_adapter_the_filter_and_the_special_rows_are_trained(tied):
    model = build_reasoner(tied=tied)
    attach_lora(model, LLAMA)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in names if "lora_" not in name} == {
        name
        for name in model.state_dict()
        if name.startswith(("recurrent_filter.", "special_rows."))
    }
    assert sum("lora_" in name for name in names) == 2 * 2 * 7
    rows = dict(model.special_rows.named_children())
    tied_rows, untied = ("start", "end", "continue", "stop"), ("start_in", "end_in")
    assert tuple(rows) == (
        tied_rows if tied else (*untied, "start_out", "continue_out", "stop_out")
    )
    matrices = model.base.get_input_embeddings().weight, model.base.get_output_embeddings().weight
    zero = [[id_ for id_ in IDS.values() if matrix[id_].norm() == 0] for matrix in matrices]
    every = [START, END, CONTINUE, STOP]
    assert zero == ([every, every] if tied else [[START, END], [START, CONTINUE, STOP]])


@pytest.mark.parametrize("target", ["up_proj", "gate_proj", "down_proj"])
def test_experts_in_one_tensor_are_refused_because_lora_does_not_reach_them(target):
    """The shared expert's `up_proj` is a linear module: it would get an adapter, and they none."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    config = Qwen2MoeConfig(**LLAMA_SHAPE, **experts, shared_expert_intermediate_size=8)
    model = LatentReasoner(Qwen2MoeForCausalLM(config), None)
    with pytest.raises(ConfigError, match=rf"{target}: .*one tensor \(.*experts.*LoRA does not"):
        attach_lora(model, Lora(r=2, alpha=2, target_modules=["q_proj", target]))
    attach_lora(model, Lora(r=2, alpha=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_fresh_adapter_changes_nothing_and_gets_a_gradient(architecture):
    expected = logits_of(build_reasoner(architecture))
    model = build_reasoner(architecture)
    attach_lora(model, GPT2 if architecture == "gpt2" else LLAMA)
    assert torch.allclose(logits_of(model), expected, atol=1e-12)
    output = model(*pad(ROWS))
    logits = model.full_logits(output)
    logits[logits.isfinite()].sum().backward()
    # The second factors are zero at first, so the first ones get no gradient yet.
    gradients = [p.grad.norm() for n, p in model.named_parameters() if "lora_B" in n]
    assert min(gradients) > 0
    assert all(p.grad.norm() > 0 for p in model.special_rows.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_merging_keeps_the_outputs_and_leaves_a_plain_model(architecture, tied):
    model = trained(architecture, tied)
    expected = logits_of(model)
    assert not torch.allclose(expected, logits_of(build_reasoner(architecture, tied)), atol=1e-3)
    merge_lora(model)
    assert torch.allclose(logits_of(model), expected, atol=1e-9)
    plain = build_reasoner(architecture, tied)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.settings == plain.settings
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_with_the_adapter_off_the_model_is_the_one_it_started_from_without_dropout():
    expected = logits_of(build_reasoner())
    model = trained()
    policy = logits_of(model)
    model.train()
    with adapter_disabled(model):
        assert torch.allclose(logits_of(model), expected, atol=1e-12)
    assert model.training
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    model.eval()
    assert torch.equal(logits_of(model), policy)


def test_the_reference_may_be_read_between_a_forward_and_its_backward():
    def gradients(read_reference: bool) -> list[torch.Tensor]:
        model = trained()
        output = model(*pad(ROWS))
        if read_reference:
            with torch.no_grad(), adapter_disabled(model):
                logits_of(model)
        output.last_hidden.square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]

    for own, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_adapter_gives_the_same_model_on_the_same_base(tied, tmp_path):
    model = trained(tied=tied)
    save_adapter(model, tmp_path, "parent")
    again = build_reasoner(tied=tied)
    load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.adapter.lora.r == 4
    names = set(load_file(tmp_path / ADAPTER_WEIGHTS))
    row = "_start_embed.weight" if tied else "_start_embed_in.weight"
    assert f"base_model.model.{row}" in names
    prefix = "base_model.model._base_model.model.layers.0.self_attn.q_proj"
    assert f"{prefix}.lora_A.weight" in names


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_the_adapter_of_a_plain_model_loads_in_peft_itself(architecture, tmp_path):
    model = LatentReasoner(build_base(architecture), None).eval()
    attach_lora(model, GPT2 if architecture == "gpt2" else LLAMA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    save_adapter(model, tmp_path, "base")
    ids, mask = pad(ROWS)
    theirs = PeftModel.from_pretrained(build_base(architecture), tmp_path).eval()
    logits = theirs(input_ids=ids, attention_mask=mask).logits
    expected = model.base(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(logits, expected, atol=1e-12)
    plain = build_base(architecture)(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(logits, plain, atol=1e-3)
    again = LatentReasoner(build_base(architecture), None).eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again.base(input_ids=ids, attention_mask=mask).logits, expected)


def test_loading_an_adapter_leaves_a_model_in_eval_mode_without_dropout(tmp_path):
    model = build_reasoner()
    attach_lora(model, Lora(r=4, alpha=8, dropout=0.5))
    save_adapter(model, tmp_path, None)
    again = build_reasoner()
    load_adapter(again, tmp_path)
    assert not any(module.training for module in again.modules())


def test_an_adapter_with_a_missing_tensor_or_of_another_kind_is_refused(tmp_path):
    save_adapter(trained(), tmp_path, None)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    tensors.pop("base_model.model._stop_embed.weight")
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match=r"1 missing tensors: special_rows\.stop\.weight"):
        load_adapter(build_reasoner(), tmp_path)
    settings = json.loads((tmp_path / ADAPTER_SETTINGS).read_text())
    for change, problem in (
        ({"use_dora": True}, "only plain LoRA is supported, not use_dora"),
        ({"init_lora_weights": "pissa"}, "only plain LoRA is supported, not init_lora_weights"),
        ({"target_modules": "all-linear"}, "target_modules is a pattern"),
    ):
        (tmp_path / ADAPTER_SETTINGS).write_text(json.dumps(settings | change))
        with pytest.raises(CheckpointError, match=problem):
            load_adapter(build_reasoner(), tmp_path)


def test_target_modules_that_the_base_lacks_are_named_with_those_it_has():
    with pytest.raises(ConfigError, match=r"q_proj.*GPT2LMHeadModel.*c_attn, c_fc, c_proj"):
        attach_lora(build_reasoner("gpt2"), LLAMA)


def test_a_plain_language_model_gets_an_adapter_without_latent_modules():
    model = LatentReasoner(build_base(), None)
    expected = logits_of(model)
    attach_lora(model, LLAMA)
    trained_names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained_names)
    with adapter_disabled(model):
        assert torch.allclose(logits_of(model), expected, atol=1e-12)
    merge_lora(model)
    assert torch.allclose(logits_of(model), expected, atol=1e-12)
