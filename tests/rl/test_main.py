"""The stage: from rows and a parent's folder to a model folder, also through a kill."""

import json

import pandas
import pytest
import torch
import yaml

from latent_reasoning.config import ConfigError, load
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.rows import row_lines
from latent_reasoning.model.folder import load as load_model
from latent_reasoning.model.folder import save
from latent_reasoning.rl.__main__ import main
from latent_reasoning.rl.task import AdaptiveLengthTask
from tests.rl.conftest import generated_rows, latent_tokenizer, special_ids

EXPERIMENT = {
    "experiment": "tiny",
    "data": {"generated": {"max_steps": 2, "step_weights": [1, 1], "modulus": 3}},
    "tracking": {"enabled": False, "log_every": 1},
    "runtime": {"device": "cpu", "checkpoint_every": 2},
    "stages": {
        "rl": {
            "from": "latent",
            "group_size": 4,
            "max_new_tokens": 6,
            "max_latent_steps": 3,
            "training": {"steps": 4, "batch_size": 4, "validate_every": 4, "select": "last"},
        }
    },
    "models": {
        "latent": {"stage": "latent_sft", "training": {"steps": 1}},
        "full": {"stage": "rl"},
        "lora": {
            "stage": "rl",
            "save": "adapter",
            "lora": {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": ["q_proj", "up_proj"]},
        },
    },
}


@pytest.fixture
def stage(tmp_path, monkeypatch, reasoner):
    """Run the stage in a results folder that holds its inputs; returns the model's folder."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(EXPERIMENT))
    tokenizer = latent_tokenizer(3)

    def run(model: str, results: str, architecture: str = "llama") -> Layout:
        monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / results))
        layout = Layout.of(load(config))
        if not layout.data("rl").exists():
            layout.data("rl").parent.mkdir(parents=True)
            made = generated_rows(8, 3, max_steps=2, modulus=3)
            for split, rows in zip(("rl", "validation"), made, strict=True):
                layout.data(split).write_text("".join(row_lines(rows)))
            ids = special_ids(tokenizer)
            parent = reasoner(architecture, vocabulary=len(tokenizer), special=ids).float()
            save(parent, tokenizer, layout.model("latent", 0), card={"model": "latent"})
        main(["--config", str(config), "--model", model, "--seed", "0"])
        return layout

    return run


def weights(layout: Layout, model: str) -> dict[str, torch.Tensor]:
    return load_model(layout.model(model, 0), device="cpu").state_dict()


@pytest.mark.parametrize("model", ["full", "lora"])
def test_a_killed_run_ends_with_bitwise_the_weights_of_one_never_killed(stage, monkeypatch, model):
    expected = weights(stage(model, "whole"), model)
    sample, rounds = AdaptiveLengthTask._sample, []

    def killed(self, round_: int):
        rounds.append(round_)
        if round_ == 3 and rounds.count(3) == 1:
            raise KeyboardInterrupt
        return sample(self, round_)

    monkeypatch.setattr(AdaptiveLengthTask, "_sample", killed)
    with pytest.raises(KeyboardInterrupt):
        stage(model, "killed")
    resumed = weights(stage(model, "killed"), model)
    assert rounds == [0, 1, 2, 3, 2, 3]
    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name


def test_the_folder_holds_model_card_curves_and_adapter(stage):
    layout = stage("lora", "results")
    folder = layout.model("lora", 0)
    card = json.loads((folder / "card.json").read_text())
    assert (card["stage"], card["parent"], card["seed"]) == ("rl", "latent", 0)
    assert load_model(folder, device="cpu").settings.max_latent_steps == 3
    assert set(card["data_digests"]) == {"rl", "validation"}
    assert card["metrics"]["steps_run"] == 4
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    curves = pandas.read_csv(folder / "training.csv")
    assert curves["step"].tolist() == [1, 2, 3, 4]
    for column in ("loss", "reward", "reasoning_tokens", "kl", "all_correct_share", "clip_share"):
        assert curves[column].notna().all()
    assert curves["kl"][0] == 0
    assert curves["validation_accuracy"].notna().tolist() == [False, False, False, True]


def test_without_the_base_s_own_dropout_the_policy_begins_as_its_reference(stage):
    """GPT-2 has a dropout of 0.1, as its configuration says."""
    layout = stage("full", "results", "gpt2")
    curves = pandas.read_csv(layout.model("full", 0) / "training.csv")
    assert curves["kl"][0] == pytest.approx(0, abs=1e-9)
    assert load_model(layout.model("full", 0), device="cpu").base.config.attn_pdrop == 0.1


def test_completions_past_the_last_position_are_refused_before_training(stage, monkeypatch):
    monkeypatch.setattr("latent_reasoning.model.reasoner.position_limit", lambda base: 12)
    with pytest.raises(ConfigError, match=r"models\.full\.max_new_tokens: 6 after a prompt of"):
        stage("full", "results", "gpt2")


def test_another_stage_s_entry_is_refused(stage):
    with pytest.raises(ConfigError, match=r"latent\.stage: is latent_sft"):
        stage("latent", "results")
