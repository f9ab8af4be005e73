"""Verdicts and lengths of completions, and the passes of an evaluation."""

from dataclasses import replace

import pytest

from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.evaluation import evaluator
from latent_reasoning.evaluation.evaluator import (
    EvaluationSettings,
    evaluate,
    predict,
    prediction_of,
    validate,
)
from latent_reasoning.model.generation import Generation
from latent_reasoning.runtime.parallel import OneProcess, SeveralProcesses

ROW = Row("test-3", "Where does it end?", ("<<1+1=2>>", "<<2+3=5>>"), "5")


@pytest.fixture
def scored(latent, tokenizer):
    """Score a completion given as text, as if a latent (or plain) model had written it."""

    def score_text(text, *, latent=True, forced_steps=None, cut_off=False, answer="5"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids if cut_off else [*ids, tokenizer.eos_token_id]
        row = Row(ROW.id, ROW.question, ROW.steps, answer)
        generation = Generation(ids, [], 0, cut_off)
        return prediction_of(row, generation, tokenizer, latent=latent, forced_steps=forced_steps)

    return score_text


LATENT_TEXT = "<|CONTINUE|><|CONTINUE|><|STOP|> The answer is: 5"
AGAIN = "<|CONTINUE|><|STOP|><START><|CONTINUE|><|CONTINUE|><|STOP|> The answer is: 5"


def test_a_prediction_holds_the_completion_and_what_is_read_in_it(scored):
    prediction = scored(LATENT_TEXT)
    assert (prediction.id, prediction.completion) == ("test-3", LATENT_TEXT)
    assert (prediction.correct, prediction.extracted) == (True, "5")
    assert (prediction.gold_steps, prediction.cut_off) == (2, False)


@pytest.mark.parametrize(
    ("text", "options", "correct", "steps", "tokens"),
    [
        (LATENT_TEXT, {}, True, 2, 4),  # n + 2
        ("<|STOP|> The answer is: 4", {}, False, 0, 2),  # stopping at once
        (AGAIN, {}, True, 3, 7),  # every latent token before the answer
        ("<|CONTINUE|>" * 7, {"cut_off": True}, False, 7, 8),  # cut off in thought
        ("<|CONTINUE|><|STOP|> The answer is: 5 The answer is: 3", {}, False, 1, 3),
        ("<|STOP|> The answer is: 5 The answer is: 3", {"answer": "3"}, True, 0, 2),
        ("<<(1+1)%7=2>> The answer is: 5", {"latent": False}, True, 0, 7),
        (" The answer is: 5", {"latent": False}, True, 0, 0),
        ("<<(1+1)%7=2>>", {"latent": False}, False, 0, 7),
        (" 5", {"forced_steps": 6}, True, 6, 8),
        ("", {"forced_steps": 6}, False, 6, 8),
        (" 5", {"forced_steps": 0, "latent": False}, True, 0, 0),
    ],
)
def test_verdict_and_length_of_a_completion(scored, text, options, correct, steps, tokens):
    prediction = scored(text, **options)
    answers = "The answer is:" in text or "forced_steps" in options
    assert prediction.well_formatted == answers
    assert (prediction.extracted is None) == (not answers or text == "")
    assert prediction.correct == correct
    assert prediction.cut_off == options.get("cut_off", False)
    assert (prediction.latent_steps, prediction.reasoning_tokens) == (steps, tokens)


def test_predictions_keep_the_rows_order_whatever_the_batch(latent, tokenizer, rows):
    def run(batch_size):
        settings = EvaluationSettings("", 6, batch_size)
        return predict(latent, tokenizer, rows, settings, OneProcess())

    assert run(2) == run(6)
    assert [prediction.id for prediction in run(4)] == [row.id for row in rows]
    assert run(4)[-1].gold_steps is None


def test_the_forced_curve_of_a_latent_model_goes_from_0_to_the_maximum(latent, tokenizer, rows):
    settings = EvaluationSettings("", 4, max_forced_steps=3, forced_rows=5)
    evaluation = evaluate(latent, tokenizer, rows, settings)
    assert [(p.latent_steps, p.n) for p in evaluation.forced] == [(n, 5) for n in range(4)]
    assert len(evaluation.predictions) == 6
    assert evaluation.seconds > 0


def test_a_point_of_the_forced_curve_counts_the_right_answers(latent, tokenizer, rows, monkeypatch):
    digits = [tokenizer(row.answer, add_special_tokens=False)["input_ids"] for row in rows]

    def oracle(model, prompts, ending, *, last, eos_id, **settings):
        """Right for the first `latent steps` rows."""
        return [
            [
                Generation([*(digit if i < steps else []), eos_id], [], 0, False)
                for i, digit in enumerate(digits)
            ]
            for steps in range(last + 1)
        ]

    monkeypatch.setattr(evaluator, "generate_forced", oracle)
    settings = EvaluationSettings("", 4, max_forced_steps=2)
    points = evaluator.forced_curve(latent, tokenizer, rows, settings)
    assert [point.correct for point in points] == [0, 1, 2]


def test_the_forced_curve_equals_an_evaluation_at_each_length(latent, tokenizer, rows):
    settings = EvaluationSettings("Question: ", 5, max_forced_steps=3)
    curve = evaluator._predict_forced(latent, tokenizer, rows, settings, 3)
    for steps, predictions in enumerate(curve):
        forced = replace(settings, forced_steps=steps)
        assert predictions == predict(latent, tokenizer, rows, forced, OneProcess())
    assert len(curve) == 4


def test_a_plain_model_has_only_the_forced_answer_at_once(plain, tokenizer, rows):
    settings = EvaluationSettings("Question: ", 4, max_forced_steps=8)
    assert [p.latent_steps for p in evaluate(plain, tokenizer, rows, settings).forced] == [0]


def test_a_model_may_be_evaluated_at_a_forced_length(latent, tokenizer, rows):
    settings = EvaluationSettings("", 4, forced_steps=6)
    evaluation = evaluate(latent, tokenizer, rows, settings)
    assert {p.reasoning_tokens for p in evaluation.predictions} == {8}
    assert all(p.well_formatted for p in evaluation.predictions)
    assert evaluation.forced == []


@pytest.mark.parametrize("steps", [None, 3])
def test_prompts_past_the_last_position_are_refused_with_their_row(latent, tokenizer, rows, steps):
    latent.position_limit = 20
    settings = EvaluationSettings(prefix="", max_new_tokens=2, max_forced_steps=steps)
    problem = r"reads 20 tokens at most, and \d of 6 prompts are longer \(row test-\d: \d+ tokens\)"
    with pytest.raises(DataError, match=problem):
        evaluate(latent, tokenizer, rows, settings)


def test_a_plain_model_cannot_be_forced_to_think(plain, tokenizer, rows):
    with pytest.raises(DataError, match="cannot think"):
        evaluate(plain, tokenizer, rows, EvaluationSettings("", 4, forced_steps=2))


def written(monkeypatch, tokenizer, texts):
    """Have `generate` write given texts, EOS after them; returns the prompts it was given."""
    asked = []

    def generate(model, prompts, **settings):
        asked.extend(prompts)
        return [Generation(tokenizer(text)["input_ids"], [], 0, False) for text in texts]

    monkeypatch.setattr(evaluator, "generate", generate)
    return asked


def test_a_validation_counts_the_eos_of_a_text_without_an_answer(
    plain, tokenizer, rows, monkeypatch
):
    texts = ["<<(1+1)%7=2>>", f"<<(1+1)%7=2>> The answer is: {rows[1].answer}"]
    written(monkeypatch, tokenizer, [f"{text}{tokenizer.eos_token}" for text in texts])
    measured = validate(plain, tokenizer, rows[:2], EvaluationSettings(""), OneProcess())
    assert measured == {
        "validation_accuracy": 0.5,
        "validation_reasoning_tokens": (8 + 7) / 2,
        "validation_badly_formatted": 0.5,
        "validation_rows": 2,
    }


def test_each_process_writes_its_share_after_its_rows_own_beginnings(
    plain, tokenizer, rows, monkeypatch
):
    asked = written(monkeypatch, tokenizer, [tokenizer.eos_token] * 2)
    process = SeveralProcesses(rank=1, count=3)
    monkeypatch.setattr(process, "gather", lambda own: own)
    beginnings = [[100 + i] for i in range(6)]
    predictions = predict(plain, tokenizer, rows, EvaluationSettings(""), process, beginnings)
    assert [p.id for p in predictions] == ["test-1", "test-4"]
    assert [prompt[-1] for prompt in asked] == [101, 104]
