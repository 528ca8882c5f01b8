"""The page about a quickstart run."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path

from iha_lab.files import write_text
from iha_lab.report import pages
from iha_lab.stats import Accuracy

PAGE = "report.html"


@dataclasses.dataclass(frozen=True)
class Text:
    """What two models wrote after the same prompt."""

    prompt: str
    original: str
    upcycled: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything on the page; nothing on it is computed anywhere else."""

    model: str
    pseudo_heads: int
    parameters: int
    mixing_parameters: int
    logit_difference: float
    logit_size: float
    texts: list[Text]
    task: str
    recipe: str
    accuracies: dict[str, Accuracy]
    seconds_per_step: dict[str, float]
    verdict: str
    price: str
    question: str
    before: str
    answer: str
    expected: str
    figures: list[pages.Figure]
    versions: str


def write(report: Report, folder: Path) -> Path:
    """Write `report.html`, and `result.json` with its numbers; return the path of the page."""
    numbers = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **dataclasses.asdict(report),
        "figures": [figure.title for figure in report.figures],
    }
    write_text(folder / "result.json", json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    page = folder / PAGE
    return pages.write(page, "report/quickstart_page.html.jinja", report=report)


def verdict(plain: Accuracy, mixed: Accuracy) -> str:
    """Say what the two intervals carry, and no more."""
    (low, high), (other_low, other_high) = plain.interval(), mixed.interval()
    if other_low > high:
        return "The intervals do not overlap: on this task and seed, the IHA model is better."
    if other_high < low:
        return "The intervals do not overlap: on this task and seed, the plain model is better."
    return (
        "The intervals overlap: a run this short does not tell the two models apart. It is no"
        " evidence for or against the paper's claim."
    )


def price(slower: float, pseudo_heads: int) -> str:
    """Say why a step with IHA takes longer, and what makes it shorter."""
    return (
        f"A step with IHA took {slower:.1f} times as long: each pair of tokens has"
        f" P² = {pseudo_heads**2} pairs of pseudo-heads. Windows (iha.hybrid_schedule) or fewer"
        " pseudo-queries (pseudo_queries=) cost less."
    )
