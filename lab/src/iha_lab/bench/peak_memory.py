"""Peak memory of one implementation on a CPU: prints bytes beyond the inputs, gradients included.

python -m iha_lab.bench.peak_memory LAYER NAME    # LAYER is one of `cases.Layer` as JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from iha_lab.bench.cases import Layer
from iha_lab.bench.implementations import implementation, inputs, once, shortened
from iha_lab.bench.measure import resident_peak

CPU = torch.device("cpu")


def measured(layer: Layer, name: str) -> int:
    # What is loaded and started once belongs to no implementation.
    _action(shortened(layer, 16), name)()
    size = 2**28
    known = resident_peak(lambda: torch.ones(size // 4))
    if abs(known - size) > size // 50:
        raise RuntimeError(f"a tensor of {size} bytes was measured as {known}")
    return resident_peak(_action(layer, name))


def _action(layer: Layer, name: str) -> Callable[[], object]:
    tensors = inputs(layer, CPU, requires_grad=not layer.decodes)
    return once(implementation(name, layer, CPU), tensors)


if __name__ == "__main__":
    print(measured(Layer(**json.loads(sys.argv[1])), sys.argv[2]))
