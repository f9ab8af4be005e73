"""What an experiment costs: counted where it can be counted, and held against what is known."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from latent_reasoning.config import (
    PROJECT_ROOT,
    Architecture,
    Distillation,
    Experiment,
    LatentSftModel,
    Lora,
    RlModel,
    SftModel,
    Training,
    load,
    resolve,
)
from latent_reasoning.dag import cost
from latent_reasoning.dag.cost import SHAPES, Shape, Work
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.data.examples import LatentExample, PlainExample, StudentExample
from latent_reasoning.model.blocks import run_blocks
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.sft.latent_sft import latent_sft_losses

CONFIG = PROJECT_ROOT / "config"
SHAPE = Shape(128, 512, 2, 4, 2, 96)
ONE_STEP = Training(steps=1, batch_size=64)


def paper(*overlays: str) -> Experiment:
    return load([CONFIG / "paper.yaml", *(CONFIG / name for name in overlays)])


def llama(shape: Shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            tie_word_embeddings=shape.tied,
        )
    )


def reasoner(shape: Shape, lora: Lora | None) -> LatentReasoner:
    model = LatentReasoner(llama(shape), None)
    if lora is not None:
        attach_lora(model, lora)
    return model.train()


# --------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_a_llama_are_counted_exactly(tied):
    architecture = Architecture(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied
    )
    shape = cost.scratch_shape(architecture, vocabulary=50)
    assert shape.weights == llama(shape).num_parameters()


def test_the_weights_of_an_adapter_are_counted_exactly():
    model = reasoner(SHAPE, Lora(r=4))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert SHAPE.adapter_weights(Lora(r=4)) == trained
    assert SHAPE.adapter_weights(None) == 0


def test_llama_3_2_1b_has_its_number_of_weights():
    assert SHAPES["llama-3.2-1b"].weights == 1_235_814_400
    assert SHAPES["smollm2-135m"].weights == 134_515_008


@pytest.mark.parametrize("lora", [None, Lora(r=8, dropout=0.0)], ids=["full", "lora"])
@pytest.mark.parametrize("train", [False, True])
def test_operations_are_those_that_torch_counts(lora, train):
    # Many blocks: the first one's inputs need no gradient, which the formula does not know.
    rows, tokens, shape = 2, 24, dataclasses.replace(SHAPE, layers=12)
    model = reasoner(shape, lora)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        logits = model.base(input_ids=torch.zeros(rows, tokens, dtype=torch.long)).logits
        if train:
            logits.sum().backward()
    # The counter takes every pair of a query and a key, masked ones too.
    planned = cost.reading(shape, lora, rows * tokens, tokens, rows * tokens, train=train)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("lora", [None, Lora(r=16), Lora(r=64)], ids=["full", "r16", "r64"])
@pytest.mark.parametrize("intermediate", [512, 1024])
def test_activations_are_those_that_autograd_keeps(lora, intermediate):
    shape = dataclasses.replace(SHAPE, hidden=256, intermediate=intermediate)
    copies, activations = kept_bytes(shape, lora, readings=1)
    assert activations == pytest.approx(cost.activation_bytes(shape, lora), rel=0.05)
    both = shape.block_weights + shape.adapter_weights(lora)
    assert copies == pytest.approx(2 * both, rel=0.12)


def test_frozen_weights_are_copied_in_every_pass_and_trained_ones_once():
    one, three = (kept_bytes(SHAPE, Lora(r=2), readings=n)[0] for n in (1, 3))
    assert three == pytest.approx(3 * one, rel=0.05)
    one, three = (kept_bytes(SHAPE, None, readings=n)[0] for n in (1, 3))
    assert three == one


def test_the_memory_of_a_latent_sft_step_is_near_what_autograd_keeps_in_it():
    shape, lora, rows = Shape(256, 1024, 4, 4, 1, 8192), Lora(r=16), 16
    model = LatentReasoner(llama(shape), LatentSettings(8188, 8189, 8190, 8191))
    attach_lora(model, lora)
    batch = collate_latent([latent_example(model.settings)] * rows, pad_id=1)
    with Kept(model.train()) as kept:
        latent_sft_losses(model, batch, Distillation())
    weights = 4 * shape.weights + cost.ADAM_BYTES * shape.adapter_weights(lora)
    entry = LatentSftModel(training=ONE_STEP, lora=lora)
    planned = cost.training_memory(shape, entry, rows) - cost.CUDA_GIB - weights / 2**30
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.tensors.values()) / 2**30
    assert measured == pytest.approx(planned, rel=0.2)


def latent_example(settings: LatentSettings) -> LatentExample:
    """A row of mean lengths, its words all alike."""
    thinking = [settings.start_id, *[settings.continue_id] * cost.LATENT_STEPS, settings.stop_id]

    def example(kind: type[PlainExample], run: list[int]) -> PlainExample:
        ids = np.array([5] * cost.QUESTION + run + [5] * cost.ANSWER, dtype=np.int32)
        target = cost.QUESTION + len(run) + 3
        return kind(ids, cost.QUESTION, len(run), cost.QUESTION, target)

    text = example(PlainExample, [5] * cost.CUT_REASONING)
    return LatentExample(text, example(StudentExample, thinking))


class Kept:
    """Within it, autocast is on and the tensors that autograd keeps are collected by storage,
    parameters left out."""

    def __init__(self, model: LatentReasoner) -> None:
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.tensors: dict[int, torch.Tensor] = {}
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Kept:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.stack.enter_context(hooks)
        self.stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in self.own:
            self.tensors[storage] = tensor
        return tensor


def kept_bytes(shape: Shape, lora: Lora | None, readings: int) -> tuple[int, float]:
    """Bytes kept for the backward of readings under autocast: copies of weights; the rest, a token
    and block."""
    model, (rows, tokens) = reasoner(shape, lora), (4, 48)
    sizes = {tuple(p.shape) for p in model.parameters()}
    sizes |= {tuple(p.t().shape) for p in model.parameters() if p.dim() == 2}
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    positions = torch.arange(tokens).expand(rows, -1)
    embedded = torch.randn(rows, tokens, shape.hidden)
    with Kept(model) as collected:
        outputs = [
            run_blocks(model.base, embedded, positions, mask, cache=None) for _ in range(readings)
        ]
    assert len(outputs) == readings
    kept = collected.tensors.values()
    weights = [t for t in kept if tuple(t.shape) in sizes]
    rest = [t for t in kept if tuple(t.shape) not in sizes]
    copies, activations = (
        sum(t.untyped_storage().nbytes() for t in part) for part in (weights, rest)
    )
    return copies, activations / (shape.layers * rows * tokens * readings)


# ---------------------------------------------------------------------------- what is known


def test_the_rate_is_fitted_to_the_published_latent_sft_and_explains_the_published_rl():
    entry = LatentSftModel(training=Training(steps=30_000, batch_size=64), lora=Lora())
    shape = SHAPES["llama-3.2-1b"]
    sft = cost.training_work(shape, entry, micro_batch=64, shared=False)
    assert cost.a100().hours(sft) == pytest.approx(26.0)
    assert 0.05 < cost.published_share() < 0.4
    entry = RlModel(
        **{"from": "latent"}, training=Training(steps=60_000, batch_size=8), lora=Lora(r=32)
    )
    rl = cost.training_work(shape, entry, micro_batch=None, shared=False)
    assert 60 / 2 < cost.a100().hours(rl) < 60 * 2


def test_the_ratios_of_work_are_near_those_measured_on_a_cpu():
    """docs/log.md: hidden 128, one thread, no adapter; there, operations are what takes time."""
    shape = Shape(128, 352, 4, 4, 2, 640)
    latent, token = LatentSftModel(training=ONE_STEP), SftModel(training=ONE_STEP)
    for step, entry, measured in (
        (cost.latent_step, latent, 3.58),
        (cost.token_step, token, 2.64),
    ):
        naive, fast = (step(shape, entry, 32, shared=shared) for shared in (False, True))
        assert naive.operations / fast.operations == pytest.approx(measured, rel=0.35)


def test_sharing_a_trajectory_takes_fewer_hours_than_the_papers_sixty():
    need = cost.training_need(paper(), "latent-6-rl", cost.a100())
    assert 10 < need.hours < 60
    assert need.minutes == 60 * -(-int(2 * need.hours * 1000) // 1000)


def test_every_job_of_the_paper_fits_a_card_of_80_gb():
    experiment = paper()
    for model in experiment.models:
        assert 5 < cost.training_need(experiment, model).gpu_gib < 70
        assert cost.evaluation_need(experiment, model).gpu_gib < 30
    assert cost.training_need(experiment, "latent-6").host_mb == 24_000


def test_a_larger_micro_batch_takes_more_memory_and_fewer_passes():
    shape, entry = SHAPES["llama-3.2-1b"], paper().models["latent-6"]
    memory = [cost.training_memory(shape, entry, size) for size in (8, 32, 128)]
    assert memory == sorted(memory)
    small, large = (
        cost.training_work(shape, entry, micro_batch=size, shared=True) for size in (8, 128)
    )
    assert small.operations == pytest.approx(large.operations)
    assert small.passes > 10 * large.passes


def test_an_h100_is_planned_for_where_its_type_is_asked_for():
    assert cost.device_of(paper()).name == "A100-80"
    assert cost.device_of(paper("h100.yaml")).name == "H100"
    hours = [cost.training_need(e, "cot-sft").hours for e in (paper(), paper("h100.yaml"))]
    assert 1.5 < hours[0] / hours[1] < 3.2


def test_hours_are_operations_at_the_rate_and_passes_one_after_another():
    device = cost.Device("card", rate=1e12, pass_seconds=0.5, memory_gib=80)
    assert device.hours(Work(3600e12, 7200)) == 2.0


# ---------------------------------------------------------------------------- an experiment


@pytest.mark.parametrize(
    ("base", "weights"),
    [
        ({"source": "hub", "hub_id": "meta-llama/Llama-3.2-1B-Instruct"}, 1.236e9),
        ({"source": "gguf", "path": "models/SmolLM2-135M-Instruct.Q4_1.gguf"}, 134.5e6),
        ({"source": "hub", "hub_id": "someone/a-model-1.7b"}, 1.7e9),
        ({"source": "local", "path": "models/unnamed"}, 1.236e9),
    ],
)
def test_the_size_of_a_model_is_read_off_its_name(base, weights):
    models = {"sft": {"stage": "sft", "training": {"steps": 1}}}
    data = {"source": "local", "path": "rows"}
    raw = {"experiment": "x", "models": models, "base": base, "data": data}
    shape = cost.shape_of(resolve(raw, "x.yaml"))
    assert shape.weights == pytest.approx(weights, rel=0.15)


def test_a_model_more_and_a_seed_more_cost_more():
    one = cost.estimate(paper(), ["cot-sft"])
    two = cost.estimate(paper(), ["cot-sft", "no-cot-sft"])
    assert two.hours > 1.5 * (one.hours - 1)
    assert two.bytes > one.bytes
    seeds = paper().model_copy(update={"seeds": [0, 1, 2]})
    assert cost.estimate(seeds, ["cot-sft"]).hours == pytest.approx(3 * one.hours)


def test_the_laptop_experiment_takes_minutes():
    laptop = load(CONFIG / "laptop.yaml")
    assert 0.05 < cost.estimate(laptop, list(laptop.models)).hours < 0.6


def test_a_costly_experiment_is_described_and_a_cheap_one_is_not():
    main = [name for name in paper().models if name not in paper().report.appendix]
    text = cost.describe(paper(), main)
    assert text.startswith("paper: from nothing, roughly ")
    assert "with the appendix: " in text
    assert "on one A100-80" in text
    test = load(CONFIG / "test.yaml")
    assert cost.describe(test, list(test.models)) == ""


def test_the_command_tells_every_job_of_an_experiment(capsys):
    cost.main(["--config", str(CONFIG / "paper.yaml"), str(CONFIG / "h100.yaml")])
    printed = capsys.readouterr().out
    assert "| latent_sft latent-6 |" in printed
    assert "hours, H100" in printed
    assert "11 models, 1 seed(s), one after another: roughly " in printed
