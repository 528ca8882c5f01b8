"""FlexAttention over the N·P virtual tokens: any visibility, no mask of N·P x S·P entries.

Which pairs are visible is compiled into the kernel as index arithmetic, and whole blocks that
nobody sees are skipped. The price is the compilation: seconds for each new kind of call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iha.backends import alternatives
from iha.call import Call, Causality, Refusal
from iha.mixing import interleaved_inputs, interleaved_output

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

NAME = "flex"


def refusal(call: Call) -> Refusal | None:
    why = _unfit(call)
    return why and (lambda: f"{why()}; {alternatives.instead(call)} can do it")


def _unfit(call: Call) -> Refusal | None:
    device = call.query.device.type
    if device not in ("cpu", "cuda"):
        return lambda: "FlexAttention runs here on CUDA and CPU devices, not on " + device
    if call.dropout_p > 0:
        return lambda: "FlexAttention has no dropout"
    if call.query.dtype == torch.float64:
        return lambda: "FlexAttention has no kernel for float64"
    if device == "cuda":
        if call.query.shape[3] < 16:
            return lambda: "FlexAttention needs a head dimension of at least 16 on a GPU"
    elif call.requires_grad:
        return lambda: "FlexAttention has no backward pass on a CPU"
    elif torch.compiler.is_compiling():
        return lambda: "FlexAttention on a CPU compiles on its own, not inside another graph"
    return None


def run(call: Call) -> Tensor:
    # Imported where it is used: it is a large part of PyTorch's compiler.
    from torch.nn.attention.flex_attention import flex_attention

    # A row that sees nothing comes out as zeros, in the forward and in the backward kernel.
    virtual = _compiled(flex_attention, call.query.device)(
        *interleaved_inputs(call),
        score_mod=None if call.softcap is None else _softcap(call.softcap),
        block_mask=block_mask(call),
        scale=call.scale,
        enable_gqa=call.heads_per_kv > 1,
    )
    return interleaved_output(call, virtual)


def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function` through torch.compile, unless it is being compiled already."""
    if torch.compiler.is_compiling():
        return function
    # The kernel for CPUs cannot read a number that the graph holds as a symbol.
    return _compile(function, dynamic=False if device.type == "cpu" else None)


@functools.cache
def _compile(function: Callable[..., Any], *, dynamic: bool | None) -> Callable[..., Any]:
    """Once per process, and only when first needed."""
    # Window and global layers, with and without gradients, each at several lengths: the default
    # of 8 variants is soon spent, and what comes after it would run dense.
    compiler: Any = torch.compile  # pyright: ignore[reportUnknownMemberType]
    known = inspect.signature(compiler).parameters
    limit = {"recompile_limit": 64} if "recompile_limit" in known else {}
    return compiler(function, dynamic=dynamic, **limit)


def _softcap(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def block_mask(call: Call) -> BlockMask | None:
    """Which blocks of virtual queries and keys have visible pairs; None where all pairs are."""
    N, S, P, device = call.query.shape[2], call.key.shape[2], call.pseudo_heads, call.query.device
    rows = N * call.pseudo_queries
    causal, window, offset = call.causal, call.window, call.query_offset
    batch, heads, masks = _token_masks(call)
    if causal is not None or window is not None:
        if not masks and isinstance(offset, int) and not torch.compiler.is_compiling():
            return _positional_mask(N, P, causal, window, offset, rows, S * P, device)
        masks.append(_visible_positions(P, call.pseudo_queries, causal, window, offset))
    if not masks:
        return None
    first, *others = masks

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = first(b, h, i, j)
        for mask in others:
            seen = seen & mask(b, h, i, j)
        return seen

    return _create(visible, batch, heads, rows, S * P, device)


@functools.lru_cache(maxsize=32)
def _positional_mask(
    tokens: int,
    pseudo_heads: int,
    causal: Causality | None,
    window: int | None,
    offset: int,
    rows: int,
    columns: int,
    device: torch.device,
) -> BlockMask:
    """One for all layers and steps. A mask made while inferring may later meet autograd."""
    with torch.inference_mode(False):
        visible = _visible_positions(pseudo_heads, rows // tokens, causal, window, offset)
        return _create(visible, 1, 1, rows, columns, device)


def _create(
    visible: Visible, batch: int, heads: int, rows: int, columns: int, device: torch.device
) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    # Eagerly all pairs are written before they are summed up, which long sequences cannot afford.
    fused = device.type == "cuda"
    create = _compiled(create_block_mask, device) if fused else create_block_mask
    return create(visible, batch, heads, rows, columns, device=device)


def _visible_positions(
    pseudo_heads: int,
    pseudo_queries: int,
    causal: Causality | None,
    window: int | None,
    offset: int | Tensor,
) -> Visible:
    """`visible_pairs` for virtual tokens: i = n·Pq + p from the first query on, j = s·P + q.

    Flat causality compares virtual tokens, i with j; the others compare the tokens they belong to.
    """
    flat, missing = causal == "flat", pseudo_heads - pseudo_queries
    unit = pseudo_heads if flat else 1
    shift, reach = offset * unit, None if window is None else window * unit

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        n = i // pseudo_queries
        if not flat:
            distance = n - j // pseudo_heads + shift
        elif missing:  # the pseudo-queries of a token are its last Pq of P
            distance = i + (n + 1) * missing - j + shift
        else:
            distance = i - j + shift
        if causal is None:
            assert reach is not None
            return distance.abs() < reach
        return distance >= 0 if reach is None else (distance >= 0) & (distance < reach)

    return visible


def _token_masks(call: Call) -> tuple[int, int, list[Visible]]:
    """`attn_mask` and `document_ids` for virtual tokens, and for how many B and H they differ."""
    P, Pq = call.pseudo_heads, call.pseudo_queries
    masks: list[Visible] = []
    batch = heads = 1
    if call.attn_mask is not None:
        mask = call.attn_mask
        batch, heads = mask.shape[:2]
        # A dimension of size 1 is read at 0, whatever the index.
        B, H, N, S = (int(size > 1) for size in mask.shape)
        masks.append(lambda b, h, i, j: mask[B * b, H * h, N * (i // Pq), S * (j // P)])
    if call.document_ids is not None:
        ids = call.document_ids
        of_query = ids.index_select(1, call.query_positions())
        batch = ids.shape[0]
        masks.append(lambda b, h, i, j: of_query[b, i // Pq] == ids[b, j // P])
    return batch, heads, masks
