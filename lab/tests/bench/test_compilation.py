"""Every kernel compiles for GPUs that are not here, and the default tiles spill no registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from iha.backends import fused

ROOT = Path(__file__).parents[3]


def spilled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["local"] > 0]


def test_the_default_tiles_spill_no_registers() -> None:
    """The paper's layer and a decoding step, compiled for Hopper and for Blackwell."""
    # The interpreter, in which the other tests run, compiles nothing.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "iha_lab.bench.kernels", "--quick"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["target"] for row in rows} == {"sm_90", "sm_100"}
    assert len({row["kernel"] for row in rows}) == 7
    assert all(row["registers"] > 0 for row in rows)
    assert not spilled(rows)


def test_what_is_recorded() -> None:
    """In the paper's layers nothing is spilled; no kernel wants more memory than `fused`."""
    record = json.loads((ROOT / "results" / "bench" / "kernels.json").read_text())
    rows = record["kernels"]
    paper = [
        row
        for row in rows
        if row["shape"]["d"] == 128
        and row["shape"]["dtype"] == "bfloat16"
        and row["shape"]["P"] == row["shape"]["H"]
        and row["shape"].keys() <= {"P", "d", "H", "G", "dtype", "window", "virtual"}
    ]
    assert {row["shape"]["P"] for row in paper} == {16, 20, 32}
    assert not spilled(paper)
    assert not any("refused" in row for row in rows)
    assert max(row["shared"] for row in rows) <= fused.SHARED_MEMORY
