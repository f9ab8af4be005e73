"""Model folders: what is saved is what is loaded, and anything damaged is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from latent_reasoning.config import Lora
from latent_reasoning.model.base_files import weight_files
from latent_reasoning.model.card import prompt_prefix
from latent_reasoning.model.folder import load, load_tokenizer, save
from latent_reasoning.model.latentseek import SeekingReasoner, SeekSettings
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.published import our_name, published_name
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.soft_thinking import SoftThinker, SoftThinking
from latent_reasoning.model.tensors import CheckpointError
from latent_reasoning.runtime.files import SUMS
from tests.model.models import (
    ARCHITECTURES,
    CONTINUE,
    START,
    STOP,
    build_base,
    build_reasoner,
    build_tokenizer,
    pad,
    to_published_format,
)

CARD = {"model": "tiny", "stage": "test", "seed": 3, "licence": {"weights": "mit", "data": None}}
ROWS = [[5, 6, START, CONTINUE, CONTINUE, STOP, 7]]


def write(folder, architecture="llama", tied=True, modules=False, **settings) -> LatentReasoner:
    """Save a tiny latent model in float32; transformers' own norms, as a folder has them."""
    model = build_reasoner(architecture, tied, modules, **settings).float()
    save(model, build_tokenizer(), folder, CARD)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a tiny latent model."""
    write(tmp_path / "m")
    return tmp_path / "m"


def loaded(folder: Path) -> LatentReasoner:
    return load(folder, device="cpu")


def refused(folder: Path, problem: str, read: Callable = loaded) -> None:
    """Reading the folder raises a `CheckpointError` that names the problem."""
    with pytest.raises(CheckpointError, match=problem):
        read(folder)


def same_weights(own: torch.nn.Module, other: torch.nn.Module) -> bool:
    state, expected = own.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    return all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("architecture", "tied", "modules", "recurrent_filter"),
    [
        *((name, tied, not tied, "MLP") for name in ARCHITECTURES for tied in (True, False)),
        *(("llama", True, False, name) for name in ("none", "linear", "linear_ln", "linear_ECF")),
        ("llama", True, False, "SRE"),
    ],
)
def test_a_saved_model_is_loaded_to_the_last_bit(
    tmp_path, architecture, tied, modules, recurrent_filter
):
    settings = {"recurrent_filter": recurrent_filter, "stop_head_temperature": 2.0}
    model = write(tmp_path / "m", architecture, tied, modules, **settings)
    again = loaded(tmp_path / "m")
    assert again.settings == model.settings
    assert not again.training
    assert same_weights(again, model)


def test_plain_transformers_reads_the_folder_too(tmp_path):
    model = write(tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert same_weights(plain, model.base)


def test_a_plain_folder_is_a_model_that_cannot_think(tmp_path):
    base = build_base().float()
    save(LatentReasoner(base, None), build_tokenizer(special=False), tmp_path / "m", CARD)
    assert loaded(tmp_path / "m").settings is None
    assert not (tmp_path / "m" / "latent.json").exists()
    load_tokenizer(tmp_path / "m")


def test_the_card_is_written_for_programs_and_people(folder):
    assert json.loads((folder / "card.json").read_text()) == CARD
    text = (folder / "README.md").read_text()
    assert "| Seed | 3 |" in text
    assert "| Licence of the weights | mit |" in text


@pytest.mark.parametrize(
    "model",
    [
        lambda base: SoftThinker(base, SoftThinking(end=(3, 4), size=2)),
        lambda base: SeekingReasoner(base, SeekSettings(steps=3)),
    ],
)
def test_how_a_plain_model_is_decoded_is_saved_with_it(tmp_path, model):
    made = model(build_base().float())
    save(made, build_tokenizer(special=False), tmp_path / "m", CARD)
    again = loaded(tmp_path / "m")
    assert type(again) is type(made)
    for name in {"how", "seek_settings"} & set(vars(made)):
        assert getattr(again, name) == getattr(made, name)


def test_an_attached_adapter_has_to_be_merged_before_saving(tmp_path):
    model = build_reasoner()
    attach_lora(model, Lora(r=2))
    with pytest.raises(ValueError, match="merge the adapter"):
        save(model, build_tokenizer(), tmp_path / "m", CARD)
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------------- damaged


@pytest.mark.parametrize("name", ["model.safetensors", "latent.safetensors"])
def test_a_truncated_file_is_named_with_what_to_do(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    refused(folder, f"{name}: damaged or truncated.*restore the file")


@pytest.mark.parametrize("name", ["model.safetensors", "latent.safetensors", "config.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, f"{name}: missing")


def test_a_missing_folder_is_named(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such model folder")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.safetensors", "model.layers.0.self_attn.q_proj.weight"),
        ("latent.safetensors", "recurrent_filter.norm.weight"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_named(folder, file, name):
    tensors = load_file(folder / file)
    for changed, problem in (
        ({k: v for k, v in tensors.items() if k != name}, f"{file}: 1 missing tensors: {name}"),
        (tensors | {"surplus": torch.zeros(2)}, f"{file}: 1 unexpected tensors: surplus"),
        (tensors | {name: torch.zeros(3, 3)}, file),
    ):
        save_file(changed, folder / file, {"format": "pt"})
        refused(folder, problem)


def edit_config(folder: Path, **keys: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | keys))
    (folder / SUMS).unlink()


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\).*source: gguf"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_weights_of_another_kind_are_refused_in_one_line(folder, keys, problem):
    edit_config(folder, **keys)
    refused(folder, rf"config\.json: .*{problem}")


def test_an_unknown_model_is_refused_whatever_kernel_it_asks_for(folder):
    edit_config(folder, model_type="nonsense", attn_implementation="eager")
    refused(folder, r"do not fit config\.json")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_that_a_folder_asks_for_is_left_out(folder, key):
    expected = loaded(folder)
    edit_config(folder, **{key: "flash_attention_2"})
    again = loaded(folder)
    assert same_weights(again, expected)
    assert again.base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gpt2", "transformer.h.1.attn.causal_mask"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_masks_and_tables_of_old_files_are_no_weights(tmp_path, architecture, name):
    model = write(tmp_path / "m", architecture)
    file = tmp_path / "m" / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(1, 1, 4, 4)}, file, {"format": "pt"})
    (tmp_path / "m" / SUMS).unlink()
    assert same_weights(loaded(tmp_path / "m"), model)


def test_pickled_weights_are_never_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pickled weights")


def test_unknown_and_missing_latent_settings_are_refused(folder):
    content = json.loads((folder / "latent.json").read_text())
    (folder / "latent.json").write_text(json.dumps(content | {"surprise": 1}))
    refused(folder, r"latent\.json: unknown or missing.*surprise")
    del content["stop_id"]
    (folder / "latent.json").write_text(json.dumps(content))
    refused(folder, r"latent\.json: unknown or missing.*stop_id")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"stop_rule": "markers"}, "stop_rule: Input should be 'head', 'marker' or 'fixed'"),
        ({"special_rows": "matrix"}, "special_rows: Input should be 'embedding' or 'modules'"),
        ({"allow_rethinking": "maybe"}, "allow_rethinking: Input should be a valid boolean"),
    ],
)
def test_latent_settings_that_mean_nothing_are_refused(folder, change, problem):
    content = json.loads((folder / "latent.json").read_text())
    (folder / "latent.json").write_text(json.dumps(content | change))
    (folder / SUMS).unlink()
    refused(folder, rf"latent\.json: {problem}")


def test_a_damaged_card_is_named(folder):
    (folder / "card.json").write_text("{")
    refused(folder, r"card\.json: not readable as JSON", prompt_prefix)


def test_of_a_single_file_and_parts_the_single_file_is_read_as_by_transformers(folder):
    index = {"weight_map": {"model.norm.weight": "part.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(folder) == [folder / "model.safetensors"]
    loaded(folder)


def test_the_bound_on_latent_steps_is_saved_and_older_folders_have_none(tmp_path):
    write(tmp_path / "m", max_latent_steps=4)
    assert loaded(tmp_path / "m").settings.max_latent_steps == 4
    file = tmp_path / "m" / "latent.json"
    # What `latent.json` held before the bound was a setting of the model.
    file.write_text(
        '{"allow_rethinking": false, "continue_id": 32, "detach_stop_head": false, "end_id": 31, '
        '"recurrent_filter": "MLP", "special_rows": "embedding", "start_id": 30, "stop_id": 33, '
        '"stop_head_temperature": null}'
    )
    (tmp_path / "m" / SUMS).unlink()
    assert loaded(tmp_path / "m").settings.max_latent_steps is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"special": False}, "lacks the special tokens <START>, <END>"),
        ({"words": 26}, "<START> 28 instead of 30"),
    ],
)
def test_a_tokenizer_without_or_with_other_special_tokens_is_refused(folder, options, problem):
    build_tokenizer(**options).save_pretrained(folder)
    refused(folder, problem, load_tokenizer)


def test_a_tokenizer_pads_on_the_left_with_eos_where_it_has_no_padding(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    save(build_reasoner().float(), tokenizer, tmp_path / "m", CARD)
    read = load_tokenizer(tmp_path / "m")
    assert (read.padding_side, read.pad_token) == ("left", "<eos>")


@pytest.mark.parametrize("name", ["model.safetensors", "latent.safetensors", "tokenizer.json"])
def test_one_changed_bit_in_a_saved_file_is_refused_by_name(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-5] ^= 1
    (folder / name).write_bytes(data)
    refused(folder, name, load_tokenizer if name == "tokenizer.json" else loaded)


def test_without_its_digests_an_edited_folder_loads(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "If the edit is meant, delete SHA256SUMS")
    (folder / SUMS).unlink()
    loaded(folder)


# ----------------------------------------------------------------------------------- published


@pytest.mark.parametrize(("tied", "modules"), [(True, False), (True, True), (False, True)])
def test_the_published_format_gives_the_same_model(tmp_path, tied, modules):
    model = write(tmp_path / "m", tied=tied, modules=modules)
    to_published_format(tmp_path / "m", model, binary_head_temp=1.5)
    again = loaded(tmp_path / "m")
    assert again.settings == dataclasses.replace(
        model.settings, allow_rethinking=True, stop_head_temperature=1.5
    )
    state = dict(model.named_parameters())
    assert all(torch.equal(p, state[name]) for name, p in again.named_parameters())
    load_tokenizer(tmp_path / "m")
    assert again(*pad(ROWS)).last_hidden.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"recurrent_filter_mode": "linear"}, "'linear' is not supported"),
        ({"add_latent_to_end": True}, "add_latent_to_end"),
        ({"brand_new": 1}, "unknown settings brand_new"),
        ({"stop_token_id": None}, "stop_token_id missing"),
    ],
)
def test_published_settings_that_are_not_supported_are_refused(tmp_path, changes, problem):
    to_published_format(tmp_path / "m", write(tmp_path / "m"), **changes)
    refused(tmp_path / "m", f"config.json: .*{problem}")


@pytest.mark.parametrize("keys", [{"model_type": "nonsense"}, {"model_type": "clip"}])
def test_a_published_model_of_no_known_kind_is_refused(tmp_path, keys):
    to_published_format(tmp_path / "m", write(tmp_path / "m"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | keys))
    refused(tmp_path / "m", r"do not fit config\.json")


def test_a_published_file_with_a_missing_tensor_is_refused(tmp_path):
    to_published_format(tmp_path / "m", write(tmp_path / "m"))
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("_base_model.model.norm.weight")
    save_file(tensors, file)
    refused(tmp_path / "m", r"1 missing tensors: model\.norm\.weight")


@pytest.mark.parametrize("tied", [True, False])
def test_published_names_go_both_ways(tied):
    model = build_reasoner(tied=tied, modules=True)
    names = list(model.state_dict())
    assert [our_name(published_name(name)) for name in names] == names
    row = "special_rows.stop.weight" if tied else "special_rows.stop_out.weight"
    assert published_name(row) == ("_stop_embed.weight" if tied else "_stop_embed_out.weight")
    assert published_name("base.model.norm.weight") == "_base_model.model.norm.weight"
