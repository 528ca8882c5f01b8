"""What the answers of several models to the same questions carry.

A score that is 0 or 1 for each question has Wilson's interval; any other mean, and any difference,
the percentile bootstrap over questions. Differences are paired: question by question, on the same
ones.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy
import scipy.stats

from iha_lab.stats import Accuracy, bootstrap


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over questions and its 95 % interval; no interval where no question differs."""

    value: float
    interval: tuple[float, float] | None


def mean(scores: Sequence[float]) -> Estimate:
    if set(scores) <= {0.0, 1.0}:
        accuracy = Accuracy(int(sum(scores)), len(scores))
        return Estimate(accuracy.value, accuracy.interval())
    return Estimate(math.fsum(scores) / len(scores), bootstrap(scores))


def difference(scores: Sequence[float], first: Sequence[float]) -> Estimate:
    """Mean of `scores` minus that of `first`, of the same questions in the same order."""
    differences = [one - other for one, other in zip(scores, first, strict=True)]
    return Estimate(math.fsum(differences) / len(scores), bootstrap(differences))


def average_ranks(table: Sequence[Sequence[float]]) -> list[float]:
    """Each model's rank (1 is the best, ties share theirs), averaged over scores.

    `table` has a row for each score, a column for each model.
    """
    ranks = scipy.stats.rankdata(-numpy.asarray(table), axis=1)
    return [float(rank) for rank in ranks.mean(0)]


def identical(answers: Sequence[Sequence[str]], first: Sequence[Sequence[str]]) -> int:
    """How many questions got the very same answers."""
    return sum(list(one) == list(other) for one, other in zip(answers, first, strict=True))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Of `samples` answers, `right` are right: the chance that one of k drawn at random is.

    1 − C(n−c, k) / C(n, k), without bias (Chen et al., arXiv 2107.03374).
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
