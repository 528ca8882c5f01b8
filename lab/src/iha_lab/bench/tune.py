"""Try tile sizes on this GPU and keep the fastest, for everyone who has one of its generation.

    python -m iha_lab.bench.tune

writes src/iha/kernels/tuned.json; what it does not touch stays.

For each kernel of each case of `iha bench`: every candidate is compiled, run and timed by device
events; one that asks for more than the GPU has is passed over. What is computed does not
depend on the tiles, and `iha bench` checks it against `reference`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from iha.call import Call
from iha.checks import checked_call
from iha.kernels import configs, launch
from iha_lab.bench.cases import Layer, case
from iha_lab.bench.implementations import inputs

FILE = Path(configs.__file__).with_name("tuned.json")
ROWS = ((128, 64), (128, 32), (64, 64), (64, 32), (32, 64), (32, 128), (256, 32))
CASES = ("paper", "small-p", "decode")


def candidates(shape: configs.Shape) -> Iterator[configs.Config]:
    for (query_rows, key_rows), stages, warps in itertools.product(ROWS, (1, 2, 3), (4, 8)):
        yield configs.by_rule(shape, configs.Rule(query_rows, key_rows, stages), warps)


def tune(
    kernel: configs.Kernel, shape: configs.Shape, milliseconds: Callable[[], float]
) -> tuple[float, float]:
    """Leave the best candidate in `configs.tuned()`; return the time before, and with it."""
    before = configs.config(kernel, shape)
    timings: dict[configs.Config, float] = {}
    for found in dict.fromkeys((before, *candidates(shape))):
        use(kernel, shape, found)
        try:
            timings[found] = milliseconds()
        except OutOfResources:
            continue
    best = min(timings, key=lambda found: timings[found])
    use(kernel, shape, best)
    return timings.get(before, math.inf), timings[best]


def use(kernel: configs.Kernel, shape: configs.Shape, found: configs.Config) -> None:
    configs.tuned()[kernel, shape] = found
    configs.config.cache_clear()


def kernels_of(call: Call) -> dict[configs.Kernel, Callable[[], object]]:
    """Return what runs each kernel; those of the backward pass run together."""
    if call.query.shape[2] < call.key.shape[2]:
        return {"decode": lambda: launch.run_decode(call)}
    output, log_sum = launch.run_forward(call)

    def backward() -> object:
        return launch.run_backward(call, output, log_sum)

    return {
        "forward": lambda: launch.run_forward(call),
        **dict.fromkeys(("output", "query", "key", "value"), backward),
    }


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("tune.py measures on a GPU, and there is none here.")
    layers = [layer for name in CASES for layer in case(name, False) if isinstance(layer, Layer)]
    for layer in layers:
        tensors = inputs(layer, torch.device("cuda"))
        call = checked_call(*tensors, window=layer.window)
        shape = launch.shape_of(call)
        for kernel, run in kernels_of(call).items():
            before, after = tune(kernel, shape, lambda run=run: do_bench(run, return_mode="median"))
            print(f"{layer.title()}, {kernel}: {before:.3f} ms, now {after:.3f} ms", flush=True)
        write()


def write() -> None:
    rows = [
        {"kernel": kernel, "shape": dataclasses.asdict(shape), "config": dataclasses.asdict(found)}
        for (kernel, shape), found in configs.tuned().items()
    ]
    FILE.write_text(json.dumps({"configs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
