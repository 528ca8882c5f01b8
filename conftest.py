"""What holds for every test: one thread, no network, no time limits on a loaded machine."""

from __future__ import annotations

import importlib.util
import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are: they run without a GPU

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("iha", deadline=None, print_blob=True)
settings.load_profile("iha")


# Files for a package that is not there: doctests would import them.
collect_ignore_glob = [
    files
    for package, files in (
        ("vllm", "src/iha/integrations/vllm/[!_]*.py"),
        ("torchtitan", "src/iha/integrations/torchtitan.py"),
        ("torchtitan", "tests/torchtitan/cpu.py"),
    )
    if not importlib.util.find_spec(package)
]

# In the order of what they wait for: compilers, models, processes.
SLOW = ("tests/backends", "tests/hf", "lab/tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first."""

    def rank(item: pytest.Item) -> int:
        return next((i for i, folder in enumerate(SLOW, 1) if item.nodeid.startswith(folder)), 0)

    items.sort(key=rank)
