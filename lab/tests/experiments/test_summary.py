from __future__ import annotations

from pathlib import Path

import pytest

from iha_lab.experiments import load, parse
from iha_lab.experiments.records import Record, Result
from iha_lab.experiments.summary import summarize
from lab.tests.experiments.test_runner import TINY


def outcomes(scores: dict[tuple[str, float, int], tuple[float, float]]) -> list[Record]:
    """(attention, learning rate, seed) → (test, validation accuracy)."""
    attentions = {"mha": {"kind": "mha"}, "iha-p2": {"kind": "iha", "pseudo_heads": 2}}
    found: list[Record] = []
    for (attention, rate, seed), (test, validation) in scores.items():
        changes = {
            "attentions": [attentions[attention]],
            "learning_rates": [rate],
            "seeds": [seed],
        }
        run = parse(TINY | changes).only_run()
        result = Result(
            cost={"parameters": 10, "total_flops": 100 if attention == "mha" else 150},
            measures={"accuracy": test, "validation accuracy": validation},
            curves={"validation accuracy over epochs": [(1, 0.5), (2 + seed, validation)]},
        )
        machine = {"device": "a device", "threads": 1, "date": "today", "versions": {"torch": "x"}}
        found.append(
            Record(
                name=run.name,
                config=run.config().model_dump(mode="json"),
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


def test_validation_selects_and_differences_are_paired() -> None:
    found = [(parse(record.config).only_run(), record) for record in outcomes(SCORES)]
    (compared,) = summarize(found)
    assert compared.title == "RoR"
    assert compared.in_the_paper.startswith("IHA up to +4.7 points over 2-simplicial")
    plain, mixed = compared.rows
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


def test_tuning_seeds_choose_and_are_not_reported() -> None:
    found = [
        (parse(record.config | {"tuning_seeds": [0]}).only_run(), record)
        for record in outcomes(SCORES)
        if (record.config["seeds"], record.config["learning_rates"]) != ([1], [1e-3])
    ]
    (compared,) = summarize(found)
    # Seed 0 chose 1e-3 for plain attention, which seed 1 has not run with.
    (mixed,) = compared.rows
    assert mixed.selected == {"learning_rate": 1e-4}
    assert mixed.by_seed["accuracy"] == {1: 0.94}


def test_what_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        load(tmp_path)
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: no record"):
        load(tmp_path)
