"""Released weights of CODI, Coconut and SIM-CoT: layouts made by the public modules' names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from latent_reasoning.config import ImportModel
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import encode_prompts, special_token_ids
from latent_reasoning.model import folder as checkpoints
from latent_reasoning.model.rival_weights import load_rival
from latent_reasoning.model.tensors import CheckpointError
from tests.model.models import HIDDEN, build_base, build_tokenizer

TARGETS = {"llama": ["q_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}
WIDTH, LORA = 24, {"r": 2, "lora_alpha": 6}


def release(folder: Path, state: dict[str, torch.Tensor], base, lora: dict | None = None) -> Path:
    """A folder as a user makes it: released weights, the base's own configuration and tokenizer."""
    tokenizer = build_tokenizer(special=False)
    tokenizer.save_pretrained(folder)
    config = base.config.to_dict() | {"vocab_size": len(tokenizer), "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors")
    if lora is not None:
        (folder / "adapter_config.json").write_text(json.dumps(lora))
    return folder


class Codi(nn.Module):
    """The public module's attributes; SIM-CoT adds the decoder and the layer before it."""

    def __init__(self, base, architecture: str) -> None:
        super().__init__()
        targets = TARGETS[architecture]
        lora = LoraConfig(**LORA, target_modules=targets, init_lora_weights=False)
        self.codi = get_peft_model(base, lora)
        self.prj = nn.Sequential(
            nn.Dropout(0.0), nn.Linear(HIDDEN, WIDTH), nn.GELU(), nn.Linear(WIDTH, HIDDEN)
        )
        self.prj.add_module("ln", nn.LayerNorm(HIDDEN))
        self.decoder = build_base(architecture).float()
        self.pj_in = nn.Linear(HIDDEN, HIDDEN)


def released_base(architecture: str = "llama"):
    """A base with three rows after the tokenizer's vocabulary."""
    rows = len(build_tokenizer(special=False)) + 3
    return build_base(architecture, vocabulary=rows).float()


@pytest.fixture(params=["llama", "gpt2"])
def codi(request, tmp_path) -> tuple[Codi, Path]:
    torch.manual_seed(0)
    base = released_base(request.param)
    model = Codi(base, request.param).eval()
    return model, release(tmp_path, model.state_dict(), base, LORA)


def test_codis_layout_with_lora_gives_the_public_modules_states(codi):
    public, folder = codi
    model, tokenizer = load_rival(folder, "codi")
    first = len(build_tokenizer(special=False))
    special = special_token_ids(tokenizer)
    assert [special.start, special.end, special.continue_, special.stop] == [
        first + 1,
        first + 2,
        first + 3,
        first + 4,
    ]
    ids = torch.tensor([[3, 4, 5, 6, first + 1]])
    with torch.no_grad():
        expected = public.codi(ids, output_hidden_states=True).hidden_states[-1]
        actual = model(ids, torch.ones_like(ids)).last_hidden
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(model.latent_input(actual), public.prj(expected))


def test_an_imported_release_is_a_folder_like_any_other(codi, tmp_path):
    _, folder = codi
    model, tokenizer = load_rival(folder, "codi")
    checkpoints.save(model, tokenizer, tmp_path / "own", {})
    again = checkpoints.load(tmp_path / "own", "cpu")
    assert again.settings == model.settings
    assert again.settings.filter_width == WIDTH
    checkpoints.load_tokenizer(tmp_path / "own")
    ids = torch.tensor([[3, 4, 5]])
    mask = torch.ones_like(ids)
    assert torch.equal(again(ids, mask).last_hidden, model(ids, mask).last_hidden)


@pytest.mark.parametrize("trained_with_decoder", [False, True])
def test_coconuts_layout_feeds_states_back_unchanged(tmp_path, trained_with_decoder):
    base = released_base()
    state = {f"base_causallm.{name}": tensor for name, tensor in base.state_dict().items()}
    state["embedding.weight"] = base.get_input_embeddings().weight
    if trained_with_decoder:
        state |= {f"expainable_llm.{n}": t for n, t in build_base().float().state_dict().items()}
    model, tokenizer = load_rival(release(tmp_path, state, base), "coconut")
    first = len(build_tokenizer(special=False))
    special = special_token_ids(tokenizer)
    assert (special.start, special.end, special.continue_) == (first, first + 1, first + 2)
    hidden = torch.randn(2, HIDDEN)
    assert torch.equal(model.latent_input(hidden), hidden)
    assert torch.equal(
        model.embed(torch.tensor(special.stop)), model.embed(torch.tensor(first + 1))
    )


def test_forced_prompts_are_in_the_releases_own_form():
    row, tokenizer = Row("test-0", "w1 w2", (), "0"), build_tokenizer()
    options = {"prefix": "", "latent": True, "forced_steps": 1}
    (own,) = encode_prompts([row], tokenizer, **options)
    (other,) = encode_prompts([row], tokenizer, **options, announcement="w7")
    assert own[:-2] == other[:-1]
    assert tokenizer.convert_ids_to_tokens(other[-1]) == "w7"


def problem(folder: Path, change, form="codi") -> str:
    """What is said of a release whose weights were changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_rival(folder, form)
    return str(error.value)


def test_what_does_not_fit_is_named(codi):
    _, folder = codi

    def with_a_surprise(tensors):
        tensors["surprise"] = torch.zeros(2)

    def without_a_bias(tensors):
        del tensors["surprise"], tensors["prj.3.bias"]

    assert "unexpected tensors: surprise" in problem(folder, with_a_surprise)
    assert "missing tensors: output_layer.bias" in problem(folder, without_a_bias)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_lora_factor_without_the_other_is_named(codi, factor):
    _, folder = codi

    def without_a_factor(tensors):
        del tensors[next(name for name in tensors if factor in name)]

    assert f".{factor}.weight" in problem(folder, without_a_factor)


def test_a_release_without_forced_steps_is_refused():
    assert ImportModel(path="x", format="codi", forced_steps=6).forced_steps == 6
    with pytest.raises(ValueError, match="format: codi has no decision to stop: set forced_steps"):
        ImportModel(path="x", format="codi")


def test_a_scale_of_lora_that_is_not_known_is_asked_for(codi):
    _, folder = codi
    (folder / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    assert "r = 3, but" in problem(folder, lambda tensors: None)
    (folder / "adapter_config.json").write_text(json.dumps(LORA | {"use_rslora": True}))
    assert "not use_rslora" in problem(folder, lambda tensors: None)
    (folder / "adapter_config.json").write_text('{"r": 2}')
    assert "write r and lora_alpha" in problem(folder, lambda tensors: None)
    (folder / "adapter_config.json").unlink()
    assert "write r and lora_alpha" in problem(folder, lambda tensors: None)


def test_a_tokenizer_that_has_the_added_tokens_already_is_refused(codi):
    _, folder = codi
    build_tokenizer().save_pretrained(folder)
    assert "put the base model's own tokenizer there" in problem(folder, lambda tensors: None)
    (folder / "tokenizer.json").unlink()
    assert "its tokenizer cannot be read" in problem(folder, lambda tensors: None)
