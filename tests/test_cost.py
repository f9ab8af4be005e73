"""The estimate of an experiment's cost, against what is known."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from latent_reasoning.config import PROJECT_ROOT, Architecture, Experiment, load, resolve
from latent_reasoning.cost import base_weights, describe, estimate, llama_weights

CONFIG = PROJECT_ROOT / "config"


def paper() -> Experiment:
    return load(CONFIG / "paper.yaml")


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_a_llama_are_counted_exactly(tied):
    shape = Architecture(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape.model_dump()))
    assert llama_weights(shape, vocabulary=50) == model.num_parameters()


@pytest.mark.parametrize(
    ("base", "weights"),
    [
        ({"source": "hub", "hub_id": "meta-llama/Llama-3.2-1B-Instruct"}, 1e9),
        ({"source": "gguf", "path": "models/SmolLM2-135M-Instruct.Q4_1.gguf"}, 135e6),
        ({"source": "hub", "hub_id": "someone/a-model-1.7b"}, 1.7e9),
        ({"source": "local", "path": "models/unnamed"}, 1e9),
    ],
)
def test_the_size_of_a_model_is_read_off_its_name(base, weights):
    models = {"sft": {"stage": "sft", "training": {"steps": 1}}}
    data = {"source": "local", "path": "rows"}
    raw = {"experiment": "x", "models": models, "base": base, "data": data}
    assert base_weights(resolve(raw, "x.yaml")) == weights


def test_a_latent_model_of_the_paper_takes_about_the_hours_it_took():
    """Just under 26 hours on two A100, says the paper: 52 hours of one."""
    hours = estimate(paper(), ["latent-6"]).hours
    assert 52 / 3 < hours < 52 * 3


def test_rl_on_shared_trajectories_takes_no_longer_than_the_papers_sixty_hours():
    with_parent = estimate(paper(), ["latent-6", "latent-6-rl"]).hours
    assert 5 < with_parent - estimate(paper(), ["latent-6"]).hours < 60


def test_a_model_more_and_a_seed_more_cost_more():
    one = estimate(paper(), ["cot-sft"])
    two = estimate(paper(), ["cot-sft", "no-cot-sft"])
    assert two.hours > 1.9 * (one.hours - 1)
    assert two.bytes > one.bytes
    seeds = paper().model_copy(update={"seeds": [0, 1, 2]})
    assert estimate(seeds, ["cot-sft"]).hours == pytest.approx(3 * one.hours)


def test_a_costly_experiment_is_described_and_a_cheap_one_is_not():
    main = [name for name in paper().models if name not in paper().report.appendix]
    text = describe(paper(), main)
    assert text.startswith("paper: from nothing, roughly ")
    assert "with the appendix: " in text
    test = load(CONFIG / "test.yaml")
    assert describe(test, list(test.models)) == ""
