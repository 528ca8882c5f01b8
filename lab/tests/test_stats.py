"""Intervals against numbers from tables and from the formulas."""

from __future__ import annotations

import math

import pytest

from iha_lab.stats import Accuracy, Mean, bootstrap, holm


def test_students_interval() -> None:
    # By hand: mean 3, standard deviation 2, t(0.975, 2) = 4.3027, so 4.3027 · 2 / √3.
    found = Mean.of([1.0, 3.0, 5.0])
    assert (found.mean, found.count) == (3, 3)
    assert found.half == pytest.approx(4.9683, abs=1e-4)
    assert str(found) == "3 ± 5"
    assert math.isnan(Mean.of([2.0]).half)
    assert str(Mean.of([2.0])) == "2 (one seed)"


def test_students_test_agrees_with_the_interval() -> None:
    # t = 3 / (2 / √3) = 2.598 with two degrees of freedom.
    assert Mean.of([1.0, 3.0, 5.0]).p == pytest.approx(0.1217, abs=1e-4)
    at_the_edge = Mean(4.0, 4.0, 3)
    assert at_the_edge.p == pytest.approx(0.05)
    assert math.isnan(Mean.of([2.0]).p)
    assert math.isnan(Mean.of([2.0, 2.0]).p)


def test_holms_correction() -> None:
    # By hand: 3 · 0.01, 2 · 0.02, 1 · 0.03 raised to the one before it.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("correct", "total"), [(0, 5), (5, 5), (3, 5), (37, 64), (1, 1)])
def test_wilsons_interval(correct: int, total: int) -> None:
    """Its ends are where a normal test of the share just rejects: |p̂ - p| = z √(p(1 - p)/n)."""
    found = Accuracy(correct, total)
    assert 0 <= found.interval()[0] <= found.value <= found.interval()[1] <= 1
    for end in found.interval():
        deviation = 1.959964 * math.sqrt(end * (1 - end) / total)
        assert abs(found.value - end) == pytest.approx(deviation, abs=1e-6)


def test_the_bootstraps_interval() -> None:
    """Near the normal one for many values; none where there is no spread; always the same."""
    values = [float(i % 7) for i in range(700)]
    found = bootstrap(values)
    assert found is not None
    half = 1.96 * 2 / math.sqrt(len(values))  # 0 … 6 have the standard deviation 2
    assert found == pytest.approx((3 - half, 3 + half), abs=0.02)
    assert bootstrap(values) == found
    assert bootstrap([0.5] * 9) is None
