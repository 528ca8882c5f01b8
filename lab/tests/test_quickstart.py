"""The main job, whole, on a tiny model; the real one is a command (`make quickstart`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from safetensors.torch import load_file

from iha_lab.quickstart import quickstart
from iha_lab.train.finetuning import Recipe
from lab.tests.data.test_examples import words
from tests.hf.families import tiny


class Recorder:
    """A console that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.progress: dict[str, list[int]] = {}

    def say(self, text: str) -> None:
        self.said.append(text)

    def section(self, title: str) -> None:
        self.said.append(title)

    def steps(self, title: str, total: int) -> Callable[[int, str], None]:
        seen = self.progress.setdefault(title, [])
        return lambda done, note: seen.append(done)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        self.tables.append(rows)


@pytest.fixture
def model(tmp_path: Path) -> str:
    # The word that the tokenizer does not know is no padding: that one's embedding is zero.
    found = tiny("llama", max_position_embeddings=512, pad_token_id=98)
    found.save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_everything_is_there(model: str, tmp_path: Path) -> None:
    console, output = Recorder(), tmp_path / "out"
    page = quickstart(model, output, 2, 5, Recipe(steps=3, batch_size=2), console)

    result = json.loads((output / "result.json").read_text())
    texts, accuracies = console.tables
    assert all(original == upcycled for _, original, upcycled in texts)
    assert [row[0] for row in accuracies] == ["before training", "plain, trained", "IHA, trained"]
    assert console.progress["train plain"] == console.progress["train IHA"] == [1, 2, 3]
    assert console.progress["ask IHA"][-1] == 5
    plan, how_long = console.said[1], next(said for said in console.said if "minutes here" in said)
    assert "3 steps each" in plan
    assert str(page) in plan
    assert console.said.index(how_long) < console.said.index(result["price"])
    steps = console.said[-1].splitlines()
    assert [line.split("iha ")[1].split()[0] for line in steps] == [
        "inspect",
        "generate",
        "finetune",
    ]
    assert str(output / "model") in steps[0]

    assert result["logit_difference"] < 1e-4 < 0.1 < result["logit_size"]
    assert {found["total"] for found in result["accuracies"].values()} == {5}
    assert result["mixing_parameters"] == 3 * (2 * 4 * 4 * 2 + 2 * 2 * 2 * 2)
    assert any("head_mixing" in name for name in load_file(output / "model" / "model.safetensors"))

    html = unescape(page.read_text())
    assert html.count("data:image/png;base64,") == 3
    assert "http" not in html.split("</style>")[1]  # nothing is loaded from elsewhere
    for text in (result["verdict"], result["price"], "<h2>1. Nothing broke</h2>", "the same text"):
        assert text in html


def test_no_questions_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="questions must be at least 1, got 0"):
        quickstart("no-such-model", tmp_path / "out", 2, 0, Recipe(), Recorder())
    assert not (tmp_path / "out").exists()
