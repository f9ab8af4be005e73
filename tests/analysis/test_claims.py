"""Verdicts on the paper's claims follow the numbers, thresholds included."""

import pytest

from latent_reasoning.analysis import claims
from latent_reasoning.analysis.claims import claims_of, p_text


def by_claim(results):
    return {(claim.claim, claim.model): claim for claim in claims_of(results)}


def test_every_claim_is_made_of_every_model_it_is_about(three_seeds):
    latent, rl = ["latent-6", "latent-6-by-1"], ["latent-6-rl", "latent-6-by-1-rl"]
    models = {
        "Latent reasoning beats answering at once": latent,
        "RL shortens the reasoning": rl,
        "RL keeps the accuracy": rl,
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


def test_equal_length_everywhere_follows_no_difficulty(written, monkeypatch):
    monkeypatch.setattr(claims, "length_correlation", lambda frame: None)
    claim = by_claim(written(0))["Longer problems get more thought", "latent-6-rl"]
    assert (claim.measured, claim.verdict) == ("r = 0.000", "not reached")


def test_rows_without_steps_cannot_decide_on_difficulty(without_steps):
    claim = by_claim(without_steps)["Longer problems get more thought", "latent-6-rl"]
    assert claim.verdict == "cannot be decided"


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
