"""Checkpoints that are known to be whole: each is sealed with what its files hold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iha_lab.files import fingerprint, write_text

SEAL = "seal.json"


def seal(checkpoint: Path) -> None:
    """Record size and SHA-256 of every file of a checkpoint, as the last thing of writing it."""
    write_text(checkpoint / SEAL, json.dumps(fingerprint(checkpoint)))


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of `folder` with all that its seal names; None where there is none.

    Others, which a kill or a disk damaged, are told and set aside under another name.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    for checkpoint in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
        if (damage := _damage(checkpoint)) is None:
            return checkpoint
        aside = folder / f"damaged-{checkpoint.name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        say(f"{checkpoint.name} is not whole ({damage}); it is set aside, an older one is tried.")
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint."""
    try:
        sealed: Any = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        there = fingerprint(checkpoint)
        for name, (size, digest) in sealed.items():
            if name not in there:
                return f"{name} is missing"
            if there[name] != (size, digest):
                return f"{name} is not what was written"
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError, TypeError, AttributeError):
        return "it cannot be read"
    return None
