"""Intervals, differences and ranks, against scipy's other ways and against loops."""

from __future__ import annotations

import random

import numpy
import pytest
from scipy import stats

from iha_lab.eval import compare


def test_a_score_of_zeros_and_ones_has_wilsons_interval() -> None:
    scores = [1.0] * 7 + [0.0] * 13
    found = compare.mean(scores)
    expected = stats.binomtest(7, 20).proportion_ci(method="wilson")
    assert found.value == 0.35
    assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_other_means_have_the_bootstraps_interval() -> None:
    chance = random.Random(0)
    scores = [chance.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(60)]
    found = compare.mean(scores)
    means = sorted(sum(chance.choices(scores, k=60)) / 60 for _ in range(20_000))
    assert found.interval is not None
    assert found.interval == pytest.approx((means[500], means[-500]), abs=0.01)


def test_a_difference_is_paired() -> None:
    chance = numpy.random.default_rng(0)
    first = (chance.random(400) < 0.5).astype(float)
    flips = chance.random(400) < 0.1
    second = numpy.where(flips, 1 - first, first)  # nearly the same answers
    found = compare.difference(list(second), list(first))
    expected = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert found.value == pytest.approx(second.mean() - first.mean())
    assert found.interval == pytest.approx((expected.low, expected.high), abs=0.01)
    # Unpaired it would be more than twice as wide.
    unpaired = stats.ttest_ind(second, first).confidence_interval(0.95)
    assert found.interval is not None
    assert 2 * (found.interval[1] - found.interval[0]) < unpaired.high - unpaired.low


def test_where_no_question_differs_there_is_no_interval() -> None:
    assert compare.difference([1, 0, 1], [1, 0, 1]) == compare.Estimate(0.0, None)
    assert compare.mean([0.5, 0.5]) == compare.Estimate(0.5, None)


def test_questions_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare.difference([1, 0], [1])


def test_average_ranks() -> None:
    table = [[0.9, 0.5, 0.7], [0.2, 0.4, 0.4], [0.1, 0.1, 0.1]]
    expected: list[float] = []
    for model in range(3):
        ranks: list[float] = []
        for row in table:
            better = sum(value > row[model] for value in row)
            equal = sum(value == row[model] for value in row)
            ranks.append(better + (equal + 1) / 2)
        expected.append(sum(ranks) / len(ranks))
    assert compare.average_ranks(table) == pytest.approx(expected)


def test_identical_counts_questions_with_all_their_samples() -> None:
    assert compare.identical([["a", "b"], ["c", "d"]], [["a", "b"], ["c", "e"]]) == 1


def test_no_interval_leaves_the_score_or_0_to_1_by_rounding() -> None:
    for total in range(1, 60):
        for correct in (0, total):
            found = compare.mean([1.0] * correct + [0.0] * (total - correct))
            assert found.interval is not None
            assert 0 <= found.interval[0] <= found.value <= found.interval[1] <= 1
