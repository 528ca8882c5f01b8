"""Triton kernels that read base tensors and write outputs: no pseudo tensor, forward or backward.

The kernels are in `iha.kernels`, which is imported when the first call runs. Deterministic: sums
are always taken in the same order, so equal inputs give equal bits.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from iha.backends import sdpa
from iha.call import Call

NAME = "fused"

INSTALLED = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs the kernels on a CPU, slowly: how they are tested without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_REFUSES = (torch.bfloat16,)

MOST_PSEUDO_HEADS, WIDEST = 32, 256
SHARED_MEMORY = 160 * 1024  # bytes that the default tiles may use (kernels.json has what they do)


def refusal(call: Call) -> str | None:
    why = _unfit_tensors(call) or unfit_device(call)
    return None if why is None else f"{why}; {sdpa.instead(call)} can do it"


def _unfit_tensors(call: Call) -> str | None:
    (B, H, N, d), S, P = call.query.shape, call.key.shape[2], call.pseudo_heads
    if call.dropout_p > 0:
        return "the kernels have no dropout"
    if call.query.dtype == torch.float64:
        return "the kernels compute in float32, bfloat16 or float16, not in float64"
    if P > MOST_PSEUDO_HEADS:
        return f"the kernels take up to {MOST_PSEUDO_HEADS} pseudo-heads, not {P}"
    if d > WIDEST or d % 2:
        return f"the kernels take an even head dimension of up to {WIDEST}, not {d}"
    if call.alpha_q.shape[0] != call.alpha_q.shape[1]:
        return "the kernels take all heads at once, which needs no 'streamed' around it"
    if B == 0:
        return "the batch is empty"
    if max(N * P, S * P, N * H * d, S * H * d) >= 2**31:
        return (
            f"the kernels count what belongs to one sequence in 32 bits, and {max(N, S)} tokens"
            f" of {P} pseudo-heads, or of {H}·{d} numbers, are more"
        )
    return None


def unfit_device(call: Call) -> str | None:
    """Why the kernels do not run here."""
    if not INSTALLED:
        return "the kernels need the package triton, which cannot be imported"
    if INTERPRETED and call.query.device.type == "cpu":
        unable = call.query.dtype in INTERPRETED_REFUSES
        return "Triton's interpreter has no products of bfloat16" if unable else None
    if not call.query.is_cuda:
        return (
            f"the kernels need a CUDA device, not {call.query.device.type} (TRITON_INTERPRET=1 set"
            " before Python starts runs them on a CPU, for tests)"
        )
    if torch.version.hip is not None:
        return "the kernels are not tried on ROCm"
    device = torch.cuda.get_device_properties(call.query.device)
    if device.shared_memory_per_block_optin < SHARED_MEMORY:
        return (
            f"the kernels need {SHARED_MEMORY // 1024} KiB of shared memory a multiprocessor, as"
            f" A100, H100 and B200 have, and {device.name} has"
            f" {device.shared_memory_per_block_optin // 1024}"
        )
    return None


def promising(call: Call) -> bool:
    """Whether, by arithmetic, the kernels should beat the expanded path; not measured.

    A tile of base keys of all G heads, 2·G·d bytes a token, serves 128 pseudo-queries, which is
    2·128·P·d FLOPs: 128·P/G FLOPs a byte from the L2 cache. From 64 on that feeds a good part of
    an H100's matrix throughput, and a window layer's pseudo tensors are most of what the expanded
    path waits for. In decoding, each 128 of H·P²·N rows read the cache once, where the expanded
    path writes and reads P copies of it.
    """
    (_, H, N, _), G, P = call.query.shape, call.key.shape[1], call.pseudo_heads
    if N <= 8 and not call.requires_grad:
        return H * P * P * N <= 128 * 2 * P
    return call.window is not None and 2 * P >= G


def run(call: Call) -> Tensor:
    from iha.kernels import ops  # imports Triton

    return ops.attend(call)
