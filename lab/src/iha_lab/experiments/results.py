"""What a run measured, in the one form that all tables and pictures are made from."""

from __future__ import annotations

from typing import Any, ClassVar

import pydantic


class Part(pydantic.BaseModel):
    """Part of a config: unknown names are errors, values do not change."""

    model_config: ClassVar = pydantic.ConfigDict(extra="forbid", frozen=True)


class Result(Part):
    """`measures`: a number each. `curves`: (x, y) points each. `notes`: whatever else to keep.

    `cost` is that of `rivals.cost`, of the model that ran.
    """

    cost: dict[str, Any]
    measures: dict[str, float]
    curves: dict[str, list[tuple[float, float]]] = {}
    notes: dict[str, Any] = {}


def thinned(values: list[float], points: int = 100) -> list[tuple[float, float]]:
    """(last step, mean) of equal stretches of steps: a curve that fits into a record."""
    length = -(-len(values) // points)
    parts = [(i, values[i : i + length]) for i in range(0, len(values), length)]
    return [(float(i + len(part)), round(sum(part) / len(part), 4)) for i, part in parts]
