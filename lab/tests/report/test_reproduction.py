"""REPRODUCTION.md says what the files in results/ say, and verdicts follow from intervals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from iha_lab.report import reproduction
from iha_lab.stats import Mean

ROOT = Path(__file__).parents[3]


def test_the_file_is_that_of_the_results() -> None:
    assert reproduction.written() == (ROOT / "REPRODUCTION.md").read_text()


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([Mean(0.2, 0.1, 3), Mean(0.3, 0.2, 3)], "reproduced at this scale"),
        ([Mean(0.2, 0.1, 3), Mean(0.3, 0.4, 3)], "undecided"),
        ([Mean(0.2, 0.1, 3), Mean(-0.3, 0.2, 3)], "not reproduced at this scale"),
        ([Mean(0.2, 0.1, 3), None], "undecided (one seed)"),
        ([Mean(-1.0, 0.1, 3), None], "not reproduced at this scale"),
        ([Mean(0.2, math.nan, 1)], "undecided (one seed)"),
        ([], "undecided (one seed)"),
    ],
)
def test_a_verdict_needs_every_baseline(differences: Any, verdict: str) -> None:
    assert reproduction.verdict(differences) == verdict


def test_what_has_not_run_is_said_and_a_claim_that_the_paper_lacks_is_not_reproduced(
    tmp_path: Path,
) -> None:
    results = tmp_path / "results"
    shutil.copytree(ROOT / "results", results, ignore=shutil.ignore_patterns("bench", "samples"))
    rows = {row.split(" | ")[-3]: row for row in reproduction.written(results).splitlines()[18:]}
    assert "| holds at this scale |" in rows["`lm-small`, 3 seeds"]
    shutil.rmtree(results / "lm-small")
    assert "| `lm-small`, 12 runs | not run | `iha lab lm " in reproduction.written(results)


def test_the_command_beside_a_row_gives_it() -> None:
    (claim,) = reproduction.siblings(ROOT / "results" / "eval-siblings-space")
    assert "siblings --steps 40 --space -o results/eval-siblings-space" in claim.command
    assert "37 of IHA's answers are empty" in claim.ours
    (claim,) = reproduction.siblings(ROOT / "results" / "eval-siblings")
    assert "siblings --steps 20 -o results/eval-siblings`" in claim.command
    assert "empty" not in claim.ours


def test_one_different_answer_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "eval-exact-ruler"
    shutil.copytree(ROOT / "results" / "eval-exact-ruler", folder)
    (claim,) = reproduction.exactness(folder)
    assert claim.verdict == "holds"
    record = json.loads((folder / "result.json").read_text())
    list(record["scores"][1]["models"].values())[1]["identical"] -= 1
    (folder / "result.json").write_text(json.dumps(record))
    (claim,) = reproduction.exactness(folder)
    assert claim.verdict == "does not hold"
    assert "4 of 5 answers identical" in claim.ours
