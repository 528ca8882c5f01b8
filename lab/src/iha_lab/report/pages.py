"""Self-contained HTML pages: no file beside them, nothing from a network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jinja2

from iha_lab.files import write_text
from iha_lab.report import figures


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure on a page; `page.html.jinja` has the macro that shows it."""

    title: str
    uri: str
    caption: str = ""

    @classmethod
    def of(cls, figure: Any, title: str, caption: str = "") -> Figure:
        return cls(title, figures.data_uri(figure), caption)


def write(file: Path, template: str, **values: Any) -> Path:
    """Render `template`, a path in the package that extends `report/page.html.jinja`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("iha_lab", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    write_text(file, environment.get_template(template).render(**values))
    return file
