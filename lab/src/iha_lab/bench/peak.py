"""Peak memory of one contestant on a CPU, in a process of its own.

A process that has run others before holds memory that it no longer needs, so this one runs nothing
else: `python -m iha_lab.bench.peak LAYER NAME` prints a number of bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import torch
from torch import Tensor

from iha_lab.bench import contestants
from iha_lab.bench.cases import Layer
from iha_lab.bench.measure import resident_peak

CPU = torch.device("cpu")


def in_a_process(name: str, layer: Layer) -> int:
    """Bytes beyond the inputs, their gradients included. Raises RuntimeError where it fails."""
    # Freed memory goes back to the system at once, so that what is resident is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    arguments = [json.dumps(dataclasses.asdict(layer)), name]
    command = [sys.executable, "-m", "iha_lab.bench.peak", *arguments]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise RuntimeError(f"the process that measures it ended with {answer.returncode}: {last}")
    return int(answer.stdout)


def _measured(layer: Layer, name: str) -> int:
    # What is loaded and started once is no contestant's.
    tiny = contestants.shortened(layer, 16)
    contestants.once(contestants.contestant(name, tiny, CPU), _inputs(tiny))()
    size = 2**28
    known = resident_peak(lambda: torch.ones(size // 4))
    if abs(known - size) > size // 50:
        raise RuntimeError(f"a tensor of {size} bytes was measured as {known}")
    return resident_peak(contestants.once(contestants.contestant(name, layer, CPU), _inputs(layer)))


def _inputs(layer: Layer) -> list[Tensor]:
    return contestants.inputs(layer, CPU, requires_grad=not layer.decodes)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(_measured(Layer(**given), sys.argv[2]))
