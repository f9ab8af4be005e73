"""Soft Thinking, Latent-SFT, CSFT and MTS end to end, on a tiny Llama and a tiny GPT-2."""

from __future__ import annotations

import csv
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from latent_reasoning.base.__main__ import main as make_base
from latent_reasoning.config import ConfigError
from latent_reasoning.config.mixtures import Csft
from latent_reasoning.data.__main__ import main as prepare_data
from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import Row, read_rows
from latent_reasoning.data.sequences import encode_prompts
from latent_reasoning.model.folder import load, load_tokenizer, save
from latent_reasoning.model.generation import generate
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.soft_thinking import SoftThinker
from latent_reasoning.rivals import csft
from latent_reasoning.rivals.__main__ import main as train_rival
from latent_reasoning.sft.__main__ import main as fine_tune

SIZES = {"train": 60, "validation": 4, "test": 4}
TRAINING = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "validate_every": 3}
FORCED = {"stage": "teacher_forced", "training": TRAINING}
CSFT = FORCED | {
    "method": "csft",
    "model": {"recurrent_filter": "mixture", "mixture_size": None},
    "csft": {"steps": 3, "teacher": "cot-sft", "traces": 2},
}
DECODE = {"stage": "decode", "method": "soft_thinking", "from": "cot-sft"}
MTS = {"stage": "policy", "method": "mts", "from": "csft", "training": TRAINING}
MTS |= {"group_size": 4, "max_new_tokens": 12, "kl_weight": 0.0, "loss": "grpo"}
MODELS = {
    "cot-sft": {"stage": "sft", "form": "cot", "training": TRAINING},
    "hard": DECODE | {"soft_thinking": {"size": 1, "sure_below": 0.0}},
    "hasty": DECODE | {"soft_thinking": {"sure_below": 100.0, "patience": 2}},
    "latent-sft": FORCED
    | {
        "method": "latent_sft",
        "model": {"recurrent_filter": "mixture", "mixture_size": 4, "stop_rule": "marker"},
        "latent_sft": {"rate": 4, "gumbel_scale": 1.0},
    },
    "latent-sft-head": FORCED | {"method": "latent_sft", "model": {"recurrent_filter": "SRE"}},
    "latent-sft-encoder": FORCED
    | {
        "method": "latent_sft",
        "model": {"recurrent_filter": "mixture", "mixture_size": 4, "stop_rule": "marker"},
        "latent_sft": {"rate": 4, "targets": "encoder", "encoder_steps": 2},
    },
    "csft": CSFT,
    "csft-own": CSFT | {"csft": {"steps": 3, "inputs": "own"}},
    "mts": MTS,
    "mts-root": MTS | {"mts": {"ratio": "root", "words": 2}, "iterations": 3},
    "no-mixture": FORCED | {"method": "latent_sft", "model": {"recurrent_filter": "MLP"}},
    "fixed": FORCED
    | {"method": "latent_sft", "model": {"recurrent_filter": "mixture", "stop_rule": "fixed"}},
    "of-latent": DECODE | {"from": "csft"},
    "mts-of-latent": MTS | {"from": "latent-sft"},
}
EXPERIMENT = {
    "experiment": "tiny",
    "data": {"generated": SIZES | {"max_steps": 2, "step_weights": [1, 1]}},
    "model": {"start_token_from": " Results:"},
    "models": MODELS,
    "evaluation": {"max_new_tokens": 12},
    "runtime": {"device": "cpu", "checkpoint_every": 3},
    "tracking": {"enabled": False},
}
SCRATCH = {"architecture": {"hidden_size": 16, "intermediate_size": 24}, "training": TRAINING}


def gpt2_base(folder):
    """A tiny random GPT-2 with the tokenizer of the generated problems."""
    tokenizer = build_tokenizer(generated_texts(7))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=16,
        n_layer=2,
        n_head=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    save(LatentReasoner(GPT2LMHeadModel(config), None), tokenizer, folder, {})
    return {"source": "local", "path": str(folder)}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def world(request, tmp_path_factory):
    """The prepared data and the base model, and how to train and decode on them."""
    folder = tmp_path_factory.mktemp(request.param)
    base = SCRATCH if request.param == "llama" else gpt2_base(folder / "gpt2")
    config = folder / "tiny.yaml"
    lora = {"r": 2} if request.param == "llama" else {"r": 2, "target_modules": ["c_attn"]}
    models = MODELS | {"latent-sft-head": MODELS["latent-sft-head"] | {"lora": lora}}
    config.write_text(yaml.safe_dump(EXPERIMENT | {"base": base, "models": models}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_REASONING_RESULTS", str(folder / "results"))
        prepare_data(["--config", str(config)])
        make_base(["--config", str(config)])
        made = {}

        def make(name: str):
            if name not in made:
                main = fine_tune if MODELS[name]["stage"] == "sft" else train_rival
                main(["--config", str(config), "--model", name])
                made[name] = make.results / "models" / name / "seed-0"
            return made[name]

        make.results = folder / "results" / "tiny"
        make("cot-sft")
        yield make


def completions(world, name: str, count: int = 4):
    """What a model writes after some validation rows."""
    folder = world(name)
    model, tokenizer = load(folder, "cpu"), load_tokenizer(folder)
    rows = read_rows(world.results / "data" / "validation.jsonl")[:count]
    latent = model.settings is not None
    prompts = encode_prompts(rows, tokenizer, prefix="Question: ", latent=latent)
    eos = tokenizer.eos_token_id
    written = generate(model, prompts, max_new_tokens=12, eos_id=eos, batch_size=2)
    return model, tokenizer, written


def columns(folder) -> list[dict[str, str]]:
    with (folder / "training.csv").open() as file:
        return list(csv.DictReader(file))


def test_mixtures_of_one_word_write_what_the_model_writes(world):
    model, _, soft = completions(world, "hard")
    assert isinstance(model, SoftThinker)
    _, _, plain = completions(world, "cot-sft")
    assert [row.ids for row in soft] == [row.ids for row in plain]


def test_a_model_that_is_sure_at_once_stops_to_think_after_its_patience(world):
    model, tokenizer, written = completions(world, "hasty")
    for row in written:
        assert tuple(row.ids[1 : 1 + len(model.how.end)]) == model.how.end
    assert " The answer is:" in tokenizer.decode(model.how.end)


def test_latent_sft_trains_on_given_mixtures_and_thinks_in_its_own(world):
    model, _, written = completions(world, "latent-sft")
    settings = model.settings
    assert (settings.recurrent_filter, settings.mixture_size) == ("mixture", 4)
    assert settings.stop_rule == "marker"
    assert all(row.stop_probabilities for row in written)
    last = columns(world("latent-sft"))[-1]
    assert float(last["loss"]) == pytest.approx(float(last["ce"]) + float(last["kl"]), rel=1e-4)


def test_latent_sft_learns_what_an_encoder_makes_of_the_chain_of_thought(world):
    world("latent-sft-encoder")
    file = world.results / "checkpoints/latent-sft-encoder/seed-0/mixtures.npz"
    with np.load(file) as content:
        assert content["ids"].shape == (content["counts"].sum(), 4)
        assert np.allclose(content["probabilities"].sum(1), 1, atol=1e-6)
        model = load(world("latent-sft-encoder"), "cpu")
        special = {model.settings.start_id, model.settings.end_id, model.settings.continue_id}
        assert not special & set(content["ids"].flatten().tolist())


def test_latent_sft_trains_an_adapter_and_the_two_way_head(world):
    model, _, _ = completions(world, "latent-sft-head")
    assert (model.settings.recurrent_filter, model.settings.stop_rule) == ("SRE", "head")


@pytest.mark.parametrize("name", ["csft", "csft-own", "mts", "mts-root"])
def test_cot2_thinks_for_the_same_number_of_steps_on_every_row(world, name):
    model, _, written = completions(world, name)
    assert (model.settings.stop_rule, model.settings.max_latent_steps) == ("fixed", 3)
    assert [row.latent_steps for row in written] == [3] * 4


def test_mts_moves_the_weights(world):
    before, after = (load(world(name), "cpu").state_dict() for name in ("csft", "mts-root"))
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert float(columns(world("mts-root"))[-1]["clip_share"]) >= 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-mixture", "recurrent_filter: MLP, but latent_sft reasons in mixtures of words"),
        ("fixed", "stop_rule: fixed, but latent_sft takes as many latent steps as a row's"),
        ("of-latent", "csft reasons in latent steps; Soft Thinking is for a model that writes"),
        ("mts-of-latent", "latent-sft does not take a fixed number of latent steps"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(world, name, message):
    world(MODELS[name].get("from", "cot-sft"))
    with pytest.raises(ConfigError, match=re.escape(message)):
        world(name)


def test_a_teacher_may_write_as_much_as_the_longest_chain_with_its_spaces(monkeypatch):
    """Sentences have a space before each, which are tokens here."""
    tokenizer = build_tokenizer(generated_texts(7))
    row, limits = Row("a", "question", ("<<1+2=3>>", "<<3+4=0>>"), "0"), []
    ((words), (spaced)) = read_pieces(tokenizer, ["".join(row.steps), " " + " ".join(row.steps)])
    assert len(spaced) > len(words)

    def samples(run, rows, after, limit):
        limits.append(limit)
        raise InterruptedError

    monkeypatch.setattr(csft, "teacher_samples", samples)
    monkeypatch.setattr(csft, "mixture_model", lambda run: (None, tokenizer))
    monkeypatch.setattr(csft, "checked_rows", lambda run, tokenizer: [row])
    run = SimpleNamespace(
        entry=SimpleNamespace(csft=Csft(teacher="cot-sft")),
        experiment=SimpleNamespace(data=SimpleNamespace(natural_language=True)),
    )
    with pytest.raises(InterruptedError):
        csft.build(run)
    assert limits == [len(spaced)]
