"""The paper's experiments, as typed configs that run in processes of their own.

base.py         an experiment, its runs
runner.py       runs side by side, resumed, isolated
records.py      results.jsonl
composition.py  relation composition, appendix D
retrieval.py    RULER-like retrieval, from nothing and from SmolLM2
language.py     language modelling
results.py      what a run measured
summary.py      means and intervals over seeds
report.py       the page
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml

from iha_lab.experiments.base import Experiment
from iha_lab.experiments.composition import Composition
from iha_lab.experiments.language import LanguageModel
from iha_lab.experiments.retrieval import Retrieval

AnyExperiment = Annotated[
    Composition | Retrieval | LanguageModel, pydantic.Field(discriminator="experiment")
]


def configs(experiment: str) -> dict[str, Path]:
    """Scale → the package's YAML file of it, for an experiment's name."""
    files = (Path(__file__).parent / "configs").glob(f"{experiment}-*.yaml")
    return {file.stem.removeprefix(f"{experiment}-"): file for file in files}


def read(file: Path) -> Experiment:
    """The experiment in a YAML file. ValueError names the field that is wrong."""
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


def parse(config: Any) -> Experiment:
    """The experiment that a mapping describes. Raises pydantic's ValidationError."""
    return pydantic.TypeAdapter[Any](AnyExperiment).validate_python(config)


def _sentence(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong, in words."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{where}: {first['msg']}, got {first['input']!r}."
