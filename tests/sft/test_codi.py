"""CODI and SIM-CoT as entries of latent SFT: what they compare, decode, keep and learn."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from latent_reasoning.config import (
    Data,
    Distillation,
    LatentSftModel,
    Lora,
    Model,
    Runtime,
    StepDecoder,
    Training,
)
from latent_reasoning.model.lora import attach_lora, merge_lora
from latent_reasoning.model.special_tokens import make_latent
from latent_reasoning.model.step_decoder import (
    attach_step_decoder,
    detach_step_decoder,
    step_decoder_of,
)
from latent_reasoning.runtime.signals import TrainingInterruptedError
from latent_reasoning.sft.examples import latent_examples
from latent_reasoning.sft.latent_sft import LatentSftTask
from latent_reasoning.training.gradients import accumulate_gradients
from tests.model.models import build_base
from tests.training.tiny_training import assert_bitwise_equal, out_of_time, run, settings, weights

STEPS = 12
CODI = {
    "training": Training(steps=STEPS, batch_size=8, learning_rate=1e-2, validate_every=STEPS),
    "mask_latent_labels": True,
    "forced_steps": 6,
    "distillation": Distillation(codi_weight=1.0, include_embedding_layer=True),
}


def tiny_base(architecture, tokenizer):
    """A random two-block model with room for the generated rows."""
    if architecture == "llama":
        return build_base(vocabulary=len(tokenizer)).float()
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 256}
    config = GPT2Config(
        **shape, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


def codi(architecture, tokenizer, rows, *, decoder=True, **changes):
    """A task on few rows, its tokenizer changed in place."""
    entry = LatentSftModel(**CODI, step_decoder=StepDecoder() if decoder else None, **changes)
    base = tiny_base(architecture, tokenizer)
    decoder_base = copy.deepcopy(base)
    torch.manual_seed(1)
    model = make_latent(base, tokenizer, Model(recurrent_filter="projection", filter_width=24))
    if entry.lora is not None:
        attach_lora(model, entry.lora)
    if decoder:
        attach_step_decoder(model, decoder_base)
    examples = latent_examples(rows, tokenizer, entry, Data(), name="codi", seed=0)
    return LatentSftTask(
        "codi",
        model,
        examples,
        entry,
        Runtime(device="cpu", micro_batch_size=8),
        seed=0,
        pad_id=tokenizer.pad_token_id,
        validate=dict,
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_codi_with_a_step_decoder_learns(tmp_path, rows, tokenizer, architecture):
    task = codi(architecture, tokenizer, rows)
    before = accumulate_gradients(task.model, task, 0)
    assert {"teacher_loss", "student_loss", "codi_loss", "step_loss"} <= before.keys()
    for name in ("recurrent_filter.input_layer.weight", "step_decoder.decoder.lm_head.weight"):
        gradients = {n: p.grad for n, p in task.model.named_parameters(remove_duplicate=False)}
        assert gradients[name].abs().sum() > 0, name
    task.model.zero_grad()
    run(tmp_path, task, task.entry.training)
    after = accumulate_gradients(task.model, task, 0)
    for part in ("teacher_loss", "student_loss", "step_loss"):
        assert after[part] < 0.8 * before[part], part


def test_a_training_with_a_step_decoder_resumes_to_the_bit(tmp_path, rows, tokenizer):
    training = settings(steps=4)
    models = []
    for name in ("whole", "killed"):
        task = codi("llama", copy.deepcopy(tokenizer), rows)
        if name == "killed":
            with pytest.raises(TrainingInterruptedError):
                run(tmp_path / name, task, training, stop=out_of_time())
            task = codi("llama", copy.deepcopy(tokenizer), rows)
        run(tmp_path / name, task, training)
        models.append(weights(task.model))
    assert any("step_decoder.decoder." in name for name in models[0])
    assert_bitwise_equal(*models)


def test_a_finished_model_has_no_step_decoder(rows, tokenizer):
    model = codi("llama", tokenizer, rows).model
    detach_step_decoder(model)
    assert step_decoder_of(model) is None
    assert not any("step_decoder" in name for name in model.state_dict())
    detach_step_decoder(model)


def test_frozen_special_rows_stay_as_they_began(tmp_path, rows, tokenizer):
    lora = Lora(r=2, target_modules=["q_proj"], dropout=0.0, train_special_rows=False)
    task = codi("llama", tokenizer, rows, decoder=False, lora=lora)
    before = copy.deepcopy(task.model.special_rows.state_dict())
    run(tmp_path, task, settings(steps=2))
    assert_bitwise_equal(before, task.model.special_rows.state_dict())
    table = task.model.base.get_input_embeddings().weight.clone()
    merge_lora(task.model)
    merged = task.model.base.get_input_embeddings().weight
    start = task.model.settings.start_id
    assert torch.equal(merged[start], before["start.weight"][0])
    assert torch.equal(merged[:start], table[:start])


def test_the_steps_of_the_teachers_text_are_what_latent_inputs_stand_for(rows, tokenizer):
    task = codi("llama", tokenizer, rows)
    for row, example in zip(rows, task.examples, strict=True):
        texts = [tokenizer.decode(text) for text in example.student.step_texts]
        eos = tokenizer.eos_token
        assert texts == [f"{step}{eos}" for step in row.steps[:-1]]
