"""Pages from templates. HTML ones hold all in themselves: no file beside them, no network."""

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


def render(template: str, **values: Any) -> str:
    """Render `template`, a path in the package; values in HTML are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("iha_lab", ""),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write(file: Path, template: str, **values: Any) -> Path:
    """Write a page: `template` extends `report/page.html.jinja`."""
    write_text(file, render(template, **values))
    return file
