"""What is counted as executed, and the formula of the least that the work needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import flops
from benchmarks.flops import Needs, Text
from benchmarks.inputs import SHAPES, Inputs, build_inputs

D, F, V, L, S = 8, 12, 640, 2, 4
TINY = replace(
    SHAPES["h128"],
    hidden_size=D,
    intermediate_size=F,
    layers=L,
    heads=2,
    key_value_heads=1,
    rows=2,
)
KEYS_AND_VALUES = 2 * 2 * D * S
REST = 2 * (2 * D * 2 * S + 3 * D * F)
ATTENTION = 4 * 2 * S
"""A query against one key, and its value."""


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return build_inputs(TINY)


def test_products_are_counted_forward_and_backward():
    weight, states = torch.ones(3, 5, requires_grad=True), torch.ones(7, 3, requires_grad=True)
    assert flops.executed(lambda: (states @ weight).sum().backward()) == 3 * 2 * 7 * 3 * 5


def test_attention_of_a_cpu_is_counted():
    states = torch.ones(2, 4, 6, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert flops.executed(lambda: attend(states, states, states)) == 2 * 2 * (2 * 4 * 6 * 6 * 8)


def test_a_text_read_whole_costs_what_the_model_executes(inputs):
    ids = torch.randint(2, 600, (1, 9))
    text = Text(ids[0].tolist(), [Needs.VOCABULARY] * 9)

    @torch.no_grad()
    def read() -> None:
        model = inputs.model
        model.full_logits(model(ids, torch.ones_like(ids)))

    stop_logits = 9 * 2 * 2 * D
    """Computed at every position by `full_logits`."""
    unseen = L * ATTENTION * (9 * 9 - 9 * 10 // 2)
    executed = flops.executed(read) - stop_logits - unseen
    assert flops.minimum(inputs.model, [[text]]) == executed
    assert executed == 9 * (L * (KEYS_AND_VALUES + REST) + 2 * D * V) + L * ATTENTION * 45


def test_what_nothing_reads_ends_with_its_keys_and_values(inputs):
    text = Text([2, 3], [Needs.NOTHING, Needs.STATE])
    blocks = 2 * L * KEYS_AND_VALUES + (2 * L - 1) * REST
    seen = (L - 1) * 1 + L * 2
    assert flops.minimum(inputs.model, [[text]]) == blocks + ATTENTION * seen


def test_a_beginning_that_texts_share_costs_once(inputs):
    def text(*ids: int) -> Text:
        return Text(ids, [Needs.STATE] * len(ids))

    together = flops.minimum(inputs.model, [[text(2, 3, 4), text(2, 3, 5, 6), text(2, 3)]])
    apart = flops.minimum(inputs.model, [[text(2, 3, 4)], [text(2, 3, 5, 6)], [text(2, 3)]])
    twice = 2 * flops.minimum(inputs.model, [[text(2, 3)]])
    assert together == apart - twice


def test_a_latent_step_costs_its_filter_and_reads_the_state_before(inputs):
    special = inputs.model.settings
    thought = flops.answered(
        [2, special.start_id], [special.continue_id, special.stop_id, 5], special
    )
    assert thought.ids == [2, special.start_id, special.continue_id, special.stop_id]
    assert thought.needs == [Needs.NOTHING, Needs.DECISION, Needs.DECISION, Needs.VOCABULARY]
    plain = Text([2, 3, 4, 5], thought.needs)
    mlp = 2 * 2 * D * D
    difference = flops.minimum(inputs.model, [[thought]]) - flops.minimum(inputs.model, [[plain]])
    assert difference == mlp
    given = Text(thought.ids, [Needs.NOTHING] * 3 + [Needs.VOCABULARY])
    forced = flops.minimum(inputs.model, [[given]])
    unread = L * 4 * KEYS_AND_VALUES + (4 * L - 2) * REST + ATTENTION * (L * 10 - 1 - 3)
    assert forced == unread + mlp + 2 * D * V


def test_a_row_of_sft_is_read_to_its_last_label(inputs):
    row, special = inputs.sft[0], inputs.model.settings
    teacher, student = flops.taught(row, special)
    assert len(teacher.ids) == len(row.teacher) - 1
    question = row.teacher.question_length
    assert set(teacher.needs[: question - 1]) == {Needs.NOTHING}
    assert set(teacher.needs[question:]) == {Needs.VOCABULARY}
    run = student.needs[question : question + 8]
    assert run == [Needs.DECISION] * 7 + [Needs.VOCABULARY]
