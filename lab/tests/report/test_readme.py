"""What README.md shows runs, and its figures are those of the result files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iha_lab.bench import run
from iha_lab.bench.cases import QUICK
from iha_lab.report import readme
from iha_lab.report.bench_tables import seconds
from tests.hf.families import tiny

ROOT = Path(__file__).parents[3]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_examples_run(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model in a folder in place of the one on the hub."""
    tiny("llama").save_pretrained(tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[block].replace(HUB_NAME, "hub"), {})
    assert HUB_NAME in "".join(BLOCKS)


def test_figures_are_those_of_the_result_files() -> None:
    subprocess.run([sys.executable, "-m", "iha_lab.report.readme", "--check"], check=True)


def test_a_file_of_a_gpu_becomes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on this CPU stands in for it: the file has the same form."""
    results = tmp_path / "results"
    shutil.copytree(ROOT / "results", results)
    for file in results.glob("bench/bench-*.json"):
        if file.stem != "bench-cpu":
            file.unlink()
    assert readme.NOT_MEASURED in readme.tables(results)
    monkeypatch.setattr(run.measure, "in_a_process", lambda *_: 2**20)
    few = [replace(layer, only=("plain SDPA", "sdpa")) for layer in QUICK["small-p"]]
    monkeypatch.setitem(QUICK, "small-p", tuple(few))
    run.bench(
        ("small-p", "model"), torch.device("cpu"), tmp_path / "bench", True, lambda text: None
    )
    record = json.loads((tmp_path / "bench" / "bench-cpu.json").read_text())
    for row in record["cases"]["small-p"]["rows"]:
        row["implementations"]["fused"] = row["implementations"]["sdpa"]
    (results / "bench" / "bench-some-gpu.json").write_text(json.dumps(record))
    written = readme.tables(results)
    assert readme.NOT_MEASURED not in written
    for row in record["cases"]["small-p"]["rows"]:
        both = row["implementations"]["fused"]["forward + backward"]
        assert seconds(both["median"]) in written
    pace = record["cases"]["model"]["rows"][0]["implementations"]["IHA model"]["step"]["median"]
    assert seconds(pace) in written
    assert "(`--quick`)" in written
