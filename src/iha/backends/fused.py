"""Triton kernels that read base tensors and write outputs: no pseudo tensor, forward or backward.

The kernels are in `iha.kernels`, which is imported when the first call runs. Deterministic: sums
are always taken in the same order, so equal inputs give equal bits.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from iha.backends import alternatives
from iha.call import Call, Refusal

NAME = "fused"

INSTALLED = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs the kernels on a CPU, slowly: how they are tested without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_REFUSES = (torch.bfloat16,)

MOST_PSEUDO_HEADS, WIDEST = 32, 256
SHARED_MEMORY = 160 * 1024  # bytes that the default tiles may use (kernels.json has what they do)


def refusal(call: Call) -> Refusal | None:
    why = _unfit_tensors(call) or unfit_device(call)
    return why and (lambda: f"{why()}; {alternatives.instead(call)} can do it")


def _unfit_tensors(call: Call) -> Refusal | None:
    (B, _, N, d), S, P = call.query.shape, call.key.shape[2], call.pseudo_heads
    if call.dropout_p > 0:
        return lambda: "the kernels have no dropout"
    if call.query.dtype == torch.float64:
        return lambda: "the kernels compute in float32, bfloat16 or float16, not in float64"
    if P > MOST_PSEUDO_HEADS:
        return lambda: f"the kernels take up to {MOST_PSEUDO_HEADS} pseudo-heads, not {P}"
    if d > WIDEST or d % 2:
        return lambda: f"the kernels take an even head dimension of up to {WIDEST}, not {d}"
    if call.alpha_q.shape[0] != call.alpha_q.shape[1]:
        return lambda: "the kernels take all heads at once, which needs no 'streamed' around it"
    if B == 0:
        return lambda: "the batch is empty"
    heads = (call.query, call.key, call.value)
    numbers = max(t.shape[1] * max(t.stride(1), t.shape[2] * d) for t in heads)
    if max(N * P, S * P, numbers) >= 2**31:
        return lambda: (
            f"the kernels count what belongs to one sequence in 32 bits, and {max(N, S)} tokens"
            f" of {P} pseudo-heads, or {numbers} numbers from its first head to its last, are more"
        )
    return None


def unfit_device(call: Call) -> Refusal | None:
    """Why the kernels do not run here."""
    if not INSTALLED:
        return lambda: "the kernels need the package triton, which cannot be imported"
    if INTERPRETED and call.query.device.type == "cpu":
        if call.query.dtype in INTERPRETED_REFUSES:
            return lambda: "Triton's interpreter has no products of bfloat16"
        return None
    if not call.query.is_cuda:
        return lambda: (
            f"the kernels need a CUDA device, not {call.query.device.type} (TRITON_INTERPRET=1 set"
            " before Python starts runs them on a CPU, for tests)"
        )
    if torch.version.hip is not None:
        return lambda: "the kernels are not tried on ROCm"
    device = torch.cuda.get_device_properties(call.query.device)
    if device.major < 9 or device.shared_memory_per_block_optin < SHARED_MEMORY:
        return lambda: (
            "the kernels' tiles are made for Hopper and Blackwell and their"
            f" {SHARED_MEMORY // 1024} KiB of shared memory, as H100 and B200 have them, not for"
            f" {device.name}"
        )
    return None


def run(call: Call) -> Tensor:
    from iha.kernels import ops  # imports Triton

    return ops.attend(call)
