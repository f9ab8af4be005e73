"""The latent SFT task: its labels, accumulation, the frozen teacher and its traces."""

from __future__ import annotations

import copy

import pytest
import torch

from latent_reasoning.config import (
    ConfigError,
    Distillation,
    LatentSftModel,
    Runtime,
    Training,
)
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.data.examples import IGNORED_LABEL
from latent_reasoning.data.rows import DataError
from latent_reasoning.model.generation import Generation
from latent_reasoning.model.passes import Kind
from latent_reasoning.sft import teacher as teacher_module
from latent_reasoning.sft.distillation import Side, read_with_states
from latent_reasoning.sft.latent_sft import LatentSftTask
from latent_reasoning.sft.teacher import teacher_states, teacher_traces, trace_steps
from latent_reasoning.training.gradients import accumulate_gradients
from latent_reasoning.training.text import Labels, cross_entropy
from tests.sft.conftest import encode

CODI = Distillation(codi_weight=2.0)


def make_task(model, tokenizer, examples, *, distillation=CODI, micro_batch=None, states=None, **t):
    training = Training(**({"steps": 4, "batch_size": 8} | t))
    entry = LatentSftModel(training=training, distillation=distillation)
    return LatentSftTask(
        "latent",
        model,
        examples,
        entry,
        Runtime(device="cpu", micro_batch_size=micro_batch),
        seed=3,
        pad_id=tokenizer.pad_token_id,
        validate=dict,
        teacher_states=states,
    )


def test_stop_label_smoothing_moves_mass_to_the_other_decision_only(rows, tokenizer, latent_model):
    batch = collate_latent(encode(rows[:6], tokenizer), tokenizer.pad_token_id)
    ids, mask = batch["latent_input_ids"], batch["latent_attention_mask"]
    labels, settings = batch["latent_labels"], latent_model.settings
    output = latent_model(ids, mask)
    learned = labels[:, 1:] != IGNORED_LABEL
    kinds = output.kinds[:, :-1][learned]
    targets = labels[:, 1:][learned]
    log_probabilities = latent_model.full_logits(output)[:, :-1][learned].log_softmax(-1)
    total = torch.tensor(0.0)
    for row, kind, target in zip(log_probabilities, kinds, targets, strict=True):
        total = total - row[target] * (0.9 if kind == Kind.THINKING else 1.0)
        if kind == Kind.THINKING:
            other = {settings.stop_id: settings.continue_id}.get(int(target), settings.stop_id)
            total = total - 0.1 * row[other]
    learned = Labels.of(labels, output.kinds, settings)
    actual = cross_entropy(latent_model, output, learned, stop_label_smoothing=0.1)
    torch.testing.assert_close(actual, total / len(targets))


@pytest.mark.parametrize("micro_batch", [3, 1])
def test_token_exact_accumulation_does_not_depend_on_the_micro_batch(
    rows, tokenizer, latent_model, micro_batch
):
    # Without distillation: its std is per micro-batch (conformance note 14).
    off = Distillation(codi_weight=0.0)
    examples = encode(rows, tokenizer)
    gradients, values = [], []
    for size in (None, micro_batch):
        model = copy.deepcopy(latent_model)
        options = {"distillation": off, "micro_batch": size, "accumulation": "tokens"}
        task = make_task(model, tokenizer, examples, **options)
        values.append(accumulate_gradients(model, task, 1))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name in ("loss", "teacher_loss", "student_loss"):
        assert values[1][name] == pytest.approx(values[0][name], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_a_step_reads_the_same_rows_whatever_the_micro_batch(rows, tokenizer, latent_model):
    examples = encode(rows, tokenizer)
    read = []
    for size in (None, 3):
        task = make_task(latent_model, tokenizer, examples, micro_batch=size)
        batches = task.micro_batches(2)
        read.append(sorted(index for part in task.plan.micro_batches(2) for index in part))
        assert [batch.weight for batch in batches] == ([8] if size is None else [3, 3, 2])
    assert read[0] == read[1]
    assert len(set(read[0])) == 8


def test_the_appendix_masks_latent_labels_and_meaned_keeps_the_last_step(
    rows, tokenizer, latent_model
):
    masked = encode(rows[:1], tokenizer, mask_latent_labels=True, drop_last_step=False)[0]
    plain = encode(rows[:1], tokenizer, learn_start=True)[0]
    settings = tokenizer.convert_tokens_to_ids(["<START>", "<|CONTINUE|>", "<|STOP|>"])
    assert not set(masked.student.labels) & set(settings)
    assert set(settings) <= set(plain.student.labels)
    assert masked.teacher.reasoning_length > plain.teacher.reasoning_length


# --------------------------------------------------------------------------------- frozen teacher


def states_of(frozen, student, examples, distillation, folder):
    texts = [example.teacher for example in examples]
    return teacher_states(
        frozen, student, texts, distillation, folder=folder, pad_id=0, batch_size=5
    )


def test_a_frozen_teachers_states_are_those_of_its_forward_and_are_computed_once(
    rows, tokenizer, latent_model, tmp_path, monkeypatch
):
    distillation = Distillation(codi_weight=1.0, meaned_weight=1.0, teacher="cot-sft")
    examples = encode(rows, tokenizer)
    frozen = copy.deepcopy(latent_model).eval()
    states = states_of(frozen, latent_model, examples, distillation, tmp_path)
    batch = collate_latent([examples[i] for i in (7, 2, 11)], tokenizer.pad_token_id)
    with torch.no_grad():
        side = Side.plan(frozen, batch, "teacher", distillation)
        _, expected = read_with_states(frozen, side, distillation)
    actual = states.at([7, 2, 11])
    torch.testing.assert_close(actual.target, expected.target, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.mean, expected.mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(actual.reasons, expected.reasons)
    monkeypatch.setattr(teacher_module, "_write_states", None)
    again = states_of(frozen, latent_model, examples, distillation, tmp_path)
    assert torch.equal(again.at([3]).target, states.at([3]).target)


def test_with_a_frozen_teacher_only_the_student_is_scored(rows, tokenizer, latent_model, tmp_path):
    distillation = Distillation(codi_weight=1.0, teacher="cot-sft")
    examples = encode(rows, tokenizer)
    frozen = copy.deepcopy(latent_model)
    states = states_of(frozen, latent_model, examples, distillation, tmp_path)
    task = make_task(latent_model, tokenizer, examples, distillation=distillation, states=states)
    values = accumulate_gradients(latent_model, task, 0)
    assert {"student_loss", "codi_loss"} == set(values) - {"loss"}
    assert values["loss"] == pytest.approx(values["student_loss"] + values["codi_loss"])


def test_a_teacher_of_another_shape_is_refused(latent_model, tmp_path):
    other = copy.deepcopy(latent_model)
    other.base.config.hidden_size = 99
    with pytest.raises(ConfigError, match=r"distillation\.teacher: cot-sft differs"):
        states_of(other, latent_model, [], Distillation(teacher="cot-sft"), tmp_path)


def written(tokenizer, texts):
    """A stand-in for `generate` that writes given texts."""

    def generate(model, prompts, **settings):
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        return [Generation(row, [], 0, False) for row in ids]

    return generate


def test_traces_are_kept_where_their_answer_is_right(rows, tokenizer, tmp_path, monkeypatch):
    right, wrong = rows[0], rows[1]
    texts = [
        f"<<(1+1)%7=2>><<(2*2)%7=4>> The answer is: {right.answer}",
        f"<<(1+1)%7=2>> The answer is: {(int(wrong.answer) + 1) % 7}",
    ]
    monkeypatch.setattr(teacher_module, "generate", written(tokenizer, texts))
    settings = {"folder": tmp_path, "prefix": "", "max_new_tokens": 9, "batch_size": 2}
    kept = teacher_traces(None, tokenizer, [right, wrong], **settings)
    assert [row.id for row in kept] == [right.id]
    assert kept[0].steps == ("<<(1+1)%7=2>>", "<<(2*2)%7=4>>")
    monkeypatch.setattr(teacher_module, "generate", None)
    assert teacher_traces(None, tokenizer, [right, wrong], **settings) == kept


def test_a_teacher_that_is_never_right_is_an_error(rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "generate", written(tokenizer, ["no answer"]))
    with pytest.raises(DataError, match="the teacher answers none of 1 rows right"):
        teacher_traces(
            None, tokenizer, rows[:1], folder=tmp_path, prefix="", max_new_tokens=9, batch_size=2
        )


def test_steps_of_a_trace_are_its_equations_or_sentences():
    assert trace_steps("<<1+1=2>><<2*3=6>>") == ("<<1+1=2>>", "<<2*3=6>>")
    assert trace_steps(" He has 2.5 kg. Then he eats it all.") == (
        "He has 2.5 kg.",
        "Then he eats it all.",
    )
    assert trace_steps("He has 3 kg\nand eats 2.\n") == ("He has 3 kg", "and eats 2.")
    assert trace_steps("") == ()
