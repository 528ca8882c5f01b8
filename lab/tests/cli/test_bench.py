"""`iha bench` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "iha_lab.cli", "bench"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_it_measures_shows_and_writes(tmp_path: Path) -> None:
    command = [*COMMAND, "cpu", "--quick", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    for word in ("published recipe", "local", "over plain", "of FLOP/s", "Written:"):
        assert word in done.stdout
    part = json.loads((tmp_path / "bench-cpu.json").read_text())["cases"]["cpu"]
    assert part["device"] in done.stdout
    local = part["rows"][0]["implementations"]["local"]
    assert local["forward"]["median"] > 0
    assert local["peak"]["bytes"] > 0
    assert (tmp_path / "bench-cpu.png").stat().st_size > 1000


def test_stopped_it_leaves_what_it_measured(tmp_path: Path) -> None:
    command = [*COMMAND, "cpu", "--quick", "-o", str(tmp_path)]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    file = tmp_path / "bench-cpu.json"
    for _ in range(1200):
        if file.exists():
            break
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, error = running.communicate(timeout=60)
    assert running.returncode == 130, error
    assert "what was measured is in" in out
    assert json.loads(file.read_text())["cases"]["cpu"]["rows"]


def test_an_unknown_case_is_one_sentence(tmp_path: Path) -> None:
    command = [*COMMAND, "gpu", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: case must be one of paper")
    assert done.stderr.count("\n") == 1
