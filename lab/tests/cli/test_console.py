"""Progress where nobody watches a bar."""

from __future__ import annotations

import pytest

from iha_lab.cli.console import Live


def test_redirected_it_is_a_line_each_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    with Live() as console:
        tell = console.steps("train", 8)
        for done in (1, 2, 3, 7, 8, 8):
            tell(done, f"loss {done}")
        console.steps("nothing", 0)(0, "")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [(line.split()[0], line.split()[1]) for line in lines] == [
        ("train:", "2/8"), ("train:", "7/8"), ("train:", "8/8"),
    ]  # fmt: skip
    assert lines[-1].endswith("loss 8")


def test_a_long_table_is_dense(capsys: pytest.CaptureFixture[str]) -> None:
    with Live() as console:
        console.table("few", ["a"], [["x"]] * 3)
        few = len(capsys.readouterr().out.splitlines())
        console.table("many", ["a"], [["x"]] * 20)
        many = len(capsys.readouterr().out.splitlines())
    assert few == many - 20 + 3 + 2
