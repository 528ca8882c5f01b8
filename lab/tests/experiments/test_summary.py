from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from iha_lab.experiments import parse, records
from iha_lab.experiments.base import Experiment
from iha_lab.experiments.records import Record
from iha_lab.experiments.report import load, report
from iha_lab.experiments.summary import Interval, summarize
from lab.tests.experiments.test_runner import TINY


def test_students_interval() -> None:
    # By hand: mean 3, standard deviation 2, t(0.975, 2) = 4.3027, so 4.3027 · 2 / √3.
    found = Interval.of([1.0, 3.0, 5.0])
    assert (found.mean, found.count) == (3, 3)
    assert found.half == pytest.approx(4.9683, abs=1e-4)
    assert math.isnan(Interval.of([2.0]).half)
    assert str(Interval.of([2.0])) == "2 (one seed)"


def outcomes(scores: dict[tuple[str, float, int], tuple[float, float]]) -> list[Record]:
    """(attention, learning rate, seed) → (test, validation accuracy)."""
    choices = {"mha": {"kind": "mha"}, "iha-p2": {"kind": "iha", "pseudo_heads": 2}}
    found: list[Record] = []
    for (attention, rate, seed), (test, validation) in scores.items():
        changes = {
            "attentions": [choices[attention]],
            "learning_rates": [rate],
            "seeds": [seed],
        }
        run = parse(TINY | changes)
        result = {
            "cost": {"parameters": 10, "total_flops": 100 if attention == "mha" else 150},
            "measures": {"accuracy": test, "validation accuracy": validation},
            "curves": {"validation accuracy over epochs": [(1, 0.5), (2 + seed, validation)]},
        }
        machine = {"device": "a device", "threads": 1, "date": "today", "versions": {"torch": "x"}}
        found.append(
            Record(
                name=run.name,
                config=run.model_dump(mode="json"),
                result=result,
                wall_seconds=2.0,
                machine=machine,
            )
        )
    return found


SCORES = {
    ("mha", 1e-3, 0): (0.80, 0.81),
    ("mha", 1e-3, 1): (0.82, 0.83),
    ("mha", 1e-4, 0): (0.99, 0.70),  # better on test data, which must not select
    ("mha", 1e-4, 1): (0.99, 0.70),
    ("iha-p2", 1e-3, 0): (0.70, 0.50),
    ("iha-p2", 1e-3, 1): (0.70, 0.50),
    ("iha-p2", 1e-4, 0): (0.90, 0.90),
    ("iha-p2", 1e-4, 1): (0.94, 0.90),
}


def runs(found: list[Record]) -> list[tuple[Experiment, Record]]:
    return [(parse(record.config), record) for record in found]


def test_validation_selects_and_differences_are_paired() -> None:
    found = runs(outcomes(SCORES))
    (group,) = summarize(type(found[0][0]), found)
    assert group.title == "RoR"
    assert group.in_the_paper.startswith("IHA up to +4.7 points over 2-simplicial")
    plain, mixed = group.rows
    assert (plain.attention, mixed.attention) == ("mha", "iha-p2")
    assert plain.selected == {"learning_rate": 1e-3}
    assert mixed.selected == {"learning_rate": 1e-4}
    assert plain.measures["accuracy"].mean == pytest.approx(0.81)
    difference = mixed.minus(plain, "accuracy")
    assert difference is not None
    # 0.10 and 0.12: mean 0.11, half 12.706 · 0.01414 / √2.
    assert difference.mean == pytest.approx(0.11)
    assert difference.half == pytest.approx(0.12706, abs=1e-4)
    # A curve goes as far as all seeds do.
    assert [x for x, _ in plain.curves["validation accuracy over epochs"]] == [1]


def test_one_page_holds_everything_and_the_pictures_are_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "composition-tiny"
    records.write(folder / records.FILE, outcomes(SCORES))
    page = report([folder], tmp_path / "page").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert page.count("data:image/png;base64,") == 2 == len(list((tmp_path / "page").glob("*.png")))
    for text in ("composition-tiny", "iha-p2, learning_rate 0.0001", "1.50×", "+0.1100 ± 0.13"):
        assert text in page
    assert "8 runs on a device, 1 thread(s) a run" in page


def test_what_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        load(tmp_path)
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: no record"):
        load(tmp_path)
