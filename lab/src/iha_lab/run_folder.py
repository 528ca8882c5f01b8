"""A folder that belongs to one run: it records what the run is, and one process at a time holds it.

FOLDER/run.json    the settings that the run began with, or another name, also YAML
FOLDER/run.lock    locked by the process that works there; a kill frees it
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from iha_lab.files import write_text
from iha_lab.machine import rank

RECORD, LOCK = "run.json", "run.lock"


def check(
    folder: Path, settings: dict[str, Any], *, record: str = RECORD, free: Collection[str] = ()
) -> bool:
    """See that `folder` is new, empty, or of this very run; whether it is the last.

    `settings` is what makes the run the same one, as JSON takes it; values of the names in `free`
    may differ. Raises ValueError that names the first setting that differs, and for a folder of
    something else.
    """
    file = folder / record
    if not file.exists():
        ours = {LOCK, f"{record}.partial"}  # all that a kill can leave before there is a record
        if folder.exists() and (not folder.is_dir() or {f.name for f in folder.iterdir()} - ours):
            raise ValueError(
                f"output {str(folder)!r} is there already, is not empty and has no {record}; name"
                " another."
            )
        return False
    before: Any = None
    with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
        before = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML too
    if not isinstance(before, dict):
        raise ValueError(
            f"{str(file)!r} is damaged, so what its run was is not known; name another output."
        )
    now: dict[str, Any] = json.loads(json.dumps(settings))
    for name in sorted(now.keys() - set(free), key=list(now).index):
        if now[name] != before.get(name):
            raise ValueError(
                f"output {str(folder)!r} holds a run with {name} = {before.get(name)!r}, not"
                f" {now[name]!r}; name another output, or repeat that run's settings to go on."
            )
    return True


@contextlib.contextmanager
def claim(
    folder: Path, settings: dict[str, Any], *, record: str = RECORD, free: Collection[str] = ()
) -> Generator[None]:
    """Make `folder` this run's, and hold it; of several processes of one run, the first does.

    Raises ValueError as `check` does, where another process holds the folder, and where it cannot
    be written.
    """
    if rank() != 0:
        yield
        return
    check(folder, settings, record=record, free=free)  # before anything is written there
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"output {str(folder)!r} is held by another process that works there; wait for it, or"
            " name another output."
        ) from None
    except OSError as error:
        raise ValueError(
            f"output {str(folder)!r} cannot be written ({error.strerror}); name another."
        ) from error
    try:
        check(folder, settings, record=record, free=free)  # what another process wrote meanwhile
        text = (
            yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            if record.endswith((".yaml", ".yml"))
            else json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        )
        write_text(folder / record, text)
        yield
    finally:
        lock.release()
