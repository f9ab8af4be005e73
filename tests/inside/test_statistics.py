"""Intervals and areas against other ways to compute them."""

from __future__ import annotations

import numpy
import pytest
from sklearn.metrics import roc_auc_score

from latent_reasoning.inside.statistics import auc, mean_interval, paired, share


def test_an_area_is_sklearns_and_lies_in_its_interval():
    generator = numpy.random.default_rng(1)
    right = generator.random(200) < 0.7
    score = numpy.round(right + generator.normal(size=200), 1)  # with ties
    area, low, high = auc(score, right)
    assert area == pytest.approx(roc_auc_score(right, score))
    assert low < area < high
    assert 0.05 < high - low < 0.25
    assert numpy.isnan(auc(score, numpy.ones(200, bool))).all()
    area, low, high = auc(score, numpy.arange(200) > 3)
    assert 0 < area < 1
    assert numpy.isnan([low, high]).all()


def test_the_interval_of_a_mean_is_about_two_standard_errors_each_way():
    values = numpy.random.default_rng(2).normal(3, 1, 400)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert mean_interval(values) == (mean, low, high)


def test_paired_shares_and_shares_of_nothing():
    line = paired([True, False, False, False], [True, True, True, False])
    assert line["difference"] == -0.5
    assert line["p_mcnemar"] == 0.5
    assert share([])["n"] == 0
    assert numpy.isnan(share([])["accuracy"])
    assert share([True, True])["high"] == 1
