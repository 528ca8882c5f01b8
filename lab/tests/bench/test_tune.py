"""Tuning keeps the fastest tiles, and writes them down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from iha.kernels import configs
from iha.kernels.configs import Shape
from iha_lab.bench import tune

PAPER = Shape(pseudo_heads=16, shared=16, width=128, bytes=2, generation=9)


@pytest.fixture(autouse=True)
def _untuned() -> Iterator[None]:
    yield
    configs.tuned.cache_clear()
    configs.config.cache_clear()


def test_tuning_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = next(c for c in tune.candidates(PAPER) if c.query_tile.size == 64)

    def milliseconds() -> float:
        now = configs.config("forward", PAPER)
        if now.stages == 3:
            raise tune.OutOfResources(2, 1, "shared memory")
        return 1.0 if now == wanted else 2.0

    assert tune.tune("forward", PAPER, milliseconds) == (2.0, 1.0)
    assert configs.config("forward", PAPER) == wanted
    assert configs.config("query", PAPER).query_tile.size == 128  # others stay as they were

    monkeypatch.setattr(tune, "FILE", tmp_path / "tuned.json")
    tune.write()
    (row,) = json.loads(tune.FILE.read_text())["configs"]
    assert (row["kernel"], Shape(**row["shape"])) == ("forward", PAPER)
    assert configs.read(row["config"]) == wanted
