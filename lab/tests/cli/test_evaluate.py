"""`iha eval` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from iha_lab.cli import main
from lab.tests.eval.scripted import gsm8k, save_tiny


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["iha", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    where = tmp_path_factory.mktemp("models")
    return save_tiny(where / "plain"), save_tiny(where / "upcycled", pseudo_heads=2)


def test_two_models_are_compared(
    models: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    task = ["--tasks", "gsm8k", "--data", gsm8k(tmp_path, 5), "--max-new-tokens", 4]
    assert run(monkeypatch, *models, *task, "--limit", 3, "-o", output) == 0
    printed = capsys.readouterr().out
    for word in ("gsm8k", "EM", "identical answers: 3 of 3", "average rank", "3/3", "Written:"):
        assert word in printed
    assert "Generating" not in printed  # the harness's own talk
    result = json.loads((output / "result.json").read_text())
    assert result["limit"] == 3
    assert result["models"] == list(models)
    assert "identical answers: 3 of 3" in (output / "report.html").read_text()
    assert len(list((output / "samples").glob("*/gsm8k.jsonl.gz"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "rulers"], "suite must be one of ruler, math, code, paper"),
        (["--lengths", "4k"], "lengths must be whole numbers with commas, got '4k'"),
        (["--dtype", "int8"], "dtype must be float32, bfloat16 or float16, got 'int8'"),
        (["--suite", "code"], "run programs that the model wrote; give --run-code"),
        (["--tasks", "gsm8k"], "gsm8k needs the data set openai/gsm8k"),
    ],
)
def test_an_error_is_one_sentence(
    arguments: list[str],
    message: str,
    models: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, models[0], *arguments, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_or_killed_the_same_command_goes_on(
    stop: signal.Signals,
    models: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    arguments = [models[0], "--tasks", "gsm8k", "--data", str(gsm8k(tmp_path, 20))]
    arguments += ["--max-new-tokens", "50", "--batch-size", "1", "-o", str(output)]
    command = [sys.executable, "-m", "iha_lab.cli", "eval", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def answered() -> list[str]:
        files = output.glob("answers/*/*.jsonl")
        return [line for file in files for line in file.read_text().splitlines(keepends=True)]

    while not answered():
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(stop)
    out, _ = running.communicate(timeout=60)
    if stop is signal.SIGINT:
        assert running.returncode == 130
        assert "the same command goes on from there" in out
    before = answered()
    assert 0 < len(before) < 20

    assert run(monkeypatch, *arguments) == 0
    after = answered()
    assert after[: len(before) - 1] == before[:-1]  # the last one may have been cut off
    keys = [json.loads(line)["key"] for line in after if line.endswith("}\n")]
    assert len(keys) == len(set(keys)) == 20
