"""Files and folders that a kill leaves as they were, or new, and never in between."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from safetensors import SafetensorError


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all; make its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def check_new(folder: Path) -> None:
    """Raise ValueError where `folder` holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output {str(folder)!r} is there already and not empty; name another.")


@contextlib.contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """A folder to write into, which becomes `folder` at the end, or is gone if that is not reached.

    Raises ValueError as `check_new` does, and OSError for whatever the libraries that write raise.
    """
    check_new(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        with writing(folder):
            partial.mkdir(parents=True)
            yield partial
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def writing(target: Path) -> Generator[None]:
    """Say in one sentence what could not be written: a full disk is another error in each library.

    PyTorch raises RuntimeError then, safetensors its own, Python OSError. Raises OSError.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{str(target)!r} could not be written ({reason}); make room there, or name another"
            " place, and run the same again."
        ) from error


def fingerprint(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of a file, or of each file in a folder, by its name there."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    found: dict[str, tuple[int, str]] = {}
    for file in sorted(files):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
        name = file.relative_to(path).as_posix() if file != path else file.name
        found[name] = (file.stat().st_size, digest.hexdigest())
    return found
