"""The step decoder: which text belongs to which latent input, and its loss."""

from __future__ import annotations

import pytest
import torch

from latent_reasoning.data.step_texts import texts_of_groups, texts_of_inputs
from latent_reasoning.model.step_decoder import (
    StepBatch,
    StepDecoder,
    attach_step_decoder,
    step_loss,
)
from tests.model.models import CONTINUE, EOS, HIDDEN, START, STOP, build_base, build_reasoner


def test_the_last_input_stands_for_all_steps_that_are_left():
    steps = [[5], [6, 7], [8]]
    assert texts_of_inputs(steps, 4, EOS) == [[5, EOS], [6, 7, EOS], [8, EOS]]
    assert texts_of_inputs(steps, 2, EOS) == [[5, EOS], [6, 7, 8, EOS]]
    assert texts_of_inputs(steps, 1, EOS) == [[5, 6, 7, 8, EOS]]
    assert texts_of_inputs([], 3, EOS) == []


def test_groups_without_a_removed_step_stand_for_the_rest_of_the_row():
    steps, rest = [[5], [6, 7], [8]], [9, 10]

    def texts(removed, groups):
        return texts_of_groups(removed, rest, groups, separator=[2], eos_id=EOS)

    assert texts(steps, 2) == [[5, EOS], [6, 7, 2, 8, EOS]]
    assert texts(steps[:1], 3) == [[5, EOS], [9, 10, EOS], [9, 10, EOS]]
    assert texts([], 1) == [[9, 10, EOS]]
    assert texts(steps, 0) == []


IDS = torch.tensor([[3, START, CONTINUE, CONTINUE, STOP, 4], [START, CONTINUE, STOP, 4, 5, 6]])
TEXTS = [[[5, EOS], [6, 7, EOS]], [[8, EOS]]]


def plain_loss(host, decoder, hidden, texts, slot_size, normalise):
    """One text at a time, by the decoder's own forward."""
    slots = {}
    for row, row_texts in enumerate(texts):
        thinking = [c for c in range(6) if IDS[row, c] in (START, CONTINUE)]
        for slot, text in enumerate(row_texts):
            columns = thinking[slot * slot_size : (slot + 1) * slot_size]
            latents = host.latent_input(hidden[row, columns])
            inputs = torch.cat([latents, host.embed(torch.tensor(text))])[None]
            logits = decoder(inputs_embeds=inputs).logits[0, slot_size - 1 : -1]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(text), reduction="none")
            slots.setdefault(slot, []).append(losses)
    sums = [torch.cat(losses) for losses in slots.values()]
    parts = [s.mean() if normalise == "tokens" else s.sum() / len(texts) for s in sums]
    return sum(parts) / len(parts)


@pytest.mark.parametrize("normalise", ["tokens", "rows"])
@pytest.mark.parametrize(("group", "texts"), [(1, TEXTS), (2, [[[5, EOS]], [[6, 7, 8, EOS]]])])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_is_that_of_one_text_at_a_time(architecture, group, texts, normalise):
    host = build_reasoner(architecture).float()
    decoder = build_base(architecture).float()
    attach_step_decoder(host, decoder)
    hidden = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(0))
    plan = StepBatch.plan(IDS, texts, host.settings, group)
    own = step_loss(host, hidden, plan, normalise)
    expected = plain_loss(host, decoder, hidden, texts, group, normalise)
    torch.testing.assert_close(own, expected)


def test_a_decoder_of_another_width_has_a_layer_in_front():
    decoder = StepDecoder(build_base().float(), HIDDEN + 3)
    assert decoder.input_layer.weight.shape == (HIDDEN, HIDDEN + 3)


def test_more_texts_than_latent_inputs_are_refused_and_none_is_no_batch():
    settings = build_reasoner().settings
    with pytest.raises(ValueError, match="row 1 has 3 texts for 2 latent inputs"):
        StepBatch.plan(IDS, [[], [[5]] * 3], settings)
    assert StepBatch.plan(IDS, [[], []], settings) is None
