from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from iha_lab.cli import main
from iha_lab.experiments import records
from lab.tests.experiments.test_runner import TINY


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["iha", "lab", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    code = stop.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    one: dict[str, Any] = {"attentions": [{"kind": "mha"}], "seeds": [0]}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | one))
    return file


def test_an_experiment_runs_shows_its_table_and_is_not_run_again(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    assert run(monkeypatch, "composition", "--config", config, "-o", output) == 0
    told = capsys.readouterr().out
    assert "accuracy" in told
    assert "one seed" in told
    assert (output / "report.html").exists()
    (first,) = records.read(output / "results.jsonl")
    assert run(monkeypatch, "composition", "--config", config, "-o", output) == 0
    assert "1 of 1 runs are finished already" in capsys.readouterr().out
    assert records.read(output / "results.jsonl") == [first]
    assert run(monkeypatch, "report", output, "-o", tmp_path / "page") == 0
    assert (tmp_path / "page" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["composition", "--scale", "huge"], "scale must be one of paper, rivals, small, triples"),
        (["retrieval", "--config", "CONFIG"], "is of another experiment than retrieval"),
        (["composition", "--config", "none.yaml"], "does not exist"),
        (["report", "none"], "holds no finished run"),
    ],
)
def test_what_cannot_be_run(
    arguments: list[str],
    message: str,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(config) if argument == "CONFIG" else argument for argument in arguments]
    assert run(monkeypatch, *given) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_theory_writes_its_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "theory", "-o", tmp_path) == 0
    record = json.loads((tmp_path / "theory.json").read_text())
    assert len(record["claims"]) == 5
    assert "not reproduced" in capsys.readouterr().out  # the inclusion as printed, under causality
