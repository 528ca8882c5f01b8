"""The page of `iha lab report`: what it holds, and what it leaves out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from iha_lab.experiments import records
from iha_lab.report import lab_page
from lab.tests.experiments.test_summary import SCORES, outcomes


def test_one_page_holds_everything_and_the_figures_are_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "composition-tiny"
    records.write(folder / records.FILE, outcomes(SCORES))
    page = lab_page.write([folder], tmp_path / "page").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert page.count("data:image/png;base64,") == 2 == len(list((tmp_path / "page").glob("*.png")))
    for text in ("composition-tiny", "iha-p2, learning_rate 0.0001", "1.50×", "+0.1100 ± 0.13"):
        assert text in page
    assert "8 runs on a device, 1 thread(s) per run" in page


def test_one_seed_has_no_column_of_differences(tmp_path: Path) -> None:
    folder = tmp_path / "composition-tiny"
    one_seed = {key: score for key, score in SCORES.items() if key[2] == 0}
    for scores, column in ((SCORES, True), (one_seed, False)):
        records.write(folder / records.FILE, outcomes(scores))
        page = lab_page.write([folder], tmp_path / "page").read_text(encoding="utf-8")
        assert ("minus mha" in page) == column


def test_a_page_goes_beside_its_results_or_into_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "composition-tiny"
    records.write(folder / records.FILE, outcomes(SCORES))
    assert lab_page.write([folder], folder) == folder / "report.html"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        lab_page.write([folder], tmp_path / "mine")
    assert (tmp_path / "mine" / "report.html").read_text() == "mine"
