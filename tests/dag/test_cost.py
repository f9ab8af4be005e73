"""What an experiment costs: counted where it can be counted, and held against what is known."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from latent_reasoning.config import PROJECT_ROOT, Experiment, Lora, load, resolve
from latent_reasoning.dag import cost
from latent_reasoning.dag.cost import SIZES, ModelSize
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reasoner import LatentReasoner

CONFIG = PROJECT_ROOT / "config"
SIZE = ModelSize(hidden=128, intermediate=512, layers=12, key_values=64, vocabulary=96)


def paper(*overlays: str) -> Experiment:
    return load([CONFIG / "paper.yaml", *(CONFIG / name for name in overlays)])


def reasoner(lora: Lora | None) -> LatentReasoner:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE.vocabulary,
        hidden_size=SIZE.hidden,
        intermediate_size=SIZE.intermediate,
        num_hidden_layers=SIZE.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LatentReasoner(LlamaForCausalLM(config), None)
    if lora is not None:
        attach_lora(model, lora)
    return model.train()


def test_weights_are_counted_exactly():
    assert SIZE.weights == reasoner(None).base.num_parameters()
    for names in (Lora().target_modules, ["q_proj", "v_proj"], ["down_proj"]):
        lora = Lora(r=4, target_modules=names)
        trained = sum(p.numel() for p in reasoner(lora).parameters() if p.requires_grad)
        assert SIZE.adapter_weights(lora) == trained
    assert SIZES["llama-3.2-1b"].weights == 1_235_814_400
    assert SIZES["smollm2-135m"].weights == 134_515_008


@pytest.mark.parametrize("lora", [None, Lora(r=8, dropout=0.0)], ids=["full", "lora"])
@pytest.mark.parametrize("train", [False, True])
def test_operations_are_those_that_torch_counts_without_attention(lora, train):
    rows, tokens = 2, 24
    model = reasoner(lora)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        logits = model.base(input_ids=torch.zeros(rows, tokens, dtype=torch.long)).logits
        if train:
            logits.sum().backward()
    planned = SIZE.operations(rows * tokens, rows * tokens, lora, train=train)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_what_is_asked_for_the_papers_jobs():
    """Of 60 published hours of RL, sharing what a prompt's samples share leaves about half."""
    hours = {"cot-sft": 12, "latent-6": 18, "latent-6-rl": 27}
    for model, expected in hours.items():
        need = cost.training_need(paper(), model)
        assert need.hours == pytest.approx(expected, rel=0.2)
        assert 2 * need.hours <= need.minutes / 60 < 2 * need.hours + 1
    assert cost.base_need(paper()).minutes == 60
    for model in paper().models:
        assert 5 < cost.training_need(paper(), model).gpu_gib < 70
        evaluation = cost.evaluation_need(paper(), model)
        assert (evaluation.minutes, evaluation.host_mb) == (60, 24_000)


def test_a_job_without_steps_asks_for_an_hour_and_not_for_no_limit():
    training = {"steps": 0}
    raw = {"experiment": "x", "models": {"sft": {"stage": "sft", "training": training}}}
    assert cost.training_need(resolve(raw, "x.yaml"), "sft").minutes == 60


def test_more_of_anything_costs_more():
    def need(**runtime: int) -> cost.Need:
        changed = paper().runtime.model_copy(update=runtime)
        return cost.training_need(paper().model_copy(update={"runtime": changed}), "latent-6")

    small, large = need(micro_batch_size=8), need(micro_batch_size=128)
    assert small.hours > large.hours
    assert small.gpu_gib < large.gpu_gib
    main = [name for name in paper().models if name not in paper().report.appendix]
    text = cost.describe(paper(), main)
    assert text.startswith("paper: from nothing, roughly ")
    assert "with the appendix: " in text
    seeds = paper().model_copy(update={"seeds": [0, 1, 2]})
    assert cost.total(seeds, main)[0] == pytest.approx(3 * cost.total(paper(), main)[0])


def test_an_h100_is_planned_for_where_its_type_is_asked_for():
    assert cost.device_of(paper()).name == "A100-80"
    assert cost.device_of(paper("h100.yaml")).name == "H100"
    hours = [cost.training_need(e, "cot-sft").hours for e in (paper(), paper("h100.yaml"))]
    assert 1.5 < hours[0] / hours[1] < 3.2


@pytest.mark.parametrize(
    ("base", "weights"),
    [
        ({"source": "hub", "hub_id": "meta-llama/Llama-3.2-1B-Instruct"}, 1.236e9),
        ({"source": "gguf", "path": "models/SmolLM2-135M-Instruct.Q4_1.gguf"}, 134.5e6),
        ({"source": "hub", "hub_id": "someone/a-model-1.7b"}, 1.7e9),
        ({"source": "local", "path": "models/unnamed/"}, 1.236e9),
        ({"source": "local", "path": "some/Llama-3.1-8B", "hub_id": "meta/Llama-3.2-1B"}, 8e9),
        ({"source": "local", "path": "hub/models--meta--Llama-3.2-3B/snapshots/0cb7b6a3"}, 3e9),
    ],
)
def test_the_size_of_a_model_is_read_off_its_name(base, weights):
    models = {"sft": {"stage": "sft", "training": {"steps": 1}}}
    data = {"source": "local", "path": "rows"}
    raw = {"experiment": "x", "models": models, "base": base, "data": data}
    assert cost.size_of(resolve(raw, "x.yaml")).weights == pytest.approx(weights, rel=0.15)


def test_an_adapter_of_a_gpt2_is_counted_exactly():
    config = GPT2Config(n_embd=128, n_layer=12, n_head=4, vocab_size=96, n_positions=8)
    lora = Lora(r=4, target_modules=["c_attn", "c_proj", "c_fc"])
    model = LatentReasoner(GPT2LMHeadModel(config), None)
    attach_lora(model, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert SIZE.adapter_weights(lora) == trained


def test_a_gpt2_from_scratch_has_two_matrices_in_its_mlp():
    experiment = load([CONFIG / "laptop.yaml", CONFIG / "laptop-gpt2.yaml"])
    assert cost.size_of(experiment).block_weights == 2 * (4 * 64**2 + 2 * 64 * 128)


def test_a_cheap_experiment_is_not_described():
    for name in ("laptop", "test"):
        experiment = load(CONFIG / f"{name}.yaml")
        assert cost.describe(experiment, list(experiment.models)) == ""


def test_the_command_tells_every_job_of_an_experiment(capsys):
    cost.main(["--config", str(CONFIG / "paper.yaml"), str(CONFIG / "h100.yaml")])
    printed = capsys.readouterr().out
    assert "| latent_sft latent-6 |" in printed
    assert "hours, H100" in printed
    assert "11 models, 1 seed(s), one after another: roughly " in printed


def test_a_training_counts_its_step_decoder_and_its_encoder():
    training = {"steps": 10, "batch_size": 4}
    coconut = {"stage": "curriculum", "steps_per_stage": 1, "training": training}
    soft = {"stage": "teacher_forced", "method": "latent_sft", "training": training}
    soft["model"] = {"recurrent_filter": "mixture"}
    models = {
        "coconut": coconut,
        "simcot": coconut | {"step_decoder": {}},
        "no-thought": coconut | {"method": "no_thought"},
        "soft": soft,
        "encoded": soft | {"latent_sft": {"targets": "encoder", "encoder_steps": 5}},
    }
    experiment = resolve({"experiment": "x", "models": models}, "x.yaml")
    size = cost.size_of(experiment)

    def operations(name):
        return cost.training_operations(experiment, experiment.models[name], cost.GSM8K)

    decoder = 10 * size.operations(4 * (22 + 6), 4 * (22 + 6), None, train=True)
    assert operations("simcot") == pytest.approx(operations("coconut") + decoder)
    text = 10 * size.operations(4 * (58 + 22 + 7), 4 * (22 + 7), None, train=True)
    assert operations("no-thought") == pytest.approx(text)
    assert operations("encoded") == pytest.approx(operations("soft") * (10 + 2 * 15) / 10)
    steps = [cost.first_stage_steps(experiment.models[name]) for name in ("soft", "encoded")]
    assert steps == [0, 15]


def test_a_step_decoder_needs_memory_time_and_disk_of_its_own():
    experiment = paper("rivals-paper.yaml")
    host, both = (cost.training_need(experiment, name) for name in ("codi-6", "simcot-codi-6"))
    weights = cost.size_of(experiment).weights
    assert 16 * weights < 2**30 * (both.gpu_gib - host.gpu_gib) < 30 * weights
    assert 1.2 * host.hours < both.hours < 2 * host.hours
    assert both.disk - host.disk == 3 * 12 * weights


def test_a_second_update_on_the_same_samples_does_not_sample_again():
    experiment, rl = paper(), paper().models["latent-6-rl"]
    once, twice, thrice = (
        cost.training_operations(experiment, rl.model_copy(update={"iterations": n}), cost.GSM8K)
        for n in (1, 2, 3)
    )
    assert once - twice == pytest.approx(3 * (twice - thrice))
    assert once > twice


def test_a_policy_pays_for_the_samples_and_the_reference_that_it_has():
    experiment = paper("rivals-paper.yaml")
    size, lengths = cost.size_of(experiment), cost.GSM8K
    ponder, colar = (experiment.models[name] for name in ("pondernet", "colar-rl"))
    assert colar.kl_weight == 0.0
    for policy, forwards in ((ponder, 0), (colar, 1)):
        tokens, logits, _ = cost._micro_batch(policy, policy.training.batch_size, lengths)
        learned = size.operations(tokens, logits, policy.lora, train=True)
        sampled = forwards * size.operations(tokens, logits, policy.lora, train=False)
        expected = policy.training.steps * (learned + sampled)
        measured = cost.training_operations(experiment, policy, lengths)
        assert measured == pytest.approx(expected)
    questions = colar.training.batch_size * colar.group_size * lengths.question
    assert tokens > questions
