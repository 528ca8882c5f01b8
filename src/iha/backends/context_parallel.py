"""PyTorch's context parallelism: each process holds a part of the tokens of every sequence.

`torch.distributed.tensor.experimental.context_parallel` replaces SDPA, and nothing else, by a ring
over all processes. So IHA is right there where a call is one SDPA without a mask, over virtual
tokens that are cut as the tokens are; any other would attend within its own part. A window needs no
ring: `window_halo` fetches the few keys that it reaches from the left.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from iha.backends import sdpa
from iha.call import Call, Layout
from iha.checks import check_choice, checked_size

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch.distributed import ProcessGroup as Group

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
            " document_ids, query_offset and softcap; use FSDP without context parallelism, or"
            " iha.window_halo in a model of your own"
        )
    return None


def window_halo(
    key: Float[Tensor, "B G N d"],
    value: Float[Tensor, "B G N d"],
    window: int,
    *,
    group: Group | None = None,
    layout: Layout = "bhsd",
) -> tuple[Float[Tensor, "B G S d"], Float[Tensor, "B G S d"]]:
    """Keys and values with the last W of the left neighbour before them, in its backward pass too.

    Each process of `group` holds N consecutive tokens, in the order of the ranks, and W = `window`
    reaches at most N tokens back; S is N + W, and N on the first process. With causality, a window
    layer is then one ordinary call (its default `query_offset` is right):

        key, value = iha.window_halo(key, value, W, group=group)
        output = iha.interleaved_head_attention(query, key, value, ..., window=W)

    W base tokens travel, whatever P is: flat causality lets token n see a part of token n - W.
    Every process must call it. Raises ValueError where a window is longer than a part.
    """
    check_choice("layout", layout, get_args(Layout))
    width, dim = checked_size("window", window), 2 if layout == "bhsd" else 1
    if width > key.shape[dim]:
        raise ValueError(
            f"window must not reach beyond the left neighbour's tokens, got {width} for"
            f" {key.shape[dim]} tokens in a process; use fewer processes."
        )
    return _Halo.apply(key, value, width, dim, group)  # pyright: ignore[reportReturnType]


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, width: int, dim: int, group: Group | None
    ) -> tuple[Tensor, ...]:
        ctx.settings = width, dim, group
        own = (key, value)
        left = _shifted([t.narrow(dim, t.shape[dim] - width, width) for t in own], 1, group)
        if left is None:
            return key.clone(), value.clone()
        return tuple(torch.cat(pair, dim) for pair in zip(left, own, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        width, dim, group = ctx.settings
        right = _shifted([grad.narrow(dim, 0, width) for grad in grads], -1, group)
        before = 0 if dist.get_rank(group) == 0 else width
        own = [g.narrow(dim, before, g.shape[dim] - before).clone() for g in grads]
        if right is not None:
            for grad, more in zip(own, right, strict=True):
                grad.narrow(dim, grad.shape[dim] - width, width).add_(more)
        return (*own, None, None, None)


def _shifted(halves: list[Tensor], step: int, group: Group | None) -> Tensor | None:
    """Send both to the process `step` further on; what comes from the one before, if any does."""
    rank, sent = dist.get_rank(group), torch.stack(halves)
    ranks, received = range(dist.get_world_size(group)), torch.empty_like(sent)
    operations: list[dist.P2POp] = []
    if rank + step in ranks:
        operations.append(dist.P2POp(dist.isend, sent, group=group, group_peer=rank + step))
    if rank - step in ranks:
        operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=rank - step))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return received if rank - step in ranks else None
