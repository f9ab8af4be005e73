"""HRPO: the marker, gated reading, rollouts and scoring, the stage through a kill, the vectors."""

import json
import random
from typing import ClassVar

import pandas
import pytest
import torch
import yaml

from latent_reasoning.config import ConfigError, Runtime, Training, load
from latent_reasoning.config.rivals import RivalPolicyModel
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.answers import answers_match
from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import row_lines
from latent_reasoning.data.sequences import ANSWER_PREFIX
from latent_reasoning.evaluation.evaluator import EvaluationSettings, evaluate
from latent_reasoning.model.folder import load as load_model
from latent_reasoning.model.folder import save
from latent_reasoning.model.gated import GatedReasoner, GateSettings, ThinkingGate
from latent_reasoning.model.generation import generate
from latent_reasoning.model.marker import answer_marker_table, marker_table, progress_after
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.tensors import CheckpointError
from latent_reasoning.rivals.__main__ import main
from latent_reasoning.rivals.gated_policy import GatedPolicyTask
from latent_reasoning.rivals.hrpo import completion_mask, is_rewarded, sample, score
from latent_reasoning.rl.prompts import rl_prompts
from latent_reasoning.rl.rollouts import draw_uniforms
from latent_reasoning.runtime.parallel import OneProcess
from latent_reasoning.training.gradients import accumulate_gradients
from tests.model.models import build_base
from tests.rl.conftest import generated_rows

EOS = 1
TEXTS = ["<b>", "<e>", "#", "##", "###", "a#", "#b", "x", "##y#"]
PROMPTS = [[3, 4], [5], [2, 7, 6, 3]]


def gated(architecture: str = "llama", **settings) -> GatedReasoner:
    """A random gated model in float64 over `TEXTS`, whose marker is `####`."""
    base = build_base(architecture, vocabulary=len(TEXTS))
    torch.manual_seed(3)
    gate = ThinkingGate(base.config.hidden_size)
    gate.begin(0.3, 0.9, std=0.5)
    model = GatedReasoner(base, GateSettings(**settings), gate, marker_table(TEXTS, "####"))
    return model.double().eval()


# ----------------------------------------------------------------------------------------- marker


def test_the_marker_is_seen_however_it_is_split_into_tokens():
    table, draw = marker_table(TEXTS, "####"), random.Random(0)
    for _ in range(300):
        tokens = [draw.randrange(len(TEXTS)) for _ in range(6)]
        progress = torch.zeros(1, dtype=torch.long)
        for length, token in enumerate(tokens, 1):
            progress = progress_after(table, progress, torch.tensor([[token]]))
            text = "".join(TEXTS[token] for token in tokens[:length])
            assert (int(progress) == 4) == ("####" in text), text


def test_the_answer_s_marker_is_seen_as_it_is_taught_and_as_it_is_written():
    tokenizer = build_tokenizer(generated_texts(7))
    table = answer_marker_table(tokenizer, len(tokenizer) + 3)
    assert table.shape == (len(ANSWER_PREFIX) + 1, len(tokenizer) + 3)
    (ids,) = tokenizer([" The answer is: 3"], add_special_tokens=False)["input_ids"]
    seen = [
        int(progress_after(table, torch.zeros(1, dtype=torch.long), torch.tensor([ids[:n]])))
        for n in range(1, len(ids) + 1)
    ]
    assert seen == [len(ANSWER_PREFIX) - 1, *[len(ANSWER_PREFIX)] * (len(ids) - 1)]


# ------------------------------------------------------------------------------ rollouts and scores


def walk(model: GatedReasoner, prompt: list[int], ids: list[int]) -> list[float]:
    """Log-probabilities of a completion, one token after the other, alone."""
    state, log_probs = model.read_prompts(*pad_prompts([prompt], EOS)), []
    for token in ids:
        logits = model.base.get_output_embeddings()(state.last_hidden)
        log_probs.append(logits.log_softmax(-1)[0, token].item())
        model.read_tokens(state, torch.tensor([token]))
    return log_probs


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scores_are_those_of_reading_token_by_token(architecture):
    model = gated(architecture, temperature=2.0, top_k=6)
    rollout, read, kept = sample(model, PROMPTS, draw_uniforms(3, 6, 9, seed=0), EOS)
    assert 0 < kept < 1
    scores = score(model, rollout.prompts, rollout.completions, read).detach()
    mask = completion_mask(rollout.completions)
    assert not read.thinking.all()
    assert read.thinking.any()
    for row, completion in enumerate(rollout.completions):
        own = scores[row][mask[row]].tolist()
        assert own == pytest.approx(
            walk(model, PROMPTS[completion.prompt], completion.ids), abs=1e-9
        )
    plain = score(model, rollout.prompts, rollout.completions, None)
    assert not torch.allclose(plain[mask], scores[mask], atol=1e-3)


def test_samples_depend_on_no_other_sample():
    model, draws = gated(temperature=1.5), draw_uniforms(3, 5, 8, seed=1)
    together = sample(model, PROMPTS, draws, EOS).rollout
    for index, prompt in enumerate(PROMPTS):
        for member in range(5):
            alone = sample(model, [prompt], draws[index, member][None, None], EOS).rollout
            own = together.completions[together.sample_completion[index, member]]
            assert alone.completions[0].ids == own.ids


def test_after_a_prompt_that_ends_in_the_marker_nothing_is_gated():
    model = gated()
    plain = LatentReasoner(model.base, None).eval()
    options = {"max_new_tokens": 8, "eos_id": EOS, "batch_size": 4}
    prompts = [[5, 3, 3], [4, 2], [7, 3, 2, 2]]
    assert generate(model, prompts, **options) == generate(plain, prompts, **options)
    assert generate(model, PROMPTS, **options) != generate(plain, PROMPTS, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 3 The answer is: 7", True),
        ("so 3 The answer is: 8", False),
        ("so 7", False),
        ("The answer is: 7 The answer is: 7", True),  # the first lacks the space
        (" The answer is: 7 The answer is: 7", False),
    ],
)
def test_a_right_answer_after_the_only_marker_is_rewarded(text, expected):
    assert is_rewarded(text, "7", answers_match) is expected


# ------------------------------------------------------------------------------------------- task


def task(lora: bool = False, size: int | None = None, **settings) -> GatedPolicyTask:
    tokenizer = build_tokenizer(generated_texts(3))
    base = build_base(vocabulary=len(tokenizer))
    torch.manual_seed(3)
    gate = ThinkingGate(base.config.hidden_size)
    gate.begin(0.3, 0.9, std=0.5)
    table = answer_marker_table(tokenizer, len(tokenizer))
    model = GatedReasoner(base, GateSettings(temperature=1.0), gate, table).double()
    rows, _ = generated_rows(6, 0, max_steps=2, modulus=3)
    entry = RivalPolicyModel(
        **{"from": "cot"},
        group_size=4,
        max_new_tokens=6,
        kl_weight=0.5,
        loss="grpo",
        training=Training(steps=4, batch_size=4, learning_rate=1e-3, validate_every=6),
        **settings,
    )
    return GatedPolicyTask(
        "hrpo",
        model,
        tokenizer,
        rl_prompts(rows, tokenizer, prefix="", max_prompt_tokens=None, latent=False),
        entry,
        Runtime(micro_batch_size=size, checkpoint_every=2),
        seed=0,
        validate=dict,
    )


def test_micro_batches_change_neither_loss_nor_gradient():
    results = []
    for size in (None, 1, 3):
        one = task(size=size)
        values = accumulate_gradients(one.model, one, 1)
        results.append((values, {n: p.grad for n, p in one.model.named_parameters()}))
    whole, gradients = results[0]
    assert whole["kl"] > 1e-4
    for values, parts in results[1:]:
        assert values["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        for name, gradient in gradients.items():
            assert (parts[name] - gradient).norm() <= 1e-9 * max(1.0, gradient.norm()), name
    assert gradients["gate.decay"].norm() > 0
    assert gradients["gate.recurrence.weight"].norm() > 0


def test_processes_tell_each_other_one_thing_for_each_micro_batch():
    """Lists of other lengths would be put together in the wrong order, or not at all."""

    class Counting(OneProcess):
        gathered: ClassVar[list[int]] = []

        def gather(self, own):
            self.gathered.append(len(own))
            return own

    one = task(size=1)
    one.processes = Counting()
    batches = one.micro_batches(0)
    assert len(batches) == 4
    assert set(Counting.gathered) == {4}
    samples = sum(batch.rollout.sample_completion.numel() for batch in batches)
    assert samples == 16
    assert 0 < batches[0].metrics["kept_share"] < 1


# ------------------------------------------------------------------------------------------ stage

EXPERIMENT = {
    "experiment": "tiny",
    "data": {"generated": {"max_steps": 2, "step_weights": [1, 1], "modulus": 3}},
    "tracking": {"enabled": False, "log_every": 1},
    "runtime": {"device": "cpu", "checkpoint_every": 2},
    "stages": {
        "policy": {
            "method": "hrpo",
            "from": "cot",
            "group_size": 4,
            "max_new_tokens": 8,
            "training": {"steps": 4, "batch_size": 4, "validate_every": 4, "select": "last"},
        }
    },
    "models": {
        "cot": {"stage": "sft", "training": {"steps": 1}},
        "full": {
            "stage": "policy",
            "gate": {"keep": [0.5, 0.9], "learning_rate": 1e-2, "decay_learning_rate": 1e-1},
        },
        "lora": {
            "stage": "policy",
            "lora": {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": ["q_proj", "up_proj"]},
        },
        "again": {"stage": "policy", "from": "full"},
        "rewarded": {"stage": "policy", "reward": {"penalty": 0.5}},
    },
}


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Run the stage in a results folder that holds its inputs; returns the layout."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(EXPERIMENT))
    tokenizer = build_tokenizer(generated_texts(3))

    def run(model: str, results: str, architecture: str = "llama") -> Layout:
        monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / results))
        layout = Layout.of(load(config))
        if not layout.data("rl").exists():
            layout.data("rl").parent.mkdir(parents=True)
            made = generated_rows(8, 3, max_steps=2, modulus=3)
            for split, rows in zip(("rl", "validation"), made, strict=True):
                layout.data(split).write_text("".join(row_lines(rows)))
            base = build_base(architecture, vocabulary=len(tokenizer)).float()
            parent = LatentReasoner(base, None)
            save(parent, tokenizer, layout.model("cot", 0), card={"model": "cot"})
        main(["--config", str(config), "--model", model, "--seed", "0"])
        return layout

    return run


@pytest.mark.parametrize(
    ("model", "architecture"), [("full", "llama"), ("lora", "llama"), ("full", "gpt2")]
)
def test_a_killed_run_ends_with_bitwise_the_weights_of_one_never_killed(
    stage, monkeypatch, model, architecture
):
    layout = stage(model, "whole", architecture)
    expected = load_model(layout.model(model, 0), device="cpu").state_dict()
    start = load_model(layout.model("cot", 0), device="cpu").state_dict()
    assert any(not torch.equal(expected[name], start[name]) for name in start)
    batches, killed_at = GatedPolicyTask.micro_batches, []

    def killed(self, step: int):
        if step == 3 and not killed_at:
            killed_at.append(step)
            raise KeyboardInterrupt
        return batches(self, step)

    monkeypatch.setattr(GatedPolicyTask, "micro_batches", killed)
    with pytest.raises(KeyboardInterrupt):
        stage(model, "killed", architecture)
    layout = stage(model, "killed", architecture)
    resumed = load_model(layout.model(model, 0), device="cpu")
    assert isinstance(resumed, GatedReasoner)
    assert resumed.state_dict().keys() == expected.keys()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(expected[name], tensor), name
    curves = pandas.read_csv(layout.model(model, 0) / "training.csv")
    for column in ("loss", "reward", "reasoning_tokens", "kl", "kept_share"):
        assert curves[column].notna().all()


def test_the_folder_keeps_the_gate_and_evaluation_decodes_with_it(stage, tmp_path):
    layout = stage("full", "results")
    folder = layout.model("full", 0)
    model = load_model(folder, device="cpu")
    assert model.gate_settings == GateSettings(temperature=1.0, top_k=50)
    tokenizer = build_tokenizer(generated_texts(3))
    rows, _ = generated_rows(6, 0, max_steps=2, modulus=3)
    settings = EvaluationSettings(prefix="", max_new_tokens=12, max_forced_steps=3)
    written = evaluate(model, tokenizer, rows, settings)
    plain = evaluate(LatentReasoner(model.base, None), tokenizer, rows, settings)
    assert [p.completion for p in written.predictions] != [p.completion for p in plain.predictions]
    assert written.forced == plain.forced
    (folder / "gate.json").write_text(json.dumps({"warmth": 1}))
    with pytest.raises(CheckpointError, match=r"gate.json"):
        load_model(folder, device="cpu")


def test_what_hrpo_cannot_start_from_or_use_is_refused(stage):
    stage("full", "results")
    with pytest.raises(ConfigError, match=r"models.again.from"):
        stage("again", "results")
    with pytest.raises(ConfigError, match=r"models.rewarded.reward"):
        stage("rewarded", "results")
