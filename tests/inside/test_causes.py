"""Lens, interventions and need on hand-made models whose right values are known."""

from __future__ import annotations

from fractions import Fraction

import numpy
import pytest
import torch

from latent_reasoning.config import UserError
from latent_reasoning.inside.errors import error_shares, first_errors
from latent_reasoning.inside.interventions import (
    choose_donors,
    counterfactual_shares,
    effects,
    hits_and_chance,
    intervene,
)
from latent_reasoning.inside.lens import lens_matrix, read_words
from latent_reasoning.inside.need import agreement, forced_accuracy, needed_steps
from latent_reasoning.inside.reasoning import Subject, read_reasoning
from latent_reasoning.inside.walk import Walk
from latent_reasoning.model.generation import generate
from latent_reasoning.model.stop_rules import word_logits
from tests.inside import handmade
from tests.inside.conftest import rows as tiny_rows
from tests.model.models import EOS, build_reasoner, build_tokenizer

ROWS = handmade.rows()


@pytest.fixture(scope="module")
def one_hot():
    subject = handmade.subject()
    return subject, read_reasoning(subject, ROWS, most=5)


@pytest.fixture(scope="module")
def constant():
    subject = handmade.subject(constant=True)
    return subject, read_reasoning(subject, ROWS, most=5)


def test_the_one_hot_model_is_right_and_stops_before_the_last_operation(one_hot):
    _, reasoning = one_hot
    assert reasoning.steps.tolist() == [len(row.steps) - 1 for row in ROWS]
    assert reasoning.own["correct"].all()


def test_the_lens_reads_every_value_at_its_own_step_and_no_other_rows_value(one_hot):
    subject, reasoning = one_hot
    tokens, words = read_words(subject, reasoning)
    table = lens_matrix(subject, reasoning, tokens)
    table = table[table["role"] == "all"]
    right = table[(table["answers"] == "right") & (table["reading"] == "top1")]
    own = right[right["value"] == right["step"] + 1]
    assert (own["accuracy"] == 1).all()
    assert own["n"].tolist() == [40, 30, 20, 10]
    control = table[(table["reading"] == "control_top1") & (table["value"] == table["step"] + 1)]
    assert control["accuracy"].max() < 0.5
    first = words[(words["id"] == "test-2") & (words["rank"] == 1)]
    assert first["token"].tolist() == [f" {e.result}" for e in reasoning.equations[2]]
    assert first["probability"].min() > 0.99
    assert first["entropy"].max() < 1e-3


def test_an_error_enters_where_a_value_is_first_read_wrong(one_hot):
    subject, reasoning = one_hot
    table = error_shares(first_errors(subject, reasoning, read_words(subject, reasoning)[0]))
    assert set(table["answers"]) == {"right"}
    assert table.loc[0, ["operations", "entered", "n", "correct"]].tolist() == [0, 0, 30, 0]
    subject = handmade.subject(slips=True)
    slipped = read_reasoning(subject, ROWS, most=5)
    rows = first_errors(subject, slipped, read_words(subject, slipped)[0])
    begins = numpy.array([ROWS[i].question.startswith(" 0") for i in rows["row"]])
    assert 2 <= begins.sum() < 15
    numpy.testing.assert_array_equal(~rows["correct"], begins)
    assert (rows["entered"] == numpy.where(begins, 1, rows["operations"])).all()
    wrong = error_shares(rows).query("answers == 'wrong'").iloc[0]
    assert wrong["accuracy"] == wrong["follows_accuracy"] == 1
    assert wrong["follows_n"] == rows["implied"].notna().sum() >= 2  # those that are chains
    assert wrong["chance"] < 1


def test_a_donors_latent_gives_exactly_the_answer_that_its_value_implies(one_hot):
    subject, reasoning = one_hot
    donors = choose_donors(reasoning)
    table = intervene(subject, reasoning, donors)
    shares = counterfactual_shares(table, donors)
    own = shares[(shares["step"] == shares["value"]) & (shares["role"] == "all")]
    assert len(own) == 3
    assert (own["accuracy"] == 1).all()
    assert (own["kept"] == 0).all()
    assert (own["chance"] < 0.5).all()
    assert (own["difference_low"] > 0).all()


def test_nothing_changes_the_constant_model(constant):
    subject, reasoning = constant
    donors = choose_donors(reasoning)
    table = effects(intervene(subject, reasoning, donors))
    assert set(table["kind"]) == {"zero", "mean", "noise", "order", "donor"}
    assert (table[["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    assert (table["p_mcnemar"] == 1).all()


def test_an_intervention_at_a_step_spares_rows_that_do_not_take_it(one_hot):
    subject, reasoning = one_hot
    table = intervene(subject, reasoning, choose_donors(reasoning))
    zero = table[table["kind"] == "zero"]
    taken = reasoning.steps.numpy()
    for step in (1, 2, 3):
        rows = zero.loc[zero["step"] == step, "row"].to_numpy(dtype=int)
        assert rows.tolist() == numpy.flatnonzero(taken >= step).tolist()


def test_a_chance_row_is_the_share_of_other_rows_answers(one_hot):
    subject, reasoning = one_hot
    donors = choose_donors(reasoning)
    table = intervene(subject, reasoning, donors)
    shares = counterfactual_shares(table, donors)
    line = shares[(shares["step"] == 1) & (shares["value"] == 1)].iloc[0]
    cell = table[(table["kind"] == "donor") & (table["step"] == 1)]
    wanted = {i: a[0] for i, a in enumerate(donors.answers) if a and a[0] is not None}
    cell = cell[cell["row"].isin(wanted)]
    given = dict(zip(cell["row"], cell["answer"].astype(int), strict=True))
    others = [[a == wanted[i] for j, a in given.items() if j != i] for i in given]
    expected = numpy.mean([numpy.mean(answers) for answers in others])
    assert line["n"] == len(cell)
    assert line["chance"] == pytest.approx(expected)


def test_answers_are_compared_exactly_whatever_their_size():
    given = ["1e999", "3", "0.333333", None, float("nan"), "3.00001", "1" * 400]
    wanted = [Fraction(10**999), Fraction(3), Fraction(1, 3), *[Fraction(3)] * 4]
    hits, chance = hits_and_chance(given, wanted)
    assert hits.tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert chance[3] == pytest.approx(1 / 6)


def test_the_one_hot_model_needs_no_step_and_leaves_all_on_the_table(one_hot):
    _, reasoning = one_hot
    needed = needed_steps(reasoning)
    assert (needed["needed"] == 0).all()
    summary = agreement(needed)
    assert summary["left_mean"] == pytest.approx(reasoning.steps.float().mean().item())
    curve = forced_accuracy(reasoning)
    assert curve.loc[curve["operations"] == 0, "n"].tolist() == [40] * 6


def marked(marker: int | None) -> Subject:
    """A random model that stops where a word is the likeliest."""
    model = build_reasoner(max_latent_steps=3, stop_rule="marker", marker_id=marker)
    return Subject(model.requires_grad_(False), build_tokenizer(), "", batch=16)


def test_a_row_stops_where_the_marker_is_likeliest_though_all_other_words_together_are_more_so():
    rows, model = tiny_rows(12), marked(None).model
    first = read_reasoning(marked(None), rows, most=0).hidden[:, 0]
    words = word_logits(model.vocabulary_logits(first), model.settings).argmax(-1)
    subject = marked(int(words[words != EOS].mode().values))
    reasoning = read_reasoning(subject, rows, most=3)
    options = {"max_new_tokens": 8, "eos_id": EOS, "batch_size": 4}
    generated = generate(subject.model, reasoning.prompts, **options)
    assert reasoning.steps.tolist() == [one.latent_steps for one in generated]
    assert reasoning.stops[reasoning.steps == 0, 0].min() < 0.5


def test_a_model_that_samples_its_latent_inputs_is_refused():
    model = build_reasoner(recurrent_filter="gaussian", latent_noise=0.5)
    with pytest.raises(UserError, match=r"samples its latent inputs \(latent_noise: 0\.5"):
        read_reasoning(Subject(model, build_tokenizer()), tiny_rows(2), most=1)


def test_a_walk_that_nothing_touches_is_the_models_own(one_hot):
    subject, reasoning = one_hot
    walk = Walk.begin(subject.model, reasoning.prompts[:3])
    fork = walk.fork().run(2, lambda j, inputs: torch.zeros_like(inputs))
    walk.run(5)
    assert torch.equal(torch.stack(walk.hidden, 1), reasoning.hidden[:3])
    assert not torch.equal(fork.hidden[1], walk.hidden[1])
    other = Walk.begin(subject.model, reasoning.prompts[:3])
    other.replace_state(walk.hidden[2])
    assert torch.equal(other.next_input(), walk.inputs[2])
