"""The attention source through latent SFT and RL with a fixed number of latent steps."""

import pandas
import pytest
import torch
import yaml

from latent_reasoning.config import ConfigError, load
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.__main__ import main as prepare_data
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.model.folder import load as load_model
from latent_reasoning.model.folder import load_tokenizer, save
from latent_reasoning.model.generation import generate
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.__main__ import main as reinforce
from latent_reasoning.sft.__main__ import main as fine_tune
from tests.model.models import build_base

TRAINING = {"steps": 2, "batch_size": 4, "validate_every": 2, "select": "last"}
ATTENTION = {
    "stage": "latent_sft",
    "training": TRAINING,
    "model": {"recurrent_filter": "attention", "stop_rule": "fixed"},
    "mask_latent_labels": True,
    "latent_steps": {"min": 3, "max": 3},
}
POLICY = {"stage": "rl", "from": "attention", "max_new_tokens": 6, "training": TRAINING}
EXPERIMENT = {
    "experiment": "tiny",
    "data": {
        "sft_share": 0.5,
        "generated": {"train": 30, "validation": 3, "test": 3}
        | {"max_steps": 2, "step_weights": [1, 1], "modulus": 3},
    },
    "models": {
        "attention": ATTENTION,
        "attention-rl": POLICY | {"max_latent_steps": 3},
        "unbounded": POLICY,
    },
    "tracking": {"enabled": False, "log_every": 1},
    "runtime": {"device": "cpu"},
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_is_trained_by_latent_sft_and_then_by_rl(architecture, tmp_path, monkeypatch):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(EXPERIMENT))
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "results"))
    layout = Layout.of(load(config))
    prepare_data(["--config", str(config)])
    tokenizer = build_tokenizer(generated_texts(3))
    base = build_base(architecture, vocabulary=len(tokenizer)).float()
    save(LatentReasoner(base, None), tokenizer, layout.model("base", 0), card={"model": "base"})
    arguments = ["--config", str(config), "--seed", "0", "--model"]
    before = None
    for name, train in (("attention", fine_tune), ("attention-rl", reinforce)):
        train([*arguments, name])
        folder = layout.model(name, 0)
        model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
        assert model.settings.max_latent_steps == 3
        weight = model.recurrent_filter.output.weight
        assert before is None or not torch.equal(weight, before)
        before = weight
        curves = pandas.read_csv(folder / "training.csv")
        assert curves["loss"].notna().all()
        assert curves["validation_reasoning_tokens"].dropna().tolist() == [5]
        (written,) = generate(
            model,
            [[5, 6, model.settings.start_id]],
            max_new_tokens=8,
            eos_id=tokenizer.eos_token_id,
            batch_size=1,
        )
        assert written.latent_steps == 3
    with pytest.raises(ConfigError, match=r"models.unbounded.max_latent_steps"):
        reinforce([*arguments, "unbounded"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_latent_labels": False}, "stop_rule"),
        ({"latent_steps": {"min": 2, "max": 3}}, "stop_rule"),
        ({"filter_warm_start": 5}, "filter_warm_start"),
        ({"step_decoder": {}}, "step_decoder: the filter attention reads more than one state"),
    ],
)
def test_what_it_cannot_do_is_refused(changes, message, tmp_path):
    config = tmp_path / "tiny.yaml"
    content = EXPERIMENT | {"models": {"attention": ATTENTION | changes}}
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message):
        load(config)
