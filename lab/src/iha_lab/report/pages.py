"""Self-contained HTML pages: no file beside them, nothing from a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from iha_lab.files import write_text


def write(file: Path, template: str, **values: Any) -> Path:
    """`template` is a path in the package; it extends `report/page.html.jinja`, frame and style."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("iha_lab", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    write_text(file, environment.get_template(template).render(**values))
    return file
