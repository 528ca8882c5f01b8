"""The kernels as operators of `torch.library`: whole in any graph, with autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iha.call import Call
from iha.kernels import launch

MOST_DECODED = 8  # query tokens


def attend(call: Call) -> Tensor:
    """`launch.run_forward` with gradients, or `launch.run_decode` for a few queries without."""
    tensors, numbers = taken_apart(call)
    if call.query.shape[2] <= MOST_DECODED and not call.requires_grad:
        return fused_decode(*tensors, *numbers)
    return fused(*tensors, *numbers)[0]


@torch.library.custom_op("iha::fused", mutates_args=())
def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha_q: Tensor,
    alpha_k: Tensor,
    alpha_v: Tensor,
    collapse: Tensor,
    attn_mask: Tensor | None,
    document_ids: Tensor | None,
    offset: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    causal: str | None,
    window: int | None,
    rotary: str,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, d), and log2 of the softmax's denominators (B, H·P, N)."""
    return launch.run_forward(
        _put_together(
            (query, key, value, alpha_q, alpha_k, alpha_v, collapse),
            (attn_mask, document_ids, offset, cos, sin),
            (first, causal, window, rotary, scale, softcap),
        )
    )


@torch.library.custom_op("iha::fused_backward", mutates_args=())
def fused_backward(
    gradient: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha_q: Tensor,
    alpha_k: Tensor,
    alpha_v: Tensor,
    collapse: Tensor,
    attn_mask: Tensor | None,
    document_ids: Tensor | None,
    offset: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    causal: str | None,
    window: int | None,
    rotary: str,
    scale: float,
    softcap: float | None,
) -> list[Tensor]:
    """Gradients of the seven tensors of `fused`."""
    call = _put_together(
        (query, key, value, alpha_q, alpha_k, alpha_v, collapse),
        (attn_mask, document_ids, offset, cos, sin),
        (first, causal, window, rotary, scale, softcap),
    )
    return list(launch.run_backward(call, _dense(gradient), log_sum))


@torch.library.custom_op("iha::fused_decode", mutates_args=())
def fused_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha_q: Tensor,
    alpha_k: Tensor,
    alpha_v: Tensor,
    collapse: Tensor,
    attn_mask: Tensor | None,
    document_ids: Tensor | None,
    offset: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    causal: str | None,
    window: int | None,
    rotary: str,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Outputs (B, H, N, d)."""
    return launch.run_decode(
        _put_together(
            (query, key, value, alpha_q, alpha_k, alpha_v, collapse),
            (attn_mask, document_ids, offset, cos, sin),
            (first, causal, window, rotary, scale, softcap),
        )
    )


@fused.register_fake
def _(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    (B, H, N, _), P = query.shape, arguments[2].shape[2]
    return query.new_empty(query.shape), query.new_empty((B, H * P, N), dtype=torch.float32)


@fused_backward.register_fake
def _(gradient: Tensor, log_sum: Tensor, *arguments: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in arguments[:7]]


@fused_decode.register_fake
def _(query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:12])
    ctx.numbers = inputs[12:]


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = fused_backward(gradient, *ctx.saved_tensors, *ctx.numbers)
    return *found, *(None for _ in range(5 + len(ctx.numbers)))


fused.register_autograd(_differentiate, setup_context=_save)


def taken_apart(call: Call) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """A call as what an operator may take: tensors, numbers and strings."""
    offset = call.query_offset
    collapse = call.collapse
    if collapse.ndim == 2:  # each head's own: diagonal in (h', h)
        collapse = torch.diag_embed(collapse.T).permute(1, 2, 0)
    tensors = (call.query, call.key, call.value, call.alpha_q, call.alpha_k, call.alpha_v, collapse)
    cos, sin = (None, None) if call.phase is None else call.phase
    read = offset if isinstance(offset, Tensor) else None
    first = 0 if isinstance(offset, Tensor) else offset
    return (
        (*tensors, call.attn_mask, call.document_ids, read, cos, sin),
        (first, call.causal, call.window, call.rotary, call.scale, call.softcap),
    )


def _put_together(
    tensors: tuple[Tensor, ...], limits: tuple[Tensor | None, ...], numbers: tuple[Any, ...]
) -> Call:
    attn_mask, document_ids, offset, cos, sin = limits
    first, causal, window, rotary, scale, softcap = numbers
    return Call(
        *map(_dense, tensors[:3]),
        *tensors[3:],
        attn_mask=attn_mask,
        document_ids=document_ids,
        query_offset=first if offset is None else offset,
        phase=None if cos is None or sin is None else (cos, sin),
        causal=causal,
        window=window,
        rotary=rotary,
        scale=scale,
        softcap=softcap,
    )


def _dense(heads: Tensor) -> Tensor:
    """The kernels walk along the head dimension, of a tensor with any other strides."""
    return heads if heads.stride(3) == 1 else heads.contiguous()
