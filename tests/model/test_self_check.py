"""The self-check: its verdict on families of models, and what it finds when a fault is put in."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora import Linear
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel

from latent_reasoning.model import reasoner, self_check, special_rows
from latent_reasoning.model.bases import UnsupportedBaseError
from latent_reasoning.model.cache import GrowingCache
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.self_check import SelfCheckError, check_model, check_reading
from latent_reasoning.model.state import ReasoningState
from tests.model.families import (
    COMMON,
    FAMILIES,
    LLAMA,
    WITHOUT_CACHE,
    build_family,
    family_reasoner,
)

OTHERS = {
    "BERT": ("bert", LLAMA),
    "BART": (
        "bart",
        COMMON
        | {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 24},
    ),
    "OPT-350m": ("opt", LLAMA | {"ffn_dim": 24, "word_embed_proj_dim": 8, "pad_token_id": 1}),
    "Gemma 3 with vision": (
        "gemma3",
        {
            "text_config": LLAMA | {"head_dim": 4, "pad_token_id": 0},
            "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        },
    ),
}


def build(name: str) -> PreTrainedModel:
    if name not in OTHERS:
        return build_family(name)
    torch.manual_seed(0)
    kind, keys = OTHERS[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys)).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_works_passes(name):
    check_model(LatentReasoner(build(name), None))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"recurrent_filter": "mixture"},
        {"recurrent_filter": "mixture", "mixture_size": 3},
        {"recurrent_filter": "attention"},
        {"recurrent_filter": "gaussian"},
        {"stop_rule": "marker", "marker_id": 5},
        {"stop_rule": "fixed", "max_latent_steps": 2},
    ],
    ids=str,
)
def test_models_of_every_method_pass(settings, large, monkeypatch):
    if large:
        monkeypatch.setattr(self_check, "WHOLE_PARAMETERS", 0)
        monkeypatch.setattr(self_check, "BLOCKS", 1)
    check_model(family_reasoner("Llama", **settings))


@pytest.mark.parametrize("name", WITHOUT_CACHE)
def test_a_base_without_keys_and_values_is_refused_in_one_line(name):
    with pytest.raises(UnsupportedBaseError, match=r"keep no keys and values.*docs/bases\.md"):
        LatentReasoner(build(name), None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BERT", "it does more between its last state and its logits"),
        ("BART", "reading prompts of unlike length: .* it counts padding"),
        ("OPT-350m", "its layers' states are not 3 of one size"),
        ("Gemma 3 with vision", "reads more than text"),
    ],
)
def test_a_base_that_is_made_otherwise_is_refused_in_one_line(name, reason):
    with pytest.raises((SelfCheckError, UnsupportedBaseError), match=reason) as caught:
        check_model(LatentReasoner(build(name), None))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------- faults put in on purpose


def counting_columns(base, inputs_embeds, positions, mask, cache, prefix=None, **options):
    """Positions that count padding, as columns do."""
    columns = torch.arange(mask.shape[1])[-inputs_embeds.shape[1] :].expand_as(positions)
    return RUN_BLOCKS(base, inputs_embeds, columns, mask, cache, prefix, **options)


def forgetting(base, inputs_embeds, positions, mask, cache, prefix=None, **options):
    """What was read before is not kept."""
    mask = mask[:, -inputs_embeds.shape[1] :]
    kept = None if cache is None else GrowingCache()
    return RUN_BLOCKS(base, inputs_embeds, positions, mask, kept, prefix, **options)


RUN_BLOCKS = reasoner.run_blocks
FAULTS: dict[str, tuple[str, tuple, str]] = {
    "embeddings without their scale": (
        "Gemma 3",
        (reasoner, "scaled_rows", lambda base, rows: rows),
        "with the filter SRE, an adapter attached untrained",
    ),
    "soft re-embedding without the scale": (
        "Gemma",
        (special_rows, "scaled_rows", lambda base, rows: rows),
        "rows with unlike numbers of latent steps",
    ),
    "a window of columns": (
        "Mistral",
        (ReasoningState, "close_gaps", lambda state: None),
        "rows with unlike numbers of latent steps: .*counts empty columns",
    ),
    "distances of columns": (
        "MPT",
        (reasoner, "tokens_first", lambda mask: None),
        "rows with unlike numbers of latent steps: .*counts empty columns",
    ),
    "positions that count padding": (
        "GPT-2",
        (reasoner, "run_blocks", counting_columns),
        "reading prompts of unlike length: .*it counts padding",
    ),
    "a dropped cache": (
        "Qwen 2",
        (reasoner, "run_blocks", forgetting),
        "reading on from the cache: .*does not keep what it has read",
    ),
    "logits that are not capped": (
        "Gemma 2",
        (special_rows, "adjusted_logits", lambda base, logits: logits),
        "reading a text",
    ),
    "stop logits that are not scaled": (
        "Cohere",
        (reasoner, "adjusted_logits", lambda base, logits: logits),
        "rows with unlike numbers of latent steps",
    ),
    "an adapter that is not merged": (
        "Llama",
        (Linear, "merge", lambda layer: None),
        "an adapter merged: .*do not take the adapter's",
    ),
    "an adapter that is not saved whole": (
        "Pythia",
        (self_check, "load_adapter", lambda model, folder: None),
        "an adapter saved and loaded",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault, monkeypatch):
    name, patch, reason = FAULTS[fault]
    model = LatentReasoner(build(name), None)
    if "re-embedding" in fault:
        model = family_reasoner(name, recurrent_filter="SRE")
    monkeypatch.setattr(*patch)
    with pytest.raises(SelfCheckError, match=f"{type(model.base).__name__} fails .*{reason}"):
        check_model(model)


def test_rows_of_untied_matrices_that_have_no_module_are_kept(monkeypatch):
    """Soft re-embedding reads CONTINUE's and STOP's input rows: zeroing them is a fault."""

    def zeroing(base, special):
        rows = EXTRACT_ROWS(base, special)
        with torch.no_grad():
            base.get_input_embeddings().weight[[special.continue_id, special.stop_id]] = 0
        return rows

    monkeypatch.setattr(special_rows, "extract_rows", zeroing)
    with pytest.raises(SelfCheckError, match="an adapter attached untrained"):
        check_model(LatentReasoner(build("Llama"), None))


def test_a_bias_of_the_head_counts_beside_the_special_rows_too(monkeypatch):
    def without_bias(base, special, rows, hidden):
        logits = VOCABULARY_LOGITS(base, special, rows, hidden)
        if rows is not None:
            logits[..., special.start_id] -= base.get_output_embeddings().bias[special.start_id]
        return logits

    monkeypatch.setattr(reasoner, "vocabulary_logits", without_bias)
    with pytest.raises(SelfCheckError, match="an adapter attached untrained"):
        check_model(LatentReasoner(build("Phi"), None))


EXTRACT_ROWS, VOCABULARY_LOGITS = special_rows.extract_rows, reasoner.vocabulary_logits


# ------------------------------------------------------------------------------------ how it is run


@pytest.mark.parametrize("settings", [None, {}, {"recurrent_filter": "SRE"}])
@pytest.mark.parametrize("large", [False, True])
def test_it_changes_neither_the_model_nor_the_random_state(settings, large, monkeypatch):
    if large:
        monkeypatch.setattr(self_check, "WHOLE_PARAMETERS", 0)
        monkeypatch.setattr(self_check, "BLOCKS", 1)
    model = family_reasoner("Gemma 2", **(settings or {}))
    if settings is None:
        model = LatentReasoner(model.base, None)
    elif settings == {}:
        model.move_special_rows("modules")
    model.train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_model(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.base.config.num_hidden_layers == len(model.base.model.layers) == 2


@pytest.mark.parametrize(("check", "forwards"), [(check_model, 50), (check_reading, 8)])
def test_its_cost_is_bounded(check, forwards):
    """Forwards of a few short rows, whatever the base's size; those of copies are counted too."""
    base, widths = build("GPT-2"), []
    base.transformer.drop.register_forward_pre_hook(
        lambda _, arguments: widths.append(arguments[0].shape[1])
    )
    check(base if check is check_reading else LatentReasoner(base, None))
    assert 0 < len(widths) <= forwards
    assert max(widths) <= 13


def test_a_model_that_gives_no_numbers_is_refused_as_damaged():
    base = build("GPT-2")
    with torch.no_grad():
        base.transformer.ln_f.weight[3] = float("nan")
    with pytest.raises(SelfCheckError, match=r"reading a text: .* no numbers: damaged weights"):
        check_model(LatentReasoner(base, None))


def test_an_error_on_the_way_is_a_verdict_too(monkeypatch):
    def broken(*arguments, **options):
        raise IndexError("list index out of range")

    monkeypatch.setattr(GPT2LMHeadModel, "forward", broken)
    with pytest.raises(SelfCheckError, match="ended with IndexError: list index out of range; cho"):
        check_model(LatentReasoner(build("GPT-2"), None))
