"""PyTorch's context parallelism: each process holds a part of the tokens of every sequence.

`torch.distributed.tensor.experimental.context_parallel` replaces SDPA, and nothing else, by a ring
over all processes. So IHA is right there where a call is one SDPA without a mask, over virtual
tokens that are cut as the tokens are; any other would attend within its own part.
"""

from __future__ import annotations

import sys

import torch
from torch.nn import functional

from iha.backends import sdpa
from iha.call import Call

_MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"


def active() -> bool:
    """Whether `context_parallel` has replaced SDPA."""
    attention = functional.scaled_dot_product_attention
    if attention is torch._C._nn.scaled_dot_product_attention:  # pyright: ignore
        return False
    return attention in getattr(sys.modules.get(_MODULE), "_replaced_functions", ())


def refusal(call: Call, backend: str) -> str | None:
    """Why `backend` ("auto" or a name) would be wrong for `call` within context parallelism."""
    if backend not in ("auto", sdpa.NAME):
        return f"backend {backend!r} would attend within this process's tokens; use 'sdpa'"
    if call.softcap is not None or not sdpa.one_product(call):
        return (
            "only causal='flat' and causal=None are possible, without window, attn_mask,"
            " document_ids, query_offset and softcap; use FSDP without context parallelism"
        )
    return None
