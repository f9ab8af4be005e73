"""Verdicts on the paper's claims follow the numbers, thresholds included."""

import pytest

from latent_reasoning.analysis import claims
from latent_reasoning.analysis.claims import claims_of, p_text
from latent_reasoning.runtime.files import write_sums
from tests.analysis.conftest import SKILL, experiment, write_all


def by_claim(results):
    return {(claim.claim, claim.model): claim for claim in claims_of(results)}


def test_every_claim_is_made_of_every_model_it_is_about(three_seeds):
    latent, rl = ["latent-6", "latent-6-by-1"], ["latent-6-rl", "latent-6-by-1-rl"]
    models = {
        "Latent reasoning beats answering at once": latent,
        "RL shortens the reasoning": rl,
        "RL keeps the accuracy": rl,
        "RL keeps the accuracy at every number of steps": rl,
        "Longer problems get more thought": rl,
        "The latent steps do the work": latent + rl,
    }
    assert list(by_claim(three_seeds)) == [(c, m) for c, about in models.items() for m in about]


def test_measured_figures_stand_in_the_claim(written):
    results = written(0)
    shorter = by_claim(results)["RL shortens the reasoning", "latent-6-rl"]
    after = results.summary("latent-6-rl", 0, "test")["reasoning_tokens_mean"]
    assert shorter.measured == f"8.00 to {after:.2f} tokens, {100 * (after / 8 - 1):+.1f} %"
    needed = by_claim(results)["The latent steps do the work", "latent-6"]
    assert needed.measured.startswith("33.00 % against ")
    assert needed.reached


@pytest.mark.parametrize(
    ("claim", "model", "name", "change", "verdict"),
    [
        ("RL shortens the reasoning", "latent-6-rl", "reasoning_tokens_mean", -4.0, "reached"),
        ("RL shortens the reasoning", "latent-6-rl", "reasoning_tokens_mean", -3.99, "not reached"),
        ("RL keeps the accuracy", "latent-6-rl", "accuracy", -0.01, "reached"),
        ("RL keeps the accuracy", "latent-6-rl", "accuracy", -0.0101, "not reached"),
        # A model that answers nothing has no accuracy to keep.
        ("RL keeps the accuracy", "latent-6", "accuracy", None, "cannot be decided"),
    ],
)
def test_rl_halves_the_length_and_loses_at_most_one_point(
    written, change_summary, claim, model, name, change, verdict
):
    results = written(0)
    before = results.summary("latent-6", 0, "test")[name]
    change_summary(results, model, **{name: 0.0 if change is None else before + change})
    assert by_claim(results)[claim, "latent-6-rl"].verdict == verdict


def test_a_loss_at_one_number_of_steps_is_found_though_all_rows_together_lose_little(written):
    """The RL model is wrong on 15 of the rows of four steps that its start gets right."""
    claim = "RL keeps the accuracy at every number of steps"
    results = written(0)
    assert by_claim(results)[claim, "latent-6-rl"].verdict == "reached"
    folder = results.layout.evaluation("latent-6-rl", 0, "test")
    start = results.predictions("latent-6", 0, "test").set_index("id")
    changed = results.predictions("latent-6-rl", 0, "test").set_index("id")
    changed["correct"] = start["correct"]
    worse = changed.index[changed["correct"] & (changed["gold_steps"] == 4)][:15]
    changed.loc[worse, "correct"] = False
    changed.reset_index().to_parquet(folder / "predictions.parquet", index=False)
    write_sums(folder)
    found = by_claim(results)[claim, "latent-6-rl"]
    n = int((changed["gold_steps"] == 4).sum())
    assert found.verdict == "not reached"
    assert f"4: -{100 * 15 / n:.2f} points (p < 0.0001, n = {n})" in found.measured


def test_thresholds_are_those_of_the_configuration(written):
    strict = written(0, report={"claims": {"shortening": 0.9}})
    claim = by_claim(strict)["RL shortens the reasoning", "latent-6-rl"]
    assert (claim.asked[:12], claim.verdict) == ("at least 90 ", "not reached")


def test_thresholds_are_told_to_the_last_digit(written):
    fine = {"points_lost": 0.005, "points_lost_by_steps": 0.025, "shortening": 0.333}
    asked = {c.asked for c in claims_of(written(0, report={"claims": fine}))}
    for words in (
        "at most 0.5 points below",
        "more than 2.5 points below",
        "at least 33.3 % fewer",
    ):
        assert any(words in text for text in asked)


@pytest.mark.parametrize(("steps", "told"), [(100, "as many"), (7, "7 (RL: 100)")])
def test_rl_is_compared_with_further_training(results_root, steps, told):
    models = experiment().model_dump(mode="json", by_alias=True)["models"]
    further = {"stage": "latent_sft", "from": "latent-6", "training": {"steps": steps}}
    SKILL.setdefault("latent-6-further", SKILL["latent-6"])
    results = write_all(experiment(models=models | {"latent-6-further": further}))
    claim = by_claim(results)["RL gives more than further latent SFT", "latent-6-rl"]
    assert claim.asked == (
        f"no less accurate than latent-6-further, with {told} further steps, and shorter"
    )
    assert [pair.reference for pair in results.control_pairs()] == ["latent-6-further"]


def test_equal_length_everywhere_follows_no_difficulty(written, monkeypatch):
    monkeypatch.setattr(claims, "length_correlation", lambda frame: None)
    claim = by_claim(written(0))["Longer problems get more thought", "latent-6-rl"]
    assert (claim.measured, claim.verdict) == ("r = 0.000", "not reached")


def test_rows_without_steps_cannot_decide_on_difficulty(without_steps):
    claim = by_claim(without_steps)["Longer problems get more thought", "latent-6-rl"]
    assert claim.verdict == "cannot be decided"


def test_rows_that_all_have_as_many_steps_cannot_decide_on_difficulty(written):
    results = written(0)
    for model in results.models:
        folder = results.layout.evaluation(model, 0, "test")
        same = results.predictions(model, 0, "test").assign(gold_steps=2)
        same.to_parquet(folder / "predictions.parquet", index=False)
        write_sums(folder)
    claim = by_claim(results)["Longer problems get more thought", "latent-6-rl"]
    assert claim.verdict == "cannot be decided"
    assert claim.measured == "the rows do not differ in reasoning steps"


def test_the_steps_work_is_measured_on_the_rows_of_the_forced_curve(written):
    """The first 20 rows, on which the model is wrong, are those that were forced."""
    results = written(0, evaluation={"forced_rows": 20})
    folder = results.layout.evaluation("latent-6", 0, "test")
    rows = results.predictions("latent-6", 0, "test")
    rows.loc[:19, "correct"] = False
    rows.to_parquet(folder / "predictions.parquet", index=False)
    write_sums(folder)
    claim = by_claim(results)["The latent steps do the work", "latent-6"]
    assert claim.verdict == "not reached"
    assert "against 0.00 %" in claim.measured


def test_seeds_are_averaged_and_tests_are_listed(three_seeds):
    claim = by_claim(three_seeds)["RL keeps the accuracy", "latent-6-rl"]
    assert claim.measured.count("p ") == 3
    r = by_claim(three_seeds)["Longer problems get more thought", "latent-6-rl"].measured
    assert r.count(",") == 2


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0, "p < 0.0001"), (0.004, "p = 0.0040"), (0.143, "p = 0.14"), (1, "p = 1.00")],
)
def test_p_values_are_readable(p, text):
    assert p_text(p) == text
