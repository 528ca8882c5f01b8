"""Pages of the site from the executed notebooks: Markdown, so that its links are checked too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from traitlets.config import Config

# What a cell prints bit by bit is shown together.
ONE_OUTPUT = Config({"CoalesceStreamsPreprocessor": {"enabled": True}})


def on_files(files: Files, config: Any) -> Files:
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            for page in _pages(file.src_uri, config):
                files.append(page)
    return files


def _pages(uri: str, config: Any) -> list[File]:
    """The notebook as Markdown, and its pictures beside it."""
    notebook = Path(config.docs_dir) / uri
    name = notebook.stem
    resources = {"unique_key": name, "output_files_dir": ""}
    text, resources = MarkdownExporter(config=ONE_OUTPUT).from_filename(str(notebook), resources)
    text = re.sub(r"\]\(([\w-]+)\.ipynb\)", r"](\1.md)", text)
    folder = uri.rpartition("/")[0]
    text += f"\n\nThis page is [a notebook]({name}.ipynb), made from [a script]({name}.py).\n"
    made = {f"{name}.md": text, **resources.get("outputs", {})}
    return [File.generated(config, f"{folder}/{file}", content=data) for file, data in made.items()]
