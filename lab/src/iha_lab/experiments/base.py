"""An experiment is a typed config; a run is the same config with one value on each axis."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import yaml
from typing_extensions import Self

from iha_lab import baselines
from iha_lab.baselines.choices import Choice
from iha_lab.experiments.results import Part, Result

Progress = Callable[[int, int, str], None]  # (how much is done, of how much, a word on how it goes)


class Experiment(Part):
    """What every experiment has: attentions to compare, and seeds.

    `AXES` names the fields that hold several values; an experiment is run for each combination.
    `SELECT` is (axis, measure): reports show each attention at that axis' best value by the
    measure, which is of validation data. `match` makes attentions equally costly: each model's MLP
    gets the width at which the whole costs what plain attention's does.
    """

    AXES: ClassVar[tuple[str, ...]] = ("attentions", "seeds")
    SELECT: ClassVar[tuple[str, str] | None] = None

    attentions: tuple[Choice, ...] = pydantic.Field(min_length=1)
    seeds: tuple[int, ...] = pydantic.Field((0, 1, 2), min_length=1)
    match: Literal["nothing", "parameters", "flops"] = "nothing"

    @pydantic.model_validator(mode="after")
    def _unambiguous(self) -> Self:
        names = [run.name for run in self.runs()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(self.AXES)} give two runs the name {twice[0]}")
        return self

    def runs(self) -> list[Self]:
        """One config for each combination of the axes, seeds last."""
        values = [[(axis, value) for value in getattr(self, axis)] for axis in self.AXES]
        return [
            self.model_copy(update={axis: (value,) for axis, value in combination})
            for combination in itertools.product(*values)
        ]

    @property
    def name(self) -> str:
        """Of a run: its values on all axes, fit for a folder's name."""
        words = [label(axis, value) for axis in self.AXES for value in getattr(self, axis)]
        return "--".join(re.sub(r"[^A-Za-z0-9._+-]+", "-", word) for word in words)

    @property
    def attention(self) -> Choice:
        """Of a run: its only one."""
        (attention,) = self.attentions
        return attention

    @property
    def seed(self) -> int:
        """Of a run: its only one."""
        (seed,) = self.seeds
        return seed

    def matched(self, make: Callable[[Any], Any], config: Any, seq_len: int) -> Any:
        """Of a run: the transformers config of its model, with the MLP's width by `match`."""
        if self.match == "nothing":
            return config
        return baselines.matched(make, config, self.attention, seq_len, self.match)[0]

    def in_the_paper(self) -> str:
        """Of a run: what the paper itself reports of this comparison, or that it does not."""
        raise NotImplementedError

    def run(self, folder: Path, progress: Progress) -> Result:
        """Do one run; return what it measured. Continues from what `folder` holds of it."""
        raise NotImplementedError

    def write(self, file: Path) -> None:
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        file.write_text(text, encoding="utf-8")


def label(axis: str, value: Any) -> str:
    """What names and titles call a value of an axis."""
    named = getattr(value, "label", None)
    if named is not None:
        return str(named)
    return value if isinstance(value, str) else f"{axis.removesuffix('s')}-{value}"
