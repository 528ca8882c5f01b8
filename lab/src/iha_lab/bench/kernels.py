"""Compile every kernel for GPUs that need not be there, and say what it takes of them.

    python -m iha_lab.bench.kernels            # writes results/bench/kernels.json
    python -m iha_lab.bench.kernels --quick    # a few shapes; prints and writes nothing

The kernels are launched as ever, by `iha.kernels.launch`, through a driver that compiles for the
target named and then runs nothing. From the machine code: registers a thread, bytes of shared
memory a program, and bytes of local memory a thread, which are registers spilled.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

import iha
from iha.call import Call
from iha.checks import checked_call
from iha.kernels import launch
from iha.rotary import inverse_frequencies, phase_tables

RESULTS = Path(__file__).parents[4] / "results" / "bench" / "kernels.json"
TARGETS = {"sm_90": (90, 232_448), "sm_100": (100, 232_448)}  # bytes of shared memory a program


class OfflineDriver:
    """What Triton asks of a driver, answered without a device."""

    def __init__(self, capability: int, shared_memory: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.shared_memory = shared_memory
        self.compiled: list[dict[str, Any]] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_memory}

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.compiled.append({"kernel": metadata.name, "warps": metadata.num_warps})
        return lambda *arguments: None

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        registers, local = resources(binary)
        self.compiled[-1] |= {"registers": registers, "local": local, "shared": shared}
        return object(), object(), registers, local, 1024


def resources(binary: bytes) -> tuple[int, int]:
    """Read registers and bytes of local memory per thread off machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[-1]
    return int(registers), int(stack)


def a_call(
    *, P: int, d: int, H: int, G: int, dtype: torch.dtype, tokens: int = 256, **options: Any
) -> Call:
    """Make a call of which only shapes and options matter."""
    query = torch.zeros(1, H, tokens, d, dtype=dtype)
    key = torch.zeros(1, G, 256, d, dtype=dtype)
    alpha, alpha_kv = torch.zeros(H, H, P), torch.zeros(G, G, P)
    if options.pop("virtual", False):
        options["phase"] = phase_tables(P, inverse_frequencies(d), "virtual")
    return checked_call(query, key, key, alpha, alpha_kv, alpha_kv, alpha, **options)


def compile_all(call: Call, target: str, *, decode: bool) -> list[dict[str, Any]]:
    device = OfflineDriver(*TARGETS[target])
    driver.set_active(device)  # for good: this process runs no kernel
    launch.generation = lambda _: device.target.arch // 10
    try:
        if decode:
            launch.run_decode(call)
        else:
            output, log_sum = launch.run_forward(call)
            launch.run_backward(call, output, log_sum)
    except OutOfResources as error:
        device.compiled[-1]["refused"] = str(error)
    return device.compiled


def shapes(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the paper's layer and its neighbours; other P and d; the other arguments once each."""
    paper: dict[str, Any] = {"P": 16, "d": 128, "H": 16, "G": 16, "dtype": torch.bfloat16}
    window: dict[str, Any] = {"window": 16, "virtual": True}
    yield paper | window
    if quick:
        yield paper | {"P": 2, "tokens": 1}
        return
    for P in (20, 32):
        yield paper | window | {"P": P, "H": P, "G": P}
    yield from (paper | window | {"P": P, "window": 64} for P in (1, 2, 4, 8))
    yield from (paper | window | {"d": d} for d in (32, 64, 96, 256))
    yield from (paper | window | {"d": d, "dtype": torch.float32} for d in (64, 128))
    yield paper | window | {"H": 32, "G": 32}
    yield paper | window | {"dtype": torch.float16}
    yield paper | window | {"G": 4, "P": 4}
    yield from (paper | {"causal": causal} for causal in ("flat", "token", None))
    yield paper | window | {"document_ids": torch.zeros(1, 256, dtype=torch.long)}
    yield paper | window | {"attn_mask": torch.ones(1, 1, 1, 256, dtype=torch.bool)}
    yield paper | window | {"softcap": 50.0}
    yield paper | window | {"rotary": "pairs"}
    yield paper | {"query_offset": torch.tensor(0), "window": 16}
    for P, N in itertools.product((2, 4, 16), (1, 8)):
        yield paper | {"P": P, "tokens": N, "virtual": True}
    yield paper | {"P": 4, "tokens": 1, "G": 4}


def described(shape: dict[str, Any]) -> dict[str, Any]:
    """Describe a shape in the words of JSON: that a mask is there, not what it holds."""
    words = {
        name: "given" if isinstance(value, torch.Tensor) else value for name, value in shape.items()
    }
    return words | {"dtype": str(shape["dtype"]).removeprefix("torch.")}


def compiled(shape: dict[str, Any], target: str) -> list[dict[str, Any]]:
    """Make a row for each kernel that a call of `shape` runs."""
    found = compile_all(a_call(**shape), target, decode="tokens" in shape)
    return [{"target": target, "shape": described(shape), **kernel} for kernel in found]


def main() -> None:
    quick = sys.argv[1:] == ["--quick"]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor() as pool:
        calls = zip(*itertools.product(shapes(quick), TARGETS), strict=True)
        for row in itertools.chain.from_iterable(pool.map(compiled, *calls)):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if not quick:
        result = {"triton": triton.__version__, "iha": iha.__version__, "kernels": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
