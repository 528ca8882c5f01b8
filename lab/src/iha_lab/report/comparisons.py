"""IHA against the baselines of an experiment, each difference with its corrected p."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iha_lab.experiments import configs, load, read
from iha_lab.experiments.config import Run
from iha_lab.experiments.summary import Row, summarize
from iha_lab.stats import Mean, holm

LONGEST = "at the longest length"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One folder of results, and what it is to show.

    `measure` may be LONGEST; `higher` is whether more of it is better. `only` is the IHA that the
    claim is about, of several that ran.
    """

    kind: str
    scale: str
    claim: str
    measure: str
    higher: bool = True
    only: str | None = None

    @property
    def folder(self) -> str:
        return f"{self.kind}-{self.scale}"

    @property
    def command(self) -> str:
        scale = "" if self.scale == "small" else f" --scale {self.scale}"
        return f"iha lab {self.kind}{scale} -o results/{self.folder}"

    @property
    def runs(self) -> list[Run[Any]]:
        sweep = read(configs(self.kind)[self.scale])
        return [*sweep.tuning_runs(), *sweep.runs()]

    def compared(self, results: Path) -> list[Compared]:
        """Take each IHA of each comparison; none where the experiment has not run."""
        if not (results / self.folder).exists():
            return []
        found: list[Compared] = []
        for comparison in summarize(load(results / self.folder)):
            mixed = [row for row in comparison.rows if row.attention.startswith("iha")]
            others = [row for row in comparison.rows if row not in mixed]
            title = f"{comparison.title}: {self.claim}" if comparison.title else self.claim
            found += [
                Compared(self, title, comparison.in_the_paper, row, others)
                for row in mixed
                if self.only in (None, row.attention)
            ]
        return found


@dataclasses.dataclass(frozen=True)
class Compared:
    """One IHA of an experiment against all its baselines."""

    experiment: Experiment
    title: str
    in_the_paper: str
    row: Row
    others: list[Row]

    @property
    def key(self) -> str:
        named = self.experiment.measure
        return list(self.row.measures)[-1] if named == LONGEST else named

    @property
    def differences(self) -> list[Mean | None]:
        return [self.row.minus(other, self.key) for other in self.others]


def corrected(found: Sequence[Compared]) -> list[list[float | None]]:
    """Correct the p-values of all differences together: one list for each of `found`.

    None where there is no test: one seed, or no spread.
    """
    raw = [[None if d is None else d.p for d in one.differences] for one in found]
    tested = iter(holm([p for ps in raw for p in ps if p is not None and not math.isnan(p)]))
    return [
        [next(tested) if p is not None and not math.isnan(p) else None for p in ps] for ps in raw
    ]


def probability(p: float | None) -> str:
    return "—" if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"


def chosen(row: Row) -> str:
    """Say what validation chose for a row."""
    words = ", ".join(f"{axis.replace('_', ' ')} {v:g}" for axis, v in row.selected.items())
    return f" ({words})" if words else ""


def price(row: Row) -> str:
    """Parameters, forward FLOPs of one sequence, seconds of a run."""
    return f"{row.cost['parameters']:,}, {row.cost['total_flops']:.3g}, {row.seconds:.0f} s"
