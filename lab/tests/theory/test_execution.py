"""All claims in one run: what is printed, written and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iha_lab import theory
from iha_lab.theory import counting
from iha_lab.theory.finding import COLUMNS


class Recorder:
    """A console that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.sections: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}

    def say(self, text: str) -> None:
        self.said.append(text)

    def section(self, title: str) -> None:
        self.sections.append(title)

    def steps(self, title: str, total: int) -> Callable[[int, str], None]:
        return lambda done, note: None

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        assert columns == COLUMNS
        self.tables[title] = rows


def execute(folder: Path) -> tuple[Recorder, dict[str, Any]]:
    console = Recorder()
    file = theory.run(folder / "theory", console)
    assert file == folder / "theory" / "theory.json"
    return console, json.loads(file.read_text(encoding="utf-8"))


def test_a_run_tells_writes_and_draws_everything(tmp_path: Path) -> None:
    console, record = execute(tmp_path)
    assert len(console.sections) == len(console.tables) == len(record["claims"]) == 5
    assert {"date", "versions", "threads", "seconds"} <= record.keys()
    assert record["seconds"] > 0
    for title, rows in console.tables.items():
        written = record["claims"][title]
        assert [row[0] for row in rows] == [finding["claim"] for finding in written]
        assert [row[-1] for row in rows] == [finding["verdict"] for finding in written]
    failed = [row for rows in console.tables.values() for row in rows if row[-1] != "reproduced"]
    assert len(failed) == 3
    for row in failed:
        assert row[-1] == "not reproduced"
        assert any(text.startswith(f"not reproduced: {row[0]}") for text in console.said)
    total = sum(map(len, console.tables.values()))
    assert console.said[-1].startswith(f"{total - 3} of {total} rows reproduced")
    for name in ("strictness", "filters", "patterns"):
        picture = (tmp_path / "theory" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000


def test_a_claim_that_fails_is_told_and_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "HARD", 1.0)  # attention that is not hard
    console, record = execute(tmp_path)
    rows = [finding for finding in record["claims"]["CPM-3"] if "counts right" in finding["claim"]]
    assert {finding["verdict"] for finding in rows} == {"not reproduced"}
    assert any("not reproduced: IHA with 2 heads counts right" in text for text in console.said)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theory").mkdir()
    (tmp_path / "theory" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        theory.run(tmp_path / "theory", Recorder())
    assert [file.name for file in (tmp_path / "theory").iterdir()] == ["notes.txt"]
