"""Records of many runs → means and confidence intervals over seeds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from iha_lab.experiments.config import Run, label, singular
from iha_lab.experiments.records import Record, Result
from iha_lab.stats import Mean

Finished = tuple[Run[Any], Record]


@dataclasses.dataclass(frozen=True)
class Row:
    """One attention: all its seeds, at the best value of what is selected by validation."""

    attention: str
    selected: dict[str, Any]
    measures: dict[str, Mean]
    by_seed: dict[str, dict[int, float]]
    curves: dict[str, list[tuple[float, Mean]]]
    cost: dict[str, Any]
    seconds: float

    def minus(self, other: Row, measure: str) -> Mean | None:
        """Subtract, paired by seed; None where fewer than two seeds are in both."""
        mine, theirs = self.by_seed[measure], other.by_seed[measure]
        both = sorted(mine.keys() & theirs.keys())
        return Mean.of([mine[s] - theirs[s] for s in both]) if len(both) > 1 else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs that differ in attention and seed alone."""

    title: str
    rows: list[Row]
    in_the_paper: str


def summarize(finished: Sequence[Finished]) -> list[Comparison]:
    """Compare within each combination of the axes but attention, seed and what is selected.

    Each attention is shown at its `best` value, on the seeds that did not choose it.
    """
    sweep = finished[0][0].sweep
    selected = sweep.SELECT[0] if sweep.SELECT else None
    fixed = [axis for axis in sweep.AXES if axis not in ("attentions", "seeds", selected)]
    compared: dict[str, dict[str, list[Finished]]] = {}
    paper: dict[str, str] = {}
    for run, record in finished:
        title = ", ".join(label(axis, run.on(axis)) for axis in fixed)
        compared.setdefault(title, {}).setdefault(run.attention.label, []).append((run, record))
        paper[title] = run.in_the_paper()
    rows = {title: [_row(*some) for some in of.items()] for title, of in compared.items()}
    return [
        Comparison(title, [row for row in found if row is not None], paper[title])
        for title, found in rows.items()
    ]


def best(finished: Sequence[Finished]) -> Any:
    """Choose one attention's value on the axis of its sweep's SELECT, which is (axis, measure).

    It is the value whose mean `measure` is highest: over the tuning seeds, or over all where the
    sweep has none. The measure is of validation data, so test data select nothing.
    """
    sweep = finished[0][0].sweep
    axis, measure = sweep.SELECT
    choosing = [(run, r) for run, r in finished if run.seed in sweep.tuning_seeds] or finished
    values: dict[Any, list[float]] = {}
    for run, record in choosing:
        values.setdefault(run.on(axis), []).append(record.result.measures[measure])
    return max(values, key=lambda value: statistics.fmean(values[value]))


def _row(attention: str, finished: list[Finished]) -> Row | None:
    """None where only the tuning seeds have run."""
    sweep = finished[0][0].sweep
    chosen: dict[str, Any] = {}
    if sweep.SELECT:
        axis, value = sweep.SELECT[0], best(finished)
        tried = {run.on(axis) for run, _ in finished}
        chosen = {singular(axis): value} if len(tried) > 1 else {}
        finished = [(run, record) for run, record in finished if run.on(axis) == value]
    finished = [(run, r) for run, r in finished if run.seed not in sweep.tuning_seeds]
    if not finished:
        return None
    results = {run.seed: record.result for run, record in finished}
    first = next(iter(results.values()))
    by_seed = {
        measure: {seed: result.measures[measure] for seed, result in results.items()}
        for measure in first.measures
    }
    return Row(
        attention=attention,
        selected=chosen,
        measures={measure: Mean.of(list(of.values())) for measure, of in by_seed.items()},
        by_seed=by_seed,
        curves={curve: _mean_curve(curve, list(results.values())) for curve in first.curves},
        cost=first.cost,
        seconds=statistics.fmean(record.wall_seconds for _, record in finished),
    )


def _mean_curve(name: str, results: list[Result]) -> list[tuple[float, Mean]]:
    """Average over the points that all have: up to where the first run stopped."""
    curves = [dict(result.curves[name]) for result in results]
    shared = [x for x in curves[0] if all(x in curve for curve in curves)]
    return [(x, Mean.of([curve[x] for curve in curves])) for x in shared]
