"""Runs side by side: resumed, not repeated, and no crash takes another run with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iha_lab.experiments import load, parse, read, records
from iha_lab.experiments.config import Sweep
from iha_lab.experiments.runner import run_all
from iha_lab.experiments.summary import summarize

TINY: dict[str, Any] = {
    "experiment": "composition",
    "relations": [{"factors": 2, "sizes": [2, 3], "density": 0.4}],
    "attentions": [{"kind": "mha"}, {"kind": "iha", "pseudo_heads": 2, "rope": "token"}],
    "learning_rates": [0.003],
    "seeds": [0, 1],
    "hidden_size": 16,
    "num_heads": 2,
    "train": 32,
    "validation": 8,
    "test": 8,
    "batch_size": 8,
    "epochs": 2,
}

ONE: dict[str, Any] = {"attentions": [{"kind": "mha"}], "seeds": [0]}

# Does what a run does, but the work: counts that it was called, and fails or hangs where told.
WORKER = """
    import json, os, sys, time
    from pathlib import Path
    folder = Path(sys.argv[1])
    with open(folder / "calls", "a") as calls:
        calls.write("x")
    print("a library says something")
    print(json.dumps({"done": 1, "total": 2, "note": "half"}), flush=True)
    if os.environ.get("CRASH") and os.environ["CRASH"] in folder.name:
        print("the first line", file=sys.stderr)
        print("the reason", file=sys.stderr)
        os.abort() if os.environ.get("HARD") else sys.exit(3)
    if os.environ.get("HANG"):
        (folder / "hangs").touch()
        time.sleep(60)
    import yaml
    config = yaml.safe_load((folder / "config.yaml").read_text())
    record = dict(name=folder.name, config=config, wall_seconds=1.0, machine={},
                  result={"cost": {}, "measures": {
                      "accuracy": config["seeds"][0] / 10,
                      "validation accuracy": config["learning_rates"][0]}})
    (folder / "record.json").write_text(json.dumps(record))
"""


class Silent:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.told: list[tuple[str, int, str]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def section(self, title: str) -> None: ...

    def steps(self, title: str, total: int) -> Callable[[int, str], None]:
        return lambda done, note: self.told.append((title, done, note))

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None: ...


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    return [sys.executable, str(script)]


def calls(output: Path) -> dict[str, int]:
    return {file.parent.name: len(file.read_text()) for file in output.glob("runs/*/calls")}


def experiment(**changes: Any) -> Sweep:
    return parse(TINY | changes)


def test_a_run_that_crashes_is_told_and_tried_again_and_the_others_are_kept(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, console = tmp_path / "out", Silent()
    monkeypatch.setenv("CRASH", "iha-p2-token--learning_rate-0.003--seed-0")
    failed = run_all(experiment(), output, console, jobs=2, command=command)
    (name,) = failed
    assert "iha-p2-token" in name
    assert failed[name].startswith("the reason")
    assert any(name in text for text in console.said)
    assert ("RoR--mha--learning_rate-0.003--seed-0", 1, "half") in console.told
    assert len(records.read(output / "results.jsonl")) == 3

    monkeypatch.setenv("HARD", "1")  # dies by a signal, without words of its own
    assert list(run_all(experiment(), output, Silent(), jobs=1, command=command)) == [name]

    monkeypatch.delenv("CRASH")
    assert not run_all(experiment(), output, Silent(), jobs=2, command=command)
    found = [record.name for record in records.read(output / "results.jsonl")]
    assert found == [run.name for run in experiment().runs()]  # in the experiment's order
    assert calls(output) == dict.fromkeys(found, 1) | {name: 3}


def test_tuning_seeds_run_first_and_the_others_at_what_they_chose(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = experiment(learning_rates=[0.001, 0.01], tuning_seeds=[7], seeds=[0, 1])
    monkeypatch.setenv("CRASH", "mha--learning_rate-0.001--seed-7")
    (name,) = run_all(sweep, tmp_path / "out", Silent(), jobs=2, command=command)
    # Plain attention waits; the other one is at 0.01, whose measure is the better one.
    assert set(calls(tmp_path / "out")) == {
        name,
        "RoR--mha--learning_rate-0.01--seed-7",
        "RoR--iha-p2-token--learning_rate-0.001--seed-7",
        "RoR--iha-p2-token--learning_rate-0.01--seed-7",
        "RoR--iha-p2-token--learning_rate-0.01--seed-0",
        "RoR--iha-p2-token--learning_rate-0.01--seed-1",
    }
    monkeypatch.delenv("CRASH")
    assert not run_all(sweep, tmp_path / "out", Silent(), jobs=2, command=command)
    (compared,) = summarize(load(tmp_path / "out"))
    assert [row.selected for row in compared.rows] == [{"learning_rate": 0.01}] * 2
    assert [set(row.by_seed["accuracy"]) for row in compared.rows] == [{0, 1}] * 2


def test_more_seeds_run_only_what_is_new_and_another_config_is_refused(
    tmp_path: Path, command: list[str]
) -> None:
    output = tmp_path / "out"
    run_all(experiment(), output, Silent(), jobs=2, command=command)
    run_all(experiment(seeds=[0, 1, 2]), output, Silent(), jobs=2, command=command)
    assert len(calls(output)) == 6
    assert set(calls(output).values()) == {1}
    assert read(output / "config.yaml") == experiment(seeds=[0, 1, 2])
    for change in ({"hidden_size": 32}, {"hidden_size": 32, "seeds": [7]}):
        with pytest.raises(ValueError, match=r"with hidden_size = 16, not 32; name another output"):
            run_all(experiment(**change), output, Silent(), command=command)
    with pytest.raises(ValueError, match="with experiment = 'composition', not 'lm'"):
        run_all(parse({"experiment": "lm", **ONE}), output, Silent(), command=command)
    with pytest.raises(ValueError, match=r"is not empty and has no config\.yaml"):
        run_all(experiment(), tmp_path, Silent(), command=command)
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run_all(experiment(), output, Silent(), jobs=0, command=command)


def test_two_runs_of_one_name_are_refused() -> None:
    relations = [{"factors": 2, "sizes": [2, m], "density": 0.4} for m in (3, 4)]
    with pytest.raises(ValueError, match="give two runs the name RoR--iha-p2"):
        experiment(relations=relations)


def test_a_record_that_a_kill_kept_from_the_list_is_found(
    tmp_path: Path, command: list[str]
) -> None:
    output = tmp_path / "out"
    run_all(experiment(), output, Silent(), jobs=2, command=command)
    whole = (output / "results.jsonl").read_text()
    (output / "results.jsonl").write_text("".join(whole.splitlines(keepends=True)[:1]))
    run_all(experiment(), output, Silent(), jobs=2, command=command)
    assert (output / "results.jsonl").read_text() == whole
    run_all(experiment(seeds=[0, 1, 2]), output, Silent(), jobs=2, command=command)
    assert len(records.read(output / "results.jsonl")) == 6
    assert set(calls(output).values()) == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_reaches_the_runs_and_none_begins(
    tmp_path: Path, command: list[str], number: signal.Signals
) -> None:
    output = tmp_path / "out"
    main = textwrap.dedent(f"""
        from pathlib import Path
        from lab.tests.experiments.test_runner import Silent, experiment, run_all
        run_all(experiment(), Path({str(output)!r}), Silent(), jobs=1, command={command!r})
    """)
    environment = {**os.environ, "HANG": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", main], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(output.glob("runs/*/hangs")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert len(calls(output)) == 1


def test_a_real_experiment_runs_and_is_summarized(tmp_path: Path) -> None:
    small = experiment(attentions=[{"kind": "mha"}])
    assert not run_all(small, tmp_path / "out", Silent(), jobs=2)
    found = records.read(tmp_path / "out" / "results.jsonl")
    (compared,) = summarize(load(tmp_path / "out"))
    (row,) = compared.rows
    assert row.measures["accuracy"].count == 2
    assert 0 < row.measures["accuracy"].mean <= 1
    assert [x for x, _ in row.curves["validation accuracy over epochs"]] == [1, 2]
    assert found[0].machine["versions"]["torch"]
    assert found[0].wall_seconds > 0
    again = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[0])
    assert again["config"]["seeds"] == [0]
