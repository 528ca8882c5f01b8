"""A folder is one run's: new, empty or its own, and one process at a time works there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from iha_lab.run_folder import check, claim

SETTINGS: dict[str, Any] = {"steps": 3, "data": ["ä.txt"], "pair": (1, 2)}


@pytest.mark.parametrize("record", ["run.json", "config.yaml"])
def test_the_same_run_goes_on_and_another_is_refused(record: str, tmp_path: Path) -> None:
    folder = tmp_path / "a ü\u2028b" / "run"
    assert not check(folder, SETTINGS, record=record)
    with claim(folder, SETTINGS, record=record):
        (folder / "work").mkdir()
    assert check(folder, SETTINGS, record=record)
    with claim(folder, SETTINGS, record=record):
        pass
    assert yaml.safe_load((folder / record).read_text(encoding="utf-8"))["data"] == ["ä.txt"]
    other = SETTINGS | {"steps": 4}
    with (
        pytest.raises(ValueError, match="holds a run with steps = 3, not 4; name another output"),
        claim(folder, other, record=record),
    ):
        pass
    with claim(folder, other, record=record, free=("steps",)):
        pass
    assert check(folder, other, record=record)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with (
            pytest.raises(ValueError, match=r"is not empty and has no run\.json; name another"),
            claim(folder, SETTINGS),
        ):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", ["[]", "{cut", '"text"', "3", "", "\xff", "a: b: c"])
def test_a_damaged_record_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"run\.json' is damaged, so what its run was"):
        check(tmp_path, SETTINGS)


def test_an_older_record_without_a_setting_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"steps": 3}))
    with pytest.raises(ValueError, match=r"holds a run with data = None, not \['ä.txt'\]"):
        check(tmp_path, SETTINGS)


def test_what_a_kill_leaves_before_the_record_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "run.lock").touch()
    (tmp_path / "run.json.partial").write_text("{")
    with claim(tmp_path, SETTINGS):
        pass


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"output '/proc/a run' cannot be written \(.+\); name"),
        claim(Path("/proc/a run"), SETTINGS),
    ):
        pass


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    """The second is refused until the first ends, or is killed."""
    holder = (
        "import json, sys, time; from pathlib import Path; from iha_lab.run_folder import claim\n"
        "with claim(Path(sys.argv[1]), json.loads(sys.argv[2])): print('held', flush=True);"
        " time.sleep(60)"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "run"), json.dumps(SETTINGS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match="is held by another process that works there"),
            claim(tmp_path / "run", SETTINGS),
        ):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
    with claim(tmp_path / "run", SETTINGS):
        pass


def test_of_a_runs_processes_the_first_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claim(tmp_path, SETTINGS):
        monkeypatch.setenv("RANK", "1")
        with claim(tmp_path, SETTINGS):
            pass
        monkeypatch.delenv("RANK")
