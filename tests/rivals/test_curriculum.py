"""The stage curriculum: what rows read at each stage, training on tiny bases, the vectors."""

from __future__ import annotations

import copy
import json
import random
import shutil
from dataclasses import replace

import pytest
import yaml
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from latent_reasoning.base.__main__ import main as make_base
from latent_reasoning.config import (
    ConfigError,
    Model,
    Runtime,
    Training,
    resolve,
)
from latent_reasoning.data.__main__ import main as prepare_data
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.sequences import (
    SpecialTokens,
    encode_staged_rows,
    special_token_ids,
)
from latent_reasoning.model import load
from latent_reasoning.model.special_tokens import make_latent
from latent_reasoning.rivals.__main__ import main as train_rival
from latent_reasoning.rivals.coconut import Stages
from latent_reasoning.rivals.curriculum import CurriculumTask, StepCurriculum, TokenCurriculum
from latent_reasoning.rivals.icot import Removal
from latent_reasoning.sft.__main__ import main as fine_tune
from latent_reasoning.sft.examples import step_ids
from latent_reasoning.training.metrics import read_metrics
from tests.data.generated import generated_rows
from tests.model.models import build_base
from tests.sft.test_captured import assert_the_same

START, END, CONTINUE, STOP = 90, 91, 92, 93
SPECIAL = SpecialTokens(START, END, CONTINUE, STOP)
CURRICULUM = StepCurriculum(Stages(2, 2), 0, 5, 0.0, False, SPECIAL)

# ------------------------------------------------------------------------------ what a row reads


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(generated_texts(7))


@pytest.fixture(scope="module")
def row(tokenizer):
    """A row of three steps."""
    row = next(row for row in generated_rows(24) if len(row.steps) == 3)
    return row, encode_staged_rows([row], tokenizer, prefix="Question: ")[0]


@pytest.mark.parametrize(
    ("step", "latents", "left_out"),
    [(0, 0, 0), (4, 0, 0), (5, 2, 1), (10, 4, 2), (15, 4, 3), (99, 4, 3)],
)
def test_a_stage_puts_latents_in_the_place_of_the_first_steps(
    tokenizer, row, step, latents, left_out
):
    plain, staged = row
    example = CURRICULUM.example(staged, step, random.Random(0))
    ids = example.input_ids.tolist()
    run = [START, *[CONTINUE] * latents, STOP]
    begin = example.question_length
    assert ids[begin : begin + len(run)] == run
    text = tokenizer.decode(ids[begin + len(run) :])
    assert text == f"{''.join(plain.steps[left_out:])} The answer is: {plain.answer}<|eot_id|>"
    # Neither the question nor the run is learned; the first word after STOP is.
    learned = example.labels != -100
    assert learned.tolist() == [i >= begin + len(run) for i in range(len(ids))]


def test_without_thought_the_steps_only_disappear(row):
    curriculum = replace(CURRICULUM, stages=Stages(0, 2), special=None)
    lengths = [len(curriculum.example(row[1], step, random.Random(0))) for step in (0, 5, 10, 15)]
    texts = [len(text) for text in row[1].texts]
    assert [lengths[0] - length for length in lengths] == [texts[0] - text for text in texts]


def test_a_step_decoder_writes_the_removed_steps_and_then_what_is_left(tokenizer, row):
    plain, staged = row
    decoded = replace(staged, step_ids=step_ids([plain], tokenizer, natural_language=False)[0])
    end = f"The answer is: {plain.answer}<|eot_id|>"
    for step, texts in (
        (0, []),
        (5, [plain.steps[0]]),
        (10, plain.steps[:2]),
        (15, [plain.steps[0], plain.steps[1] + plain.steps[2]]),
    ):
        written = CURRICULUM.example(decoded, step, random.Random(0)).step_texts
        assert [tokenizer.decode(text) for text in written] == [f"{t}<|eot_id|>" for t in texts]
    short = replace(decoded, step_ids=decoded.step_ids[2:], texts=decoded.texts[2:])
    written = CURRICULUM.example(short, 10, random.Random(0)).step_texts
    assert [tokenizer.decode(t) for t in written] == [f"{plain.steps[2]}<|eot_id|>", f" {end}"]
    assert CURRICULUM.example(staged, 15, random.Random(0)).step_texts == ()


def test_a_share_of_the_rows_is_read_at_a_stage_of_its_own(row):
    curriculum, draws = replace(CURRICULUM, mix=0.5), random.Random(0)
    counts = [0] * 4
    for _ in range(4000):
        example = curriculum.example(row[1], 5, draws)
        left = len(example.input_ids) - example.first_label - len(row[1].ending)
        counts[[len(text) for text in row[1].texts].index(left)] += 1
    assert [count / 4000 for count in counts] == pytest.approx(
        [0.125, 0.625, 0.125, 0.125], abs=0.03
    )


def test_rows_with_few_steps_have_fewer_latents_in_the_end_only_without_padding():
    padded, ragged = Stages(2, 3), Stages(2, 3, pad_latents=False)
    assert [padded.of_training(1, stage) for stage in range(6)] == [
        (0, 0), (2, 1), (4, 1), (6, 1), (6, 1), (6, 1),
    ]  # fmt: skip
    assert [ragged.of_training(1, stage)[0] for stage in range(6)] == [0, 2, 4, 6, 2, 2]
    assert [ragged.of_evaluation(1, stage) for stage in range(5)] == [0, 2, 2, 2, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_leave_the_reasoning_one_by_one(row, side):
    staged = row[1]
    whole = staged.texts[0].tolist()
    removal = Removal(start=1, steps_per_token=2, pretrain_steps=3, all_beyond=5, side=side)
    curriculum = TokenCurriculum(removal, longest=20, resets_optimizer=True)
    assert [curriculum.stage(step) for step in range(13)] == [1] * 5 + [2, 2, 3, 3, 4, 4, 20, 20]
    for step, removed in ((0, 1), (6, 2), (11, len(whole))):
        ids = curriculum.example(staged, step, random.Random(0)).input_ids.tolist()
        left = whole[removed:] if side == "left" else whole[: len(whole) - removed]
        assert ids == [*staged.question, *left, *staged.ending]


def test_offsets_are_geometric():
    removal, draws = Removal(smoothing=1.0), random.Random(0)
    offsets = [removal.offset(draws) for _ in range(4000)]
    shares = [offsets.count(k) / 4000 for k in range(3)]
    assert shares == pytest.approx([0.632, 0.233, 0.086], abs=0.025)


def test_a_marker_begins_as_no_word_that_the_tokenizer_does_not_know(tokenizer):
    base = build_base(vocabulary=len(tokenizer))
    with pytest.raises(ConfigError, match=r"model.start_token_from: .*unknown token"):
        make_latent(base, copy.deepcopy(tokenizer), Model(start_token_from="<<"))


def test_captured_programs_add_the_gradients_of_the_eager_way(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    base = build_base(vocabulary=len(tokenizer))
    model = make_latent(base, tokenizer, Model(recurrent_filter="none"))
    rows = [row for row in generated_rows(24) if len(row.steps) < 3]
    staged = encode_staged_rows(rows, tokenizer, prefix="Question: ")
    curriculum = replace(CURRICULUM, steps_per_stage=1, special=special_token_ids(tokenizer))

    def task() -> CurriculumTask:
        return CurriculumTask(
            "coconut",
            copy.deepcopy(model),
            [row.example([], row.texts[0]) for row in staged],
            Training(steps=4, batch_size=6),
            Runtime(device="cpu", micro_batch_size=3),
            seed=0,
            pad_id=tokenizer.pad_token_id,
            validate=dict,
            rows=staged,
            curriculum=curriculum,
        )

    assert_the_same(task(), task())


# ---------------------------------------------------------------------------------- the training

LONGEST = 21
"""Tokens of three steps."""
TRAINING = {"steps": 8, "batch_size": 8, "learning_rate": 1e-3, "validate_every": 2}
STEPS = {
    **{"stage": "curriculum", "training": TRAINING, "steps_per_stage": 2, "last_latent_stage": 2},
    **{"uniform_mix": 0.3, "reset_optimizer": True},
}
MODELS = {
    "cot-sft": {"stage": "sft", "form": "cot", "training": TRAINING | {"steps": 2}},
    "coconut": STEPS
    | {
        "from": "cot-sft",
        "model": {"recurrent_filter": "none", "start_token_from": "<<(", "end_token_from": "<<("},
    },
    "pause": STEPS | {"method": "pause", "model": {"recurrent_filter": "pause"}},
    "simcot": STEPS
    | {
        "from": "cot-sft",
        "model": {"recurrent_filter": "none"},
        "step_decoder": {"normalise": "rows"},
    },
    "no-thought": STEPS | {"method": "no_thought"},
    "icot": STEPS
    | {"method": "icot", "removal": {"smoothing": 1.0, "pretrain_steps": 2, "all_beyond": 4}},
}
EXPERIMENT = {
    "experiment": "tiny",
    "data": {"generated": {"train": 60, "validation": 4, "test": 4, "max_steps": 3}}
    | {"max_tokens": 120},
    "models": MODELS,
    "runtime": {"device": "cpu", "checkpoint_every": 3},
    "tracking": {"enabled": False},
}
EXPERIMENT["data"]["generated"]["step_weights"] = [1, 1, 1]
SHAPE = {"hidden_size": 16, "intermediate_size": 24}
LLAMA = {"architecture": SHAPE, "training": TRAINING | {"steps": 2}}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def train(request, tmp_path_factory):
    """A function that trains a model of the tiny experiment and returns its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    base, modules = LLAMA, ["q_proj"]
    if request.param == "gpt2":
        modules = ["c_attn"]
        base = {"source": "local", "path": str(folder / "gpt2")}
        tokenizer = build_tokenizer(generated_texts(7))
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=120
        )
        GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
        tokenizer.save_pretrained(folder / "gpt2")
    config = folder / "tiny.yaml"
    pause = MODELS["pause"] | {"lora": {"r": 2, "target_modules": modules}}
    content = EXPERIMENT | {"base": base, "models": MODELS | {"pause": pause}}
    config.write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_REASONING_RESULTS", str(folder / "results"))
        prepare_data(["--config", str(config)])
        make_base(["--config", str(config)])
        fine_tune(["--config", str(config), "--model", "cot-sft"])

        def train(name: str):
            train_rival(["--config", str(config), "--model", name])
            return folder / "results" / "tiny" / "models" / name / "seed-0"

        train.results = folder / "results" / "tiny"
        yield train


@pytest.mark.parametrize("name", ["coconut", "simcot", "pause", "no-thought", "icot"])
def test_each_method_trains_and_a_killed_training_ends_with_the_same_bits(train, name, monkeypatch):
    folder = train(name)
    expected = load_file(folder / "model.safetensors")
    checkpoints = train.results / "checkpoints" / name / "seed-0"
    metrics = read_metrics(checkpoints / "metrics.jsonl")
    stages = {row["step"]: row["curriculum_stage"] for row in metrics if "curriculum_stage" in row}
    selected = [row["step"] for row in metrics if "validation_accuracy" in row]
    # The last stage removes all text; only its validations select.
    assert stages == {2: 0, 4: 1, 6: 3 if name == "icot" else 2}
    assert selected == [8]
    state = json.loads((checkpoints / "step-8" / "state.json").read_text())
    assert state["progress"]["stage"] == (LONGEST if name == "icot" else 3)

    shutil.rmtree(folder)
    shutil.rmtree(checkpoints)
    read = CurriculumTask.micro_batches

    def killed(self, step):
        if step == 5:
            raise OSError("killed")
        return read(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(CurriculumTask, "micro_batches", killed)
        with pytest.raises(OSError, match="killed"):
            train(name)
    again = load_file(train(name) / "model.safetensors")
    settings = load(folder, "cpu").settings
    filters = {"coconut": "none", "simcot": "none", "pause": "pause"}
    assert (None if settings is None else settings.recurrent_filter) == filters.get(name)
    assert expected.keys() == again.keys()
    assert all(tensor.equal(again[key]) for key, tensor in expected.items())


def test_a_step_decoder_learns_beside_coconut_and_is_not_saved(train):
    folder = train.results / "models" / "simcot" / "seed-0"
    if not folder.exists():
        train("simcot")
    metrics = read_metrics(train.results / "checkpoints" / "simcot" / "seed-0" / "metrics.jsonl")
    losses = [row["step_loss"] for row in metrics if "step_loss" in row]
    assert losses
    assert losses[-1] > 0
    for file in folder.glob("*.safetensors"):
        assert not any("step_decoder" in name for name in load_file(file))
    assert load(folder, "cpu").settings.recurrent_filter == "none"


# ------------------------------------------------------------------------------ the configuration


def entry_of(**changes):
    models = {"coconut": MODELS["coconut"] | {"from": "base"} | changes}
    return resolve(EXPERIMENT | {"base": LLAMA, "models": models}, "x.yaml").models["coconut"]


def test_a_coconut_is_evaluated_with_the_latents_of_its_last_stage():
    assert entry_of().forced_steps == 4
    assert entry_of(method="no_thought").forced_steps is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_per_stage": 3}, "training.steps: 8 steps end before the last stage, which begins"),
        (
            {"method": "no_thought", "step_decoder": {}},
            "step_decoder: reads the latent inputs of method coconut; no_thought has none",
        ),
        (
            {"model": {"recurrent_filter": "attention"}, "step_decoder": {}},
            "step_decoder: the filter attention reads more than one state",
        ),
        ({"first_stage": 4}, "first_stage: 4 is beyond the last stage"),
        ({"method": "pause"}, "recurrent_filter: none is not what method: pause feeds"),
    ],
)
def test_a_curriculum_that_cannot_end_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        entry_of(**changes)
