"""Verdicts follow from numbers."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from iha_lab.theory.finding import COLUMNS, Finding


def finding(measured: float, relation: Literal["≤", "≥"], bound: float) -> Finding:
    return Finding("claim", "setting", "computed", measured, relation, bound)


@pytest.mark.parametrize(
    ("measured", "relation", "bound", "verdict"),
    [
        (1e-13, "≤", 1e-12, "reproduced"),
        (0, "≤", 0, "reproduced"),
        (1e-11, "≤", 1e-12, "not reproduced"),
        (0.5, "≥", 0.1, "reproduced"),
        (0.05, "≥", 0.1, "not reproduced"),
        (math.nan, "≤", 1.0, "not reproduced"),
        (math.nan, "≥", 1.0, "not reproduced"),
        (math.inf, "≤", 1.0, "not reproduced"),
    ],
)
def test_the_verdict_is_the_comparison(
    measured: float, relation: Literal["≤", "≥"], bound: float, verdict: str
) -> None:
    found = finding(measured, relation, bound)
    assert found.verdict == found.record()["verdict"] == found.row()[-1] == verdict
    assert len(found.row()) == len(COLUMNS)


def test_a_row_shows_the_number_and_what_was_wanted() -> None:
    assert finding(3.14e-9, "≤", 1e-6).row()[3] == "3.1e-09 (wanted ≤ 1e-06)"
    assert finding(7, "≥", 1).row()[3] == "7 (wanted ≥ 1)"
    assert finding(math.nan, "≤", 0).row()[3] == "nan (wanted ≤ 0)"
