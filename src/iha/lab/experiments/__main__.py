"""`python -m iha.lab.experiments RUN_FOLDER`: one run, as `runner.run_all` starts it."""

import sys
from pathlib import Path

from iha.lab.experiments import read
from iha.lab.experiments.runner import run_one

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run_one(read(folder / "config.yaml"), folder)
