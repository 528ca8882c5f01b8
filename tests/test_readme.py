"""What README.md shows runs, and its figures are those of the result files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf.families import tiny

ROOT = Path(__file__).parent.parent
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
    script = ROOT / "benchmarks" / "readme.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
