"""Verdicts and lengths of completions, and the passes of an evaluation."""

import pytest

from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.evaluation import evaluator
from latent_reasoning.evaluation.evaluator import EvaluationSettings, evaluate, predict, score
from latent_reasoning.model.generation import Generation

ROW = Row("test-3", "Where does it end?", ("<<1+1=2>>", "<<2+3=5>>"), "5")


@pytest.fixture
def scored(latent, tokenizer):
    """Score a completion given as text, as if a latent (or plain) model had written it."""

    def score_text(text, *, latent=True, forced_steps=None, cut_off=False, answer="5"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids if cut_off else [*ids, tokenizer.eos_token_id]
        row = Row(ROW.id, ROW.question, ROW.steps, answer)
        generation = Generation(ids, [], 0, cut_off)
        return score(row, generation, tokenizer, latent=latent, forced_steps=forced_steps)

    return score_text


def test_a_latent_completion_takes_n_steps_and_n_plus_2_tokens(scored):
    prediction = scored("<|CONTINUE|><|CONTINUE|><|STOP|> The answer is: 5")
    assert prediction.completion == "<|CONTINUE|><|CONTINUE|><|STOP|> The answer is: 5"
    assert (prediction.correct, prediction.extracted) == (True, "5")
    assert (prediction.latent_steps, prediction.reasoning_tokens) == (2, 4)
    assert (prediction.gold_steps, prediction.id) == (2, "test-3")


def test_stopping_at_once_takes_2_tokens(scored):
    prediction = scored("<|STOP|> The answer is: 4")
    assert (prediction.correct, prediction.extracted) == (False, "4")
    assert (prediction.latent_steps, prediction.reasoning_tokens) == (0, 2)


def test_a_completion_cut_off_in_thought_is_a_wrong_row_with_its_length(scored):
    prediction = scored("<|CONTINUE|>" * 7, cut_off=True)
    assert not prediction.correct
    assert not prediction.well_formatted
    assert prediction.cut_off
    assert prediction.extracted is None
    assert (prediction.latent_steps, prediction.reasoning_tokens) == (7, 8)


def test_the_answer_is_read_after_the_last_prefix(scored):
    text = "<|CONTINUE|><|STOP|> The answer is: 5 The answer is: 3"
    assert not scored(text).correct
    assert scored(text, answer="3").correct
    assert scored(text).reasoning_tokens == 3


def test_thinking_again_before_the_answer_counts_every_latent_token(scored):
    text = "<|CONTINUE|><|STOP|><START><|CONTINUE|><|CONTINUE|><|STOP|> The answer is: 5"
    prediction = scored(text)
    assert (prediction.latent_steps, prediction.reasoning_tokens) == (3, 7)


def test_a_chain_of_thought_counts_the_tokens_before_the_answer(scored, tokenizer):
    steps = "<<(1+1)%7=2>><<(2+3)%7=5>>"
    prediction = scored(f"{steps} The answer is: 5", latent=False)
    expected = len(tokenizer(steps, add_special_tokens=False)["input_ids"])
    assert (prediction.reasoning_tokens, prediction.latent_steps) == (expected, 0)
    assert prediction.correct


def test_an_answer_at_once_has_no_reasoning(scored):
    prediction = scored(" The answer is: 5", latent=False)
    assert (prediction.reasoning_tokens, prediction.correct) == (0, True)


def test_a_chain_of_thought_without_answer_is_wrong_with_all_its_tokens(scored):
    prediction = scored("<<(1+1)%7=2>>", latent=False)
    assert not prediction.well_formatted
    assert prediction.reasoning_tokens > 0


def test_a_forced_completion_is_the_answer_alone(scored):
    prediction = scored(" 5", forced_steps=6)
    assert (prediction.correct, prediction.well_formatted) == (True, True)
    assert (prediction.latent_steps, prediction.reasoning_tokens) == (6, 8)
    assert scored("", forced_steps=6).correct is False
    assert scored(" 5", latent=False, forced_steps=0).reasoning_tokens == 0


def test_predictions_keep_the_rows_order_whatever_the_batch(latent, tokenizer, rows):
    def run(batch_size):
        return predict(latent, tokenizer, rows, EvaluationSettings("", 6, batch_size), None)

    assert run(2) == run(6)
    assert [prediction.id for prediction in run(4)] == [row.id for row in rows]
    assert run(4)[-1].gold_steps is None


def test_the_forced_curve_of_a_latent_model_goes_from_0_to_the_maximum(latent, tokenizer, rows):
    settings = EvaluationSettings("", 4, max_forced_steps=3, forced_rows=5)
    evaluation = evaluate(latent, tokenizer, rows, settings)
    assert [(point.latent_steps, point.n) for point in evaluation.forced] == [
        (0, 5),
        (1, 5),
        (2, 5),
        (3, 5),
    ]
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
    assert curve == [predict(latent, tokenizer, rows, settings, steps) for steps in range(4)]


def test_a_plain_model_has_only_the_forced_answer_at_once(plain, tokenizer, rows):
    settings = EvaluationSettings("Question: ", 4, max_forced_steps=8)
    assert [p.latent_steps for p in evaluate(plain, tokenizer, rows, settings).forced] == [0]


def test_a_model_may_be_evaluated_at_a_forced_length(latent, tokenizer, rows):
    settings = EvaluationSettings("", 4, forced_steps=6)
    evaluation = evaluate(latent, tokenizer, rows, settings)
    assert {p.reasoning_tokens for p in evaluation.predictions} == {8}
    assert all(p.well_formatted for p in evaluation.predictions)
    assert evaluation.forced == []


def test_a_plain_model_cannot_be_forced_to_think(plain, tokenizer, rows):
    with pytest.raises(DataError, match="cannot think"):
        evaluate(plain, tokenizer, rows, EvaluationSettings("", 4, forced_steps=2))
