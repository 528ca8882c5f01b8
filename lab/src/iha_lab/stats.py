"""Confidence intervals at 95 %, all of them scipy's."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

LEVEL = 0.95
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean over `count` seeds, and half the width of Student's confidence interval for it.

    `half` is NaN for one seed, which says nothing about another.
    """

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n, half = len(values), math.nan
        if n > 1:
            quantile: Any = stats.t.ppf((1 + LEVEL) / 2, n - 1)
            half = float(quantile) * statistics.stdev(values) / math.sqrt(n)
        return cls(statistics.fmean(values), half, n)

    def negative(self) -> Mean:
        return dataclasses.replace(self, mean=-self.mean)

    @property
    def p(self) -> float:
        """How probable a mean this far from 0 is where the truth is 0, by Student's test.

        NaN for one seed, and where all seeds agree: no spread is no certainty.
        """
        if not self.half > 0:
            return math.nan
        quantile: Any = stats.t.ppf((1 + LEVEL) / 2, self.count - 1)
        return 2 * float(stats.t.sf(abs(self.mean) * quantile / self.half, self.count - 1))

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:.4g} (one seed)"
        return f"{self.mean:.4g} ± {self.half:.2g}"


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, 1979): the chance of one false claim among all.

    The smallest of m is multiplied by m, the next by m − 1, and none falls below one before it.
    """
    adjusted, so_far = list(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        so_far = adjusted[i] = max(so_far, min(1.0, (len(p) - rank) * p[i]))
    return adjusted


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """`correct` answers of `total`."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total

    def interval(self) -> tuple[float, float]:
        """Return Wilson's score interval (1927), which is honest for small counts too."""
        found: Any = stats.binomtest(self.correct, self.total).proportion_ci(LEVEL, "wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.0%} ({low:.0%} to {high:.0%})"


def bootstrap(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of a mean, with a fixed seed.

    None where all values are equal: the bootstrap sees no spread, and that is no certainty.
    """
    if len(set(values)) < 2:
        return None
    found: Any = stats.bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=500,  # of resamples at once
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
