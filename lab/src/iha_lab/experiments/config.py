"""A sweep is a typed config; each of its runs has one value on every axis."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import pydantic
import yaml

from iha_lab import baselines
from iha_lab.baselines import AnyAttention, AttentionConfig
from iha_lab.experiments.records import Part, Result

Progress = Callable[[int, int, str], None]  # (how much is done, of how much, a word on how it goes)


class Sweep(Part):
    """What every experiment has: attentions to compare, and seeds.

    Attributes:
        AXES: names of the fields that hold several values. There is a run for each combination.
        RUN: the type of these runs, whose fields are the axes in the singular.
        SELECT: (axis, measure): reports show each attention at that axis' best value by the
            measure, which is of validation data.
        tuning_seeds: seeds that choose this value and that reports leave out. With them each
            attention runs on `seeds` at its chosen value alone.
        match: what makes attentions equally costly: each model's MLP gets the width at which the
            whole costs what plain attention's does.
    """

    AXES: ClassVar[tuple[str, ...]] = ("attentions", "seeds")
    RUN: ClassVar[type[Run[Any]]]
    SELECT: ClassVar[tuple[str, str] | None] = None

    attentions: tuple[AnyAttention, ...] = pydantic.Field(min_length=1)
    seeds: tuple[int, ...] = pydantic.Field((0, 1, 2), min_length=1)
    tuning_seeds: tuple[int, ...] = ()
    match: Literal["nothing", "parameters", "flops"] = "nothing"

    @pydantic.model_validator(mode="after")
    def _unambiguous(self) -> Self:
        names = [run.name for run in self.runs()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(self.AXES)} give two runs the name {twice[0]}")
        if self.tuning_seeds and self.SELECT is None:
            raise ValueError(
                f"tuning_seeds choose nothing in {type(self).__name__}; leave them out"
            )
        return self

    def runs(self) -> list[Run[Any]]:
        """Return a run for every combination of the axes, seeds last."""
        axes = [[(singular(axis), value) for value in getattr(self, axis)] for axis in self.AXES]
        return [self.RUN(self, **dict(values)) for values in itertools.product(*axes)]

    def tuning_runs(self) -> list[Run[Any]]:
        """Return the runs that choose, before any of `runs`."""
        if not self.tuning_seeds:
            return []
        return self.model_copy(update={"seeds": self.tuning_seeds}).runs()

    def only_run(self) -> Run[Any]:
        """Return the run of a config with one value on each axis. Others raise ValueError."""
        runs = self.runs()
        if len(runs) != 1:
            raise ValueError(f"the config must be that of one run, and is that of {len(runs)}.")
        return runs[0]

    def write(self, file: Path) -> None:
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        file.write_text(text, encoding="utf-8")


SweepT = TypeVar("SweepT", bound=Sweep)


@dataclasses.dataclass(frozen=True)
class Run(abc.ABC, Generic[SweepT]):
    """One value on each axis; all other settings are those of the sweep."""

    sweep: SweepT
    _: dataclasses.KW_ONLY
    attention: AttentionConfig
    seed: int

    @property
    def name(self) -> str:
        """The values on all axes, fit for a folder's name."""
        words = (label(axis, self.on(axis)) for axis in self.sweep.AXES)
        return "--".join(re.sub(r"[^A-Za-z0-9._+-]+", "-", word) for word in words)

    @property
    def compared(self) -> str:
        """The values on the axes that a sweep neither repeats (seeds) nor selects."""
        left_out = ("seeds", self.sweep.SELECT[0] if self.sweep.SELECT else None)
        return ", ".join(
            label(axis, self.on(axis)) for axis in self.sweep.AXES if axis not in left_out
        )

    def on(self, axis: str) -> Any:
        """Return the value on an axis."""
        return getattr(self, singular(axis))

    def config(self) -> SweepT:
        """Return the sweep with this run alone: what its folder and its record hold."""
        return self.sweep.model_copy(update={axis: (self.on(axis),) for axis in self.sweep.AXES})

    def matched(self, make: Callable[[Any], Any], config: Any, seq_len: int) -> Any:
        """Return a transformers config as the attention needs it, its MLP's width by `match`."""
        by = self.sweep.match
        if by == "nothing":
            return self.attention.configure(config)
        return baselines.matched(make, config, self.attention, seq_len, by)[0]

    @abc.abstractmethod
    def in_the_paper(self) -> str:
        """Say what the paper itself reports of this comparison, or that it does not."""

    @abc.abstractmethod
    def run(self, folder: Path, progress: Progress) -> Result:
        """Return what was measured; go on from what `folder` holds of the run."""


def singular(axis: str) -> str:
    return axis.removesuffix("s")


def label(axis: str, value: Any) -> str:
    """Return what names and titles call a value of an axis."""
    named = getattr(value, "label", None)
    if named is not None:
        return str(named)
    return value if isinstance(value, str) else f"{singular(axis)}-{value}"
