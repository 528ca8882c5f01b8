"""Every script in examples/ runs, and is listed in its README."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(file.name for file in FOLDER.glob("*.py") if file.name != "tiny.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if done.returncode and (lacking := re.search("No module named '(nnsight|trl)'", done.stderr)):
        pytest.skip(f"{lacking[1]} is not installed")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert list(tmp_path.iterdir()) == []


def test_the_readme_lists_them() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert all(f"[{script}]({script})" in readme for script in SCRIPTS)
