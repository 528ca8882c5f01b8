"""Records of many runs → means and confidence intervals over seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

from iha_lab.experiments.base import Experiment, label
from iha_lab.experiments.records import Record
from iha_lab.experiments.results import Result


@dataclasses.dataclass(frozen=True)
class Interval:
    """Mean over `count` seeds, and half the width of Student's 95 % confidence interval for it.

    `half` is NaN for one seed, which says nothing about another.
    """

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        n = len(values)
        half = math.nan
        if n > 1:
            half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
        return cls(statistics.fmean(values), half, n)

    def negative(self) -> Interval:
        return dataclasses.replace(self, mean=-self.mean)

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:.4g} (one seed)"
        return f"{self.mean:.4g} ± {self.half:.2g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One attention: all its seeds, at the best value of what is selected by validation."""

    attention: str
    selected: dict[str, Any]
    measures: dict[str, Interval]
    by_seed: dict[str, dict[int, float]]
    curves: dict[str, list[tuple[float, Interval]]]
    cost: dict[str, Any]
    seconds: float

    def minus(self, other: Row, measure: str) -> Interval | None:
        """The difference, paired by seed; None where fewer than two seeds are in both."""
        mine, theirs = self.by_seed[measure], other.by_seed[measure]
        both = sorted(mine.keys() & theirs.keys())
        return Interval.of([mine[s] - theirs[s] for s in both]) if len(both) > 1 else None


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs that differ in attention and seed alone."""

    title: str
    rows: list[Row]
    in_the_paper: str


def summarize(kind: type[Experiment], runs: Sequence[tuple[Experiment, Record]]) -> list[Group]:
    """A group for each combination of the axes that are neither attention, nor seed, nor selected.

    Where `kind.SELECT` is (axis, measure), each attention is shown at the value of that axis whose
    mean `measure` is highest; the measure is of validation data, so test data selects nothing.
    """
    selected = kind.SELECT[0] if kind.SELECT else None
    fixed = [axis for axis in kind.AXES if axis not in ("attentions", "seeds", selected)]
    groups: dict[str, dict[str, list[tuple[Experiment, Record]]]] = {}
    paper: dict[str, str] = {}
    for run, record in runs:
        title = ", ".join(label(axis, getattr(run, axis)[0]) for axis in fixed)
        groups.setdefault(title, {}).setdefault(run.attention.label, []).append((run, record))
        paper[title] = run.in_the_paper()
    return [
        Group(title, [_row(kind, name, some) for name, some in rows.items()], paper[title])
        for title, rows in groups.items()
    ]


def _row(kind: type[Experiment], name: str, runs: list[tuple[Experiment, Record]]) -> Row:
    chosen: dict[str, Any] = {}
    if kind.SELECT:
        axis, measure = kind.SELECT
        values: dict[Any, list[float]] = {}
        for run, record in runs:
            values.setdefault(getattr(run, axis)[0], []).append(record.result["measures"][measure])
        best = max(values, key=lambda value: statistics.fmean(values[value]))
        chosen = {axis.removesuffix("s"): best} if len(values) > 1 else {}
        runs = [(run, record) for run, record in runs if getattr(run, axis)[0] == best]
    results = {run.seed: Result.model_validate(record.result) for run, record in runs}
    first = next(iter(results.values()))
    by_seed = {
        measure: {seed: result.measures[measure] for seed, result in results.items()}
        for measure in first.measures
    }
    return Row(
        attention=name,
        selected=chosen,
        measures={measure: Interval.of(list(of.values())) for measure, of in by_seed.items()},
        by_seed=by_seed,
        curves={curve: _mean_curve(curve, list(results.values())) for curve in first.curves},
        cost=first.cost,
        seconds=statistics.fmean(record.wall_seconds for _, record in runs),
    )


def _mean_curve(name: str, results: list[Result]) -> list[tuple[float, Interval]]:
    """Over the points that all have: it ends where the first run that stopped early does."""
    curves = [dict(result.curves[name]) for result in results]
    shared = [x for x in curves[0] if all(x in curve for curve in curves)]
    return [(x, Interval.of([curve[x] for curve in curves])) for x in shared]
