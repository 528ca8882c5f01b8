"""report.html: one self-contained page about a quickstart run."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path

from iha_lab.data.retrieval import Accuracy
from iha_lab.report import pages


@dataclasses.dataclass(frozen=True)
class Text:
    """What two models wrote after the same prompt."""

    prompt: str
    original: str
    upcycled: str


@dataclasses.dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    uri: str


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
    question: str
    answer: str
    expected: str
    pictures: list[Picture]
    versions: str


def write(report: Report, folder: Path) -> Path:
    """`report.html`, and `result.json` with its figures; the path of the page."""
    figures = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **dataclasses.asdict(report),
        "pictures": [picture.title for picture in report.pictures],
    }
    (folder / "result.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return pages.write(folder / "report.html", "report/quickstart.html.jinja", report=report)


def verdict(plain: Accuracy, mixed: Accuracy) -> str:
    """What the two intervals carry, and no more."""
    (low, high), (other_low, other_high) = plain.interval(), mixed.interval()
    if other_low > high:
        return "The intervals do not overlap: on this task and seed, the IHA model is better."
    if other_high < low:
        return "The intervals do not overlap: on this task and seed, the plain model is better."
    return (
        "The intervals overlap: a run this short does not tell the two models apart. It is no"
        " evidence for or against the paper's claim."
    )
