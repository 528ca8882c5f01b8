"""The case `against-plain`: what it writes and says. No test looks at a time itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from iha_lab.bench import against_plain
from iha_lab.cli.app import app


def test_it_writes_ratios_predictions_and_peaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(against_plain, "STEPS", ((16, 2, 32, 32, 1, (2, 4)),))
    monkeypatch.setattr(against_plain, "CACHED", 20)
    monkeypatch.setattr(against_plain, "in_a_process", lambda *_: 2**20)
    ran = CliRunner().invoke(app, ["bench", "against-plain", "--output", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    step, decoded = json.loads((tmp_path / "against-plain.json").read_text())["rows"]
    for row in (step, decoded):
        assert list(row["times"]) == ["plain", "P = 2", "P = 4"]
        assert list(row["ratios"]) == ["P = 2", "P = 4"]
    # The schedule matches attention; mixing comes on top.
    assert 1 < step["counted"]["P = 2"] < step["counted"]["P = 4"] < 2
    assert decoded["peak"] == {"plain": 2**20, "P = 2": 2**20, "P = 4": 2**20}
    assert "counted" in ran.output
    assert "P = 4 1.0 MiB" in ran.output
