"""Time and peak memory: the one clock and the one scale that all numbers here come from."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

FORWARD, BOTH, STEP = "forward", "forward + backward", "step"  # what is timed, in files and tables
Record = dict[str, Any]  # a part of the file
Action = Callable[[], object]
Times = dict[str, Any]  # {"seconds": [...], "median": ...}, or {"why_not": sentence}


def seconds(action: Action, device: torch.device) -> float:
    """Time one run, in seconds: between events on a CUDA device, on the wall elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def race(
    actions: Mapping[str, Action], device: torch.device, *, rounds: int, budget: float
) -> dict[str, Times]:
    """Time all actions in turn, so that a noisy machine disturbs all alike; return medians.

    Two warm-up rounds (the first may compile), then at most `rounds`, at least 3 where more would
    take longer than `budget` seconds together. One that raises leaves, with its reason.
    """
    found: dict[str, Times] = {}
    running = dict(actions)
    timed: dict[str, list[float]] = {name: [] for name in actions}
    warm: dict[str, float] = {}

    def run(name: str) -> float | None:
        try:
            return seconds(running[name], device)
        except Exception as error:  # whatever it is: the others go on
            found[name] = {"why_not": reason(error)}
            del running[name]
            release(device)
            return None

    for _ in range(2):
        for name in tuple(running):
            warm[name] = run(name) or 0.0
    total = sum(warm[name] for name in running)
    count = rounds if total * rounds <= budget else min(rounds, max(3, int(budget / total)))
    for _ in range(count):
        for name in tuple(running):
            taken = run(name)
            if taken is not None:
                timed[name].append(taken)
    for name in running:
        found[name] = {"seconds": timed[name], "median": statistics.median(timed[name])}
    return {name: found[name] for name in actions}


def reason(error: BaseException) -> str:
    """Put an error into one line."""
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
        return "it runs out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"it raises {type(error).__name__}: {lines[0][:200]}"


def release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_peak(action: Action, device: torch.device) -> int:
    """Measure the most CUDA bytes that `action` needs, beyond those allocated before."""
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    action()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def in_a_process(module: str, *arguments: object) -> int:
    """Return the number that `python -m module` prints. Raises RuntimeError where it fails.

    A process that has run other things before holds memory that it no longer needs. In this one
    freed memory goes back to the system at once, so that what is resident is what is alive.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise RuntimeError(f"the process that measures it ended with {answer.returncode}: {last}")
    return int(answer.stdout.split()[-1])


def resident_peak(action: Action) -> int:
    """Measure this process's peak resident bytes while `action` runs, over those before. Linux.

    To be called in a process that `in_a_process` started.
    """
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak, to the present
    action()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
