"""Records of finished runs: JSON lines, with what is needed to judge and repeat them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from iha_lab.files import write_text

FILE = "results.jsonl"


class Record(pydantic.BaseModel):
    """One finished run: its config, what it measured, how long it took and where."""

    name: str
    config: dict[str, Any]
    result: dict[str, Any]
    wall_seconds: float
    machine: dict[str, Any]


def read(file: Path) -> list[Record]:
    """All records of a file; none where there is no file. ValueError names a damaged line."""
    if not file.exists():
        return []
    found: list[Record] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found.append(Record.model_validate_json(line))
        except pydantic.ValidationError:
            raise ValueError(f"{file}, line {number}: no record of a run; delete it.") from None
    return found


def write(file: Path, records: Sequence[Record]) -> None:
    lines = [json.dumps(record.model_dump(), ensure_ascii=False) for record in records]
    write_text(file, "".join(line + "\n" for line in lines))
