"""What the machine itself can do: a large copy and a large matrix product, measured.

A ceiling is the fastest of a few runs: what disturbs a run can only lower it.
"""

from __future__ import annotations

import torch

from iha_lab.bench.measure import Action, seconds

ROUNDS = 7


def copy_bytes_per_second(device: torch.device, quick: bool = False) -> float:
    """Measure bytes read and written by copying a tensor far larger than any cache."""
    size = 2**26 if quick else 2**28 if device.type == "cpu" else 2**31
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def matmul_flops_per_second(device: torch.device, dtype: str, quick: bool = False) -> float:
    """Measure FLOPs of a square matrix product, 2·n³, in `dtype`."""
    n = 1024 if quick else 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * n**3 / _fastest(lambda: a @ b, device)


def _fastest(action: Action, device: torch.device) -> float:
    for _ in range(2):
        action()
    return min(seconds(action, device) for _ in range(ROUNDS))
