"""The stages base and SFT end to end on a tiny generated experiment."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from latent_reasoning.base.__main__ import main as make_base
from latent_reasoning.config import ConfigError, Data, digest
from latent_reasoning.config import load as read_config
from latent_reasoning.data.__main__ import main as prepare_data
from latent_reasoning.data.rows import DataError
from latent_reasoning.model import load
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime.device import Machine
from latent_reasoning.runtime.parallel import ALONE
from latent_reasoning.sft import start
from latent_reasoning.sft.__main__ import main as fine_tune
from latent_reasoning.training.run import TrainingRun
from tests.model.models import build_base
from tests.rl.conftest import latent_tokenizer

SIZES = {"train": 60, "validation": 4, "test": 4}
TRAINING = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "validate_every": 2}
LATENT = {"stage": "latent_sft", "training": TRAINING, "distillation": {"codi_weight": 1.0}}
EXPERIMENT = {
    "experiment": "tiny",
    "data": {"generated": SIZES | {"max_steps": 3, "step_weights": [1, 1, 1]}},
    "base": {
        "architecture": {"hidden_size": 16, "intermediate_size": 24},
        "texts": {"full": 0.5, "results_only": 0.5},
        "training": TRAINING,
    },
    "model": {"start_token_from": " Results:"},
    "models": {
        "cot-sft": {"stage": "sft", "form": "cot", "training": TRAINING},
        "no-cot-sft": {
            "stage": "sft",
            "form": "no_cot",
            "training": TRAINING,
            "lora": {"r": 2},
            "save": "adapter",
        },
        "latent-6": LATENT
        | {
            "teacher_texts": {"full": 0.5, "results_only": 0.5},
            "stop_label_smoothing": 0.1,
            "model": {"recurrent_filter": "SRE"},
        },
        "meaned-codi": LATENT
        | {
            "lora": {"r": 2},
            "forced_steps": 6,
            "mask_latent_labels": True,
            "model": {"detach_stop_head": True},
            "distillation": {"codi_weight": 1.0, "meaned_weight": 1.0, "block_range": [0, 0]},
        },
        "all-rows": LATENT | {"rows": "all"},
        "frozen": LATENT | {"distillation": {"codi_weight": 1.0, "teacher": "cot-sft"}},
        "again": LATENT
        | {"from": "latent-6", "model": {"recurrent_filter": "SRE", "start_token_from": None}},
        "warm-again": LATENT
        | {
            "from": "latent-6",
            "model": {"recurrent_filter": "SRE", "start_token_from": None},
            "filter_warm_start": 5,
        },
        "warm": LATENT | {"filter_warm_start": 5},
        "new-start": LATENT | {"from": "latent-6", "model": {"recurrent_filter": "SRE"}},
        "wrong-filter": LATENT | {"from": "latent-6"},
    },
    "evaluation": {"max_new_tokens": 12},
    "runtime": {"device": "cpu", "checkpoint_every": 1},
    "tracking": {"enabled": False},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The prepared data and the base model of the tiny experiment, and how to train on them."""
    folder = tmp_path_factory.mktemp("world")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(EXPERIMENT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_REASONING_RESULTS", str(folder / "results"))
        prepare_data(["--config", str(config)])
        make_base(["--config", str(config)])

        def train(name: str):
            fine_tune(["--config", str(config), "--model", name])
            return folder / "results" / "tiny" / "models" / name / "seed-0"

        train.results = folder / "results" / "tiny"
        for name in ("cot-sft", "latent-6"):
            train(name)
        yield train


def test_the_base_is_a_plain_model_with_a_card_and_its_training_curve(world):
    folder = world.results / "base" / "seed-0"
    assert load(folder, "cpu").settings is None
    card = json.loads((folder / "card.json").read_text())
    assert card["stage"] == "base"
    assert set(card["data_digests"]) == {"sft", "validation"}
    header = (folder / "training.csv").read_text().splitlines()[0]
    assert "validation_accuracy_full,validation_accuracy_results_only" in header


def test_a_latent_model_thinks_and_its_card_states_parent_selection_and_digests(world):
    folder = world.results / "models/latent-6/seed-0"
    settings = load(folder, "cpu").settings
    assert (settings.recurrent_filter, settings.allow_rethinking) == ("SRE", False)
    card = json.loads((folder / "card.json").read_text())
    assert (card["parent"], card["stage"], card["seed"]) == ("base", "latent_sft", 0)
    assert card["config_digest"] == digest(card["science"])
    assert card["selection"].startswith(f"step {card['metrics']['step']} of 4: highest greedy")
    card = json.loads((world("all-rows") / "card.json").read_text())
    assert set(card["data_digests"]) == {"sft", "rl", "validation"}


def test_all_rows_are_sft_s_where_its_share_is_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path))
    config = tmp_path / "tiny.yaml"
    config.write_text(
        yaml.safe_dump(EXPERIMENT | {"data": EXPERIMENT["data"] | {"sft_share": 1.0}})
    )
    prepare_data(["--config", str(config)])
    machine = Machine(torch.device("cpu"), ALONE)
    run = TrainingRun(read_config([str(config)]), "all-rows", 0, "", machine)
    assert len(run.training_rows(latent_tokenizer(7))) == SIZES["train"]


def test_an_adapter_is_kept_beside_the_merged_weights(world):
    folder = world("no-cot-sft")
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))


def test_an_appendix_variant_trains_with_lora_and_merges(world):
    model = load(world("meaned-codi"), "cpu")
    assert model.settings.special_rows == "embedding"
    assert model.settings.detach_stop_head
    csv = (world.results / "models/meaned-codi/seed-0/training.csv").read_text().splitlines()
    assert {"codi_loss", "meaned_loss"} <= set(csv[0].split(","))
    length = csv[0].split(",").index("validation_reasoning_tokens")
    assert csv[-1].split(",")[length] == "8.0"


def test_latent_sft_learns_from_a_frozen_teacher(world):
    folder = world("frozen")
    assert (world.results / "checkpoints/frozen/seed-0/teacher-states.npy").exists()
    header = (folder / "training.csv").read_text().splitlines()[0].split(",")
    assert "codi_loss" in header
    assert "teacher_loss" not in header


def test_latent_sft_goes_on_from_a_latent_model_of_the_same_filter(world):
    assert load(world("again"), "cpu").settings.recurrent_filter == "SRE"
    with pytest.raises(ConfigError, match=r"recurrent_filter: MLP, but latent-6 has SRE"):
        world("wrong-filter")
    with pytest.raises(ConfigError, match=r"start_token_from: ' Results:'.*set it to null here"):
        world("new-start")
    with pytest.raises(ConfigError, match=r"warm_start: 5 is for a new filter.*set it to 0 here"):
        world("warm-again")


def test_a_filter_that_begins_as_soft_re_embedding_says_how_well_it_does(world, capsys):
    world("warm")
    said = r"warm: the filter begins as soft re-embedding; [\d.e+-]+ of the variance is left"
    assert re.search(said, capsys.readouterr().err)


def test_missing_rows_are_named(world, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path))
    with pytest.raises(DataError, match=r"sft\.jsonl: no such file"):
        world("cot-sft")


def test_rows_past_the_last_position_are_refused_with_the_key_that_allows_them():
    model = LatentReasoner(build_base("gpt2"), None)
    start.check_positions(model, 64, Data(max_tokens=100))
    problem = r"data\.max_tokens: 100 is more than the 64 positions .* 65 tokens; set it to 64"
    with pytest.raises(ConfigError, match=problem):
        start.check_positions(model, 65, Data(max_tokens=100))
