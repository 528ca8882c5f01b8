"""What runs measured, and the records of finished runs: JSON lines that say how to repeat them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pydantic

from iha_lab.files import write_text

FILE = "results.jsonl"


class Part(pydantic.BaseModel):
    """Part of a config or a record: unknown names are errors, values do not change."""

    model_config: ClassVar = pydantic.ConfigDict(extra="forbid", frozen=True)


class Result(Part):
    """What one run measured, in the one form that all tables and figures are made from.

    Attributes:
        cost: that of `baselines.cost`, of the model that ran.
        measures: a number each.
        curves: (x, y) points each.
        notes: whatever else to keep.
    """

    cost: dict[str, Any]
    measures: dict[str, float]
    curves: dict[str, list[tuple[float, float]]] = {}
    notes: dict[str, Any] = {}


class Record(Part):
    """One finished run: its config, what it measured, how long it took and where."""

    name: str
    config: dict[str, Any]
    result: Result
    wall_seconds: float
    machine: dict[str, Any]


def read(file: Path) -> list[Record]:
    """Read all records of a file; none where there is no file. ValueError names a damaged line."""
    if not file.exists():
        return []
    found: list[Record] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            found.append(Record.model_validate_json(line))
        except pydantic.ValidationError:
            raise ValueError(f"{file}, line {number}: no record of a run; delete it.") from None
    return found


def write(file: Path, records: Sequence[Record]) -> None:
    lines = [json.dumps(record.model_dump(mode="json"), ensure_ascii=False) for record in records]
    write_text(file, "".join(line + "\n" for line in lines))


def thinned(values: list[float], points: int = 100) -> list[tuple[float, float]]:
    """Take (last step, mean) of equal stretches of steps: a curve that fits into a record."""
    length = -(-len(values) // points)
    parts = [(i, values[i : i + length]) for i in range(0, len(values), length)]
    return [(float(i + len(part)), round(sum(part) / len(part), 4)) for i, part in parts]
