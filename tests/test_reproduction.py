"""REPRODUCTION.md says what the files in results/ say, and verdicts follow from intervals."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from iha.lab.experiments.summary import Interval

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> Any:
    """benchmarks/reproduction.py as a module; it is no part of the package."""
    file = ROOT / "benchmarks" / "reproduction.py"
    found = importlib.util.spec_from_file_location("reproduction", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # where dataclasses look for their types
    found.loader.exec_module(module)
    return module


def test_the_file_is_that_of_the_results(script: Any) -> None:
    assert script.written() == (ROOT / "REPRODUCTION.md").read_text()


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([Interval(0.2, 0.1, 3), Interval(0.3, 0.2, 3)], "reproduced at this scale"),
        ([Interval(0.2, 0.1, 3), Interval(0.3, 0.4, 3)], "undecided"),
        ([Interval(0.2, 0.1, 3), Interval(-0.3, 0.2, 3)], "not reproduced at this scale"),
        ([Interval(0.2, 0.1, 3), None], "undecided (one seed)"),
        ([Interval(-1.0, 0.1, 3), None], "not reproduced at this scale"),
        ([Interval(0.2, math.nan, 1)], "undecided (one seed)"),
        ([], "undecided (one seed)"),
    ],
)
def test_a_verdict_needs_every_rival(script: Any, differences: Any, verdict: str) -> None:
    assert script.verdict(differences) == verdict


def test_one_different_answer_is_told(script: Any, tmp_path: Path) -> None:
    folder = tmp_path / "eval-exact-ruler"
    shutil.copytree(ROOT / "results" / "eval-exact-ruler", folder)
    (claim,) = script.exactness(folder)
    assert claim.verdict == "holds"
    record = json.loads((folder / "result.json").read_text())
    list(record["scores"][1]["models"].values())[1]["identical"] -= 1
    (folder / "result.json").write_text(json.dumps(record))
    (claim,) = script.exactness(folder)
    assert claim.verdict == "does not hold"
    assert "4 of 5 answers identical" in claim.ours
