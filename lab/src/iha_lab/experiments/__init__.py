"""The paper's experiments, as typed configs that run in processes of their own.

config.py       a sweep and its runs
composition.py  relation composition, appendix D
retrieval.py    RULER-like retrieval, from nothing and from SmolLM2
lm.py           language modelling
online.py       training on data that never repeat, which the next two share
shift_bank.py   one layer that learns to look back by every offset
recall.py       which value did this pair of tokens have?
runner.py       runs side by side, resumed, isolated
records.py      what runs measured, in results.jsonl
summary.py      means and intervals over seeds
siblings.py     a model fine-tuned with IHA and without, and asked by `iha eval`
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml

from iha_lab.experiments import records
from iha_lab.experiments.composition import Composition
from iha_lab.experiments.config import Run, Sweep
from iha_lab.experiments.lm import LanguageModelling
from iha_lab.experiments.recall import CompositionalRecall
from iha_lab.experiments.records import Record
from iha_lab.experiments.retrieval import Retrieval
from iha_lab.experiments.shift_bank import ShiftBank

AnySweep = Annotated[
    Composition | Retrieval | LanguageModelling | ShiftBank | CompositionalRecall,
    pydantic.Field(discriminator="experiment"),
]


def configs(experiment: str) -> dict[str, Path]:
    """Map each scale of an experiment to the package's YAML file of it."""
    files = (Path(__file__).parent / "configs").glob(f"{experiment}-*.yaml")
    return {file.stem.removeprefix(f"{experiment}-"): file for file in files}


def read(file: Path) -> Sweep:
    """Read the sweep in a YAML file. ValueError names the field that is wrong."""
    if not file.is_file():
        raise ValueError(f"config {str(file)!r} does not exist.")
    try:
        found: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config {str(file)!r} is not YAML: {error}") from None
    try:
        return parse(found)
    except pydantic.ValidationError as error:
        raise ValueError(f"config {str(file)!r}: {_sentence(error)}") from None


def parse(config: Any) -> Sweep:
    """Make the sweep that a mapping describes. Raises pydantic's ValidationError."""
    return pydantic.TypeAdapter[Any](AnySweep).validate_python(config)


def load(folder: Path) -> list[tuple[Run[Any], Record]]:
    """Read every finished run of a folder. Raises ValueError where there is none."""
    found = records.read(folder / records.FILE)
    if not found:
        raise ValueError(
            f"folder {str(folder)!r} holds no finished run ({records.FILE}); name one that"
            " 'iha lab' has written."
        )
    return [(parse(record.config).only_run(), record) for record in found]


def _sentence(error: pydantic.ValidationError) -> str:
    """Say the first thing that is wrong in words."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{where}: {first['msg']}, got {first['input']!r}."
