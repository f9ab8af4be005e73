"""CoLaR end to end on a tiny generated experiment: SFT, RL, another speed."""

from __future__ import annotations

import json

import pytest
import yaml
from safetensors.torch import load_file

from latent_reasoning.base.__main__ import main as make_base
from latent_reasoning.config import ConfigError
from latent_reasoning.data.__main__ import main as prepare_data
from latent_reasoning.evaluation.__main__ import main as evaluate
from latent_reasoning.model import load
from latent_reasoning.model.folder import load_tokenizer, read_settings
from latent_reasoning.rivals.__main__ import main as make_rival

TRAINING = {"steps": 2, "batch_size": 8, "learning_rate": 1e-3, "validate_every": 2}
COLAR = {
    "stage": "teacher_forced",
    "method": "colar",
    "training": TRAINING,
    "model": {"recurrent_filter": "gaussian"},
    "colar": {"speeds": [1, 2], "speed": 2, "speed_text": " at {speed}"},
}
POLICY = {
    "stage": "policy",
    "method": "colar",
    "from": "colar",
    "training": TRAINING | {"batch_size": 2},
    "group_size": 2,
    "max_new_tokens": 8,
    "max_latent_steps": 4,
    "kl_weight": 0.0,
}
EXPERIMENT = {
    "experiment": "tiny",
    "data": {
        "generated": {"train": 60, "validation": 4, "test": 4}
        | {"max_steps": 3, "step_weights": [1, 1, 1]}
    },
    "base": {
        "architecture": {"hidden_size": 16, "intermediate_size": 24},
        "training": TRAINING,
    },
    "models": {
        "colar": COLAR,
        "colar-lora": COLAR | {"lora": {"r": 2}},
        "wrong": COLAR | {"model": {"recurrent_filter": "SRE"}},
        "endless": COLAR | {"model": {"recurrent_filter": "gaussian", "stop_rule": "fixed"}},
        "colar-at-1": {"stage": "decode", "method": "colar", "from": "colar", "speed": 1},
        "sampled": {
            "stage": "decode",
            "method": "colar",
            "from": "colar",
            "latent_noise": 1.0,
            "noise_seed": 4,
        },
        "cot-sft": {"stage": "sft", "training": TRAINING},
        "no-speed": {"stage": "decode", "method": "colar", "from": "base"},
        "colar-rl": POLICY,
        "with-kl": POLICY | {"kl_weight": 0.1},
    },
    "evaluation": {"max_new_tokens": 8, "max_forced_steps": 2},
    "runtime": {"device": "cpu"},
    "tracking": {"enabled": False},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prepared data, the base model and CoLaR SFT, and how to make other models."""
    folder = tmp_path_factory.mktemp("world")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(EXPERIMENT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_REASONING_RESULTS", str(folder / "results"))
        prepare_data(["--config", str(config)])
        make_base(["--config", str(config)])

        def make(name: str):
            make_rival(["--config", str(config), "--model", name])
            return folder / "results" / "tiny" / "models" / name / "seed-0"

        make.config, make.results = str(config), folder / "results" / "tiny"
        make.colar = make("colar")
        yield make


def test_a_trained_model_says_its_speed_in_the_prompt(world):
    settings = read_settings(world.colar)
    assert settings.suffix == " at 2"
    assert settings.recurrent_filter == "gaussian"
    assert load(world.colar, "cpu").recurrent_filter.embedding_std > 0
    assert json.loads((world.colar / "card.json").read_text())["stage"] == "teacher_forced"


def test_an_adapter_is_merged(world):
    assert read_settings(world("colar-lora")).speed == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", r"models.wrong.model.recurrent_filter: SRE"),
        ("endless", r"models.endless.model.stop_rule: fixed"),
        ("no-speed", r"models.no-speed.from: base has no speed"),
        ("with-kl", r"models.with-kl.kl_weight: 0.1"),
    ],
)
def test_what_colar_cannot_do_is_refused(world, name, message):
    with pytest.raises(ConfigError, match=message):
        world(name)


def test_another_speed_is_the_same_weights_with_other_settings(world):
    folder = world("colar-at-1")
    assert read_settings(folder).suffix == " at 1"
    for name in ("model.safetensors", "latent.safetensors", "tokenizer.json"):
        assert (folder / name).samefile(world.colar / name)
    assert json.loads((folder / "card.json").read_text())["selection"] == "the weights of colar"
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(world.colar).get_vocab()
    assert (world.results / "models" / "colar-at-1" / "seed-0.sha256").is_file()


def test_sampled_latents_are_evaluated_and_forced(world):
    world("sampled")
    evaluate(["--config", world.config, "--model", "sampled", "--dataset", "validation"])
    folder = world.results / "evaluations" / "sampled" / "seed-0" / "validation"
    assert len((folder / "forced.csv").read_text().splitlines()) == 4


def test_rl_starts_from_sft_and_keeps_its_speed(world):
    folder = world("colar-rl")
    settings = read_settings(folder)
    assert (settings.suffix, settings.max_latent_steps) == (" at 2", 4)
    before, after = (load_file(f / "latent.safetensors") for f in (world.colar, folder))
    assert any(not before[name].equal(after[name]) for name in before)
