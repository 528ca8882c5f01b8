"""docs/evidence.md says what the files in results/ say, in no stronger words than its intervals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from iha_lab.report import evidence
from iha_lab.stats import Mean

ROOT = Path(__file__).parents[3]


def test_the_page_is_that_of_the_results() -> None:
    assert evidence.written() == (ROOT / "docs" / "evidence.md").read_text()


@pytest.mark.parametrize(
    ("difference", "p", "higher", "word"),
    [
        (Mean(0.2, 0.1, 3), 0.01, True, "better"),
        (Mean(0.2, 0.1, 3), 0.06, True, "better, before the correction"),
        (Mean(0.2, 0.1, 3), None, True, "better, before the correction"),
        (Mean(0.2, 0.1, 3), 0.01, False, "worse"),
        (Mean(-0.2, 0.1, 3), 0.01, False, "better"),
        (Mean(0.2, 0.2, 3), 0.01, True, "not told apart"),
        (Mean(0.2, math.nan, 1), None, True, "one run, says little"),
        (None, None, True, "one run, says little"),
    ],
)
def test_no_word_is_stronger_than_its_interval(
    difference: Mean | None, p: float | None, higher: bool, word: str
) -> None:
    assert evidence.word(difference, p, higher) == word
