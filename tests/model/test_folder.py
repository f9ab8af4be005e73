"""Model folders: what is saved is what is loaded, and anything damaged is refused."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from latent_reasoning.config import Lora
from latent_reasoning.model import load
from latent_reasoning.model.folder import load_tokenizer, save
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.published import SETTINGS_KEY, our_name, published_name
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.tensors import CheckpointError
from latent_reasoning.runtime.files import SUMS
from tests.model.models import (
    ARCHITECTURES,
    CONTINUE,
    END,
    START,
    STOP,
    build_base,
    build_reasoner,
    build_tokenizer,
    pad,
)

CARD = {"model": "tiny", "stage": "test", "seed": 3, "licence": {"weights": "mit", "data": None}}
ROWS = [[5, 6, START, CONTINUE, CONTINUE, STOP, 7]]


def write(folder, architecture="llama", tied=True, modules=False, **settings) -> LatentReasoner:
    """Save a tiny latent model in float32; transformers' own norms, as a folder has them."""
    model = build_reasoner(architecture, tied, modules, **settings).float()
    save(model, build_tokenizer(), folder, CARD)
    return model


def published_folder(folder, tied=True, modules=False, **changes):
    """The same kind of model in the published format; `changes` go to its settings."""
    model = write(folder, tied=tied, modules=modules)
    config = json.loads((folder / "config.json").read_text())
    config[SETTINGS_KEY] = {
        "start_token_id": START,
        "end_token_id": END,
        "continue_token_id": CONTINUE,
        "stop_token_id": STOP,
        "recurrent_filter_mode": "MLP",
        "binary_head_temp": None,
        "detach_binary_head_inputs": False,
        "lora_mode": modules,
        "add_latent_to_end": False,
        "disable_something": True,
        "debug_mode": False,
        "unused_token_ids": [34],
    } | changes
    config["architectures"] = ["LatentThinkingModel"]
    (folder / "config.json").write_text(json.dumps(config))
    state = {published_name(n): p.detach().clone() for n, p in model.named_parameters()}
    save_file(state, folder / "model.safetensors")
    for name in ("latent.json", SUMS):
        (folder / name).unlink()
    (folder / "latent.safetensors").unlink()
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("tied", "modules"), [(True, False), (False, True)])
def test_a_saved_model_is_loaded_to_the_last_bit(tmp_path, architecture, tied, modules):
    model = write(tmp_path / "m", architecture, tied, modules, stop_head_temperature=2.0)
    again = load(tmp_path / "m", device="cpu")
    assert again.settings == model.settings
    assert not again.training
    state = model.state_dict()
    assert list(again.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("recurrent_filter", ["none", "linear", "linear_ln", "linear_ECF", "SRE"])
def test_every_filter_is_saved_and_loaded(tmp_path, recurrent_filter):
    model = write(tmp_path / "m", recurrent_filter=recurrent_filter)
    again = load(tmp_path / "m", device="cpu")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_plain_transformers_reads_the_folder_too(tmp_path):
    model = write(tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(plain).__name__ == "LlamaForCausalLM"
    own = model.base.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in plain.state_dict().items())


def test_a_plain_folder_is_a_model_that_cannot_think(tmp_path):
    base = build_base().float()
    save(LatentReasoner(base, None), build_tokenizer(special=False), tmp_path / "m", CARD)
    model = load(tmp_path / "m", device="cpu")
    assert model.settings is None
    assert not (tmp_path / "m" / "latent.json").exists()
    load_tokenizer(tmp_path / "m")


def test_the_card_is_written_for_programs_and_people(tmp_path):
    write(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "card.json").read_text()) == CARD
    text = (tmp_path / "m" / "README.md").read_text()
    assert "| Seed | 3 |" in text
    assert "| Licence of the weights | mit |" in text


def test_an_attached_adapter_has_to_be_merged_before_saving(tmp_path):
    model = build_reasoner()
    attach_lora(model, Lora(r=2))
    with pytest.raises(ValueError, match="merge the adapter"):
        save(model, build_tokenizer(), tmp_path / "m", CARD)
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------------- damaged


@pytest.mark.parametrize("name", ["model.safetensors", "latent.safetensors"])
def test_a_truncated_file_is_named_with_what_to_do(tmp_path, name):
    write(tmp_path / "m")
    file = tmp_path / "m" / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{name}: damaged or truncated.*restore the file"):
        load(tmp_path / "m", device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "latent.safetensors", "config.json"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        load(tmp_path / "m", device="cpu")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such model folder"):
        load(tmp_path / "nowhere", device="cpu")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.safetensors", "model.layers.0.self_attn.q_proj.weight"),
        ("latent.safetensors", "recurrent_filter.norm.weight"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path, file, name):
    write(tmp_path / "m")
    path = tmp_path / "m" / file
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{file}: 1 missing tensors: {name}"):
        load(tmp_path / "m", device="cpu")
    save_file(tensors | {"surplus": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{file}: 1 unexpected tensors: surplus"):
        load(tmp_path / "m", device="cpu")
    save_file(tensors | {name: torch.zeros(3, 3)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=file):
        load(tmp_path / "m", device="cpu")


def test_pickled_weights_are_never_loaded(tmp_path):
    write(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights"):
        load(tmp_path / "m", device="cpu")


def test_unknown_latent_settings_are_refused(tmp_path):
    model = write(tmp_path / "m")
    content = dataclasses.asdict(model.settings) | {"surprise": 1}
    (tmp_path / "m" / "latent.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"latent\.json: unknown or missing.*surprise"):
        load(tmp_path / "m", device="cpu")


def test_a_tokenizer_without_the_special_tokens_is_refused(tmp_path):
    write(tmp_path / "m")
    build_tokenizer(special=False).save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"lacks the special tokens <START>, <END>"):
        load_tokenizer(tmp_path / "m")


def test_a_tokenizer_with_other_ids_is_refused(tmp_path):
    write(tmp_path / "m")
    build_tokenizer(words=26).save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="<START> 28 instead of 30"):
        load_tokenizer(tmp_path / "m")


def test_a_tokenizer_pads_on_the_left_with_eos_where_it_has_no_padding(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    save(build_reasoner().float(), tokenizer, tmp_path / "m", CARD)
    loaded = load_tokenizer(tmp_path / "m")
    assert (loaded.padding_side, loaded.pad_token) == ("left", "<eos>")


# ----------------------------------------------------------------------------------- published


@pytest.mark.parametrize(("tied", "modules"), [(True, False), (True, True), (False, True)])
def test_the_published_format_gives_the_same_model(tmp_path, tied, modules):
    model = published_folder(tmp_path / "m", tied, modules, binary_head_temp=1.5)
    again = load(tmp_path / "m", device="cpu")
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
    ],
)
def test_published_settings_that_are_not_supported_are_refused(tmp_path, changes, problem):
    published_folder(tmp_path / "m", **changes)
    with pytest.raises(CheckpointError, match=f"config.json: .*{problem}"):
        load(tmp_path / "m", device="cpu")


def test_a_published_file_with_a_missing_tensor_is_refused(tmp_path):
    published_folder(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("_base_model.model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"1 missing tensors: model\.norm\.weight"):
        load(tmp_path / "m", device="cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_published_names_go_both_ways(tied):
    model = build_reasoner(tied=tied, modules=True)
    names = list(model.state_dict())
    assert [our_name(published_name(name)) for name in names] == names
    row = "special_rows.stop.weight" if tied else "special_rows.stop_out.weight"
    assert published_name(row) == ("_stop_embed.weight" if tied else "_stop_embed_out.weight")
    assert published_name("base.model.norm.weight") == "_base_model.model.norm.weight"


@pytest.mark.parametrize("name", ["model.safetensors", "latent.safetensors", "tokenizer.json"])
def test_one_changed_bit_in_a_saved_file_is_refused_by_name(tmp_path, name):
    write(tmp_path / "m")
    file = tmp_path / "m" / name
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    reader = load_tokenizer if name == "tokenizer.json" else load
    with pytest.raises(CheckpointError, match=name):
        reader(tmp_path / "m")


def test_without_its_digests_an_edited_folder_loads(tmp_path):
    write(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="If the edit is meant, delete SHA256SUMS"):
        load(tmp_path / "m", device="cpu")
    (tmp_path / "m" / SUMS).unlink()
    load(tmp_path / "m", device="cpu")
