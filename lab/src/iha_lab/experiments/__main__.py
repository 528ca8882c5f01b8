"""`python -m iha_lab.experiments RUN_FOLDER`: one run, as `runner.run_all` starts it."""

import sys
from pathlib import Path

import torch.distributed
from transformers.utils import logging

from iha_lab.experiments import read
from iha_lab.experiments.runner import run_one

if __name__ == "__main__":
    logging.disable_progress_bar()
    folder = Path(sys.argv[1])
    run_one(read(folder / "config.yaml").only_run(), folder)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
