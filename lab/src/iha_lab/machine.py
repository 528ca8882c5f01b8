"""Where, when and with which versions something was measured."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import iha

LIBRARIES = ("transformers", "accelerate")


def rank() -> int:
    """Return which of a run's processes this is, by torchrun and Accelerate; 0 does the writing."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """Count the processes that work on one run together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def default_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """Describe date, device, cores and versions, as JSON takes them."""
    now = datetime.datetime.now(datetime.UTC)
    versions: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "iha": iha.__version__,
    }
    versions |= {library: version(library) for library in LIBRARIES}
    if device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    cores = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {
        "date": now.date().isoformat(),
        "device": device_name(device),
        **cores,
        "versions": versions,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
