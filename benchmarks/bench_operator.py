"""What the operator costs on this machine, measured in one run on a CPU.

    python benchmarks/bench_operator.py            # writes benchmarks/results/operator.json
    python benchmarks/bench_operator.py --quick    # smaller sizes; prints and writes nothing

Three questions, each with B = 1, H = P = 8, d = 64, float32 and flat causality:

1. `local` against the published recipe (arXiv 2602.21371): mix by einsum, interleave, one SDPA with
   a dense window mask over N·P x N·P, collapse by einsum. The mask is made before the clock starts.
2. `local` alone up to N = 16384: is the time per token constant where the window is?
3. `streamed` against `sdpa`, global causal attention: peak memory and time, forward + backward.

Contestants alternate, so that a noisy machine disturbs them alike; the file keeps every timing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from readme import operator_tables
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import iha

B, H, P, d = 1, 8, 8, 64
FIXED_WINDOW = 16
RESULTS = Path(__file__).parent / "results" / "operator.json"


def inputs(tokens: int, requires_grad: bool = False) -> list[Tensor]:
    """Query, key, value, α^Q, α^K, α^V, R: random, scaled so that mixing keeps the variance."""
    random = torch.Generator().manual_seed(tokens)
    base = [torch.randn(B, H, tokens, d, generator=random) for _ in range(3)]
    mixing = [torch.randn(H, H, P, generator=random) / H**0.5 for _ in range(4)]
    return [tensor.requires_grad_(requires_grad) for tensor in base + mixing]


def paper_window(tokens: int) -> int:
    """W = N/(2P²), of the FLOP-matched schedule."""
    return max(1, tokens // (2 * P**2))


def window_mask(tokens: int, window: int) -> Tensor:
    """Which of the N·P virtual tokens see which: dense, as the recipe has it."""
    index = torch.arange(tokens * P, dtype=torch.int32)
    distance = index[:, None] - index
    return (distance >= 0) & (distance < window * P)


def recipe(mask: Tensor, *tensors: Tensor) -> Tensor:
    """The published recipe."""
    query, key, value, alpha_q, alpha_k, alpha_v, collapse = tensors
    virtual = (
        torch.einsum("bmnd,mhp->bhnpd", base, alpha).flatten(2, 3)
        for base, alpha in ((query, alpha_q), (key, alpha_k), (value, alpha_v))
    )
    pseudo = scaled_dot_product_attention(*virtual, attn_mask=mask).unflatten(2, (-1, P))
    return torch.einsum("bhnpd,ohp->bond", pseudo, collapse)


def timed(attention: Callable[..., Tensor], tensors: list[Tensor]) -> float:
    """Seconds of one forward pass, and of the backward pass where the tensors ask for it."""
    start = time.perf_counter()
    output = attention(*tensors)
    if tensors[0].requires_grad:
        torch.autograd.grad(output, tensors, output.detach())
    return time.perf_counter() - start


def race(
    contestants: dict[str, Callable[..., Tensor]], tensors: list[Tensor], rounds: int
) -> dict[str, Any]:
    """One warm-up round, then `rounds` in turn: timings, medians, and first over second."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, attention in contestants.items():
            seconds[name].append(timed(attention, tensors))
    seconds = {name: found[1:] for name, found in seconds.items()}
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    first, second = contestants
    ratios = [a / b for a, b in zip(seconds[first], seconds[second], strict=True)]
    return {
        "pass": "forward + backward" if tensors[0].requires_grad else "forward",
        "seconds": seconds,
        "median_seconds": medians,
        "ratio": medians[first] / medians[second],
        "ratio_of_each_round": ratios,
    }


def local_against_recipe(sizes: dict[int, int]) -> list[dict[str, Any]]:
    """`sizes`: rounds for each N."""
    rows: list[dict[str, Any]] = []
    for tokens, rounds in sizes.items():
        window, mask = paper_window(tokens), window_mask(tokens, paper_window(tokens))

        def published(*tensors: Tensor, mask: Tensor = mask) -> Tensor:
            return recipe(mask, *tensors)

        def local(*tensors: Tensor, window: int = window) -> Tensor:
            return iha.interleaved_head_attention(*tensors, window=window, backend="local")

        for backward in (False, True):
            tensors = inputs(tokens, backward)
            with torch.no_grad():
                torch.testing.assert_close(
                    local(*tensors), published(*tensors), atol=1e-4, rtol=0.0
                )
            result = race({"recipe": published, "local": local}, tensors, rounds)
            rows.append({"tokens": tokens, "window": window, **result})
            print(f"  N = {tokens}, {result['pass']}: {result['ratio']:.1f} times", flush=True)
    return rows


def local_alone(sizes: dict[int, int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for rule in ("fixed", "N/(2P²)"):
        for tokens, rounds in sizes.items():
            window = FIXED_WINDOW if rule == "fixed" else paper_window(tokens)

            def local(*tensors: Tensor, window: int = window) -> Tensor:
                return iha.interleaved_head_attention(*tensors, window=window, backend="local")

            for backward in (False, True):
                tensors = inputs(tokens, backward)
                seconds = [timed(local, tensors) for _ in range(rounds + 1)][1:]
                median = statistics.median(seconds)
                rows.append(
                    {
                        "tokens": tokens,
                        "window": window,
                        "rule": rule,
                        "pass": "forward + backward" if backward else "forward",
                        "seconds": seconds,
                        "median_seconds": median,
                        "microseconds_per_token": median / tokens * 1e6,
                    }
                )
            print(f"  N = {tokens}, W = {window}: {median:.3f} s forward + backward", flush=True)
    return rows


def streamed_against_sdpa(tokens: int, rounds: int) -> dict[str, Any]:
    names = ("streamed", "sdpa")

    def run(name: str) -> Callable[..., Tensor]:
        return lambda *tensors: iha.interleaved_head_attention(*tensors, backend=name)

    with torch.no_grad():
        found = [run(name)(*inputs(tokens)) for name in names]
        torch.testing.assert_close(*found, atol=1e-4, rtol=0.0)
    peaks = {name: [peak_in_a_process(name, tokens) for _ in range(rounds)] for name in names}
    medians = {name: statistics.median(found) for name, found in peaks.items()}
    print(f"  peak memory: {medians['streamed'] / medians['sdpa']:.2f} of sdpa's", flush=True)
    return {
        "tokens": tokens,
        "base_tensor_bytes": B * H * tokens * d * 4,
        "pseudo_tensor_bytes": B * H * P * tokens * d * 4,
        "peak_bytes": peaks,
        "median_peak_bytes": medians,
        "peak_ratio": medians["streamed"] / medians["sdpa"],
        "time": race({name: run(name) for name in names}, inputs(tokens, True), rounds),
    }


def peak_in_a_process(backend: str, tokens: int) -> int:
    # Freed memory goes back to the system at once, so that what is resident is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--peak", backend, str(tokens)]
    answer = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return int(answer.stdout)


def peak(backend: str, tokens: int) -> int:
    """Bytes that forward + backward need beyond the inputs, gradients of the inputs included."""

    def attend(tensors: list[Tensor]) -> None:
        output = iha.interleaved_head_attention(*tensors, backend=backend)
        torch.autograd.grad(output, tensors, output.detach())

    attend(inputs(16, True))  # what is loaded and started once is not the operator's
    size = 2**26
    known = resident_growth(lambda: torch.ones(size // 4))
    if abs(known - size) > size // 50:
        raise RuntimeError(f"a tensor of {size} bytes was measured as {known}")
    tensors = inputs(tokens, True)
    return resident_growth(lambda: attend(tensors))


def resident_growth(action: Callable[[], object]) -> int:
    """Peak resident memory while `action` runs, over that before. Linux only."""
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak, to the present
    action()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "iha": iha.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes, nothing is written")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak[0], int(options.peak[1])))
        return
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(),
        "shape": {"B": B, "H": H, "P": P, "d": d, "dtype": "float32", "causal": "flat"},
    }
    print("local against the recipe", flush=True)
    sizes = {256: 3, 512: 3} if options.quick else {512: 11, 1024: 7, 2048: 3}
    result["local_against_recipe"] = local_against_recipe(sizes)
    print("local alone", flush=True)
    doublings = (512, 1024, 2048) if options.quick else (512, 1024, 2048, 4096, 8192, 16384)
    result["local_alone"] = local_alone({n: 3 if n > 4096 else 7 for n in doublings})
    print("streamed against sdpa", flush=True)
    result["streamed_against_sdpa"] = streamed_against_sdpa(512 if options.quick else 2048, 3)
    print("\n" + operator_tables(result))
    if not options.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
