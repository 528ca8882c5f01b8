"""The kernels as operators of `torch.library`: whole in any graph, with autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iha.call import Call
from iha.kernels import launch

MOST_DECODED = 8  # query tokens

# A call, as what an operator may take: 7 tensors, 5 that limit or rotate, 6 numbers and words.
ARGUMENTS = {
    **dict.fromkeys(("query", "key", "value"), "Tensor"),
    **dict.fromkeys(("alpha_q", "alpha_k", "alpha_v", "collapse"), "Tensor"),
    **dict.fromkeys(("attn_mask", "document_ids", "offset", "cos", "sin"), "Tensor?"),
    "first": "SymInt",
    "causal": "str?",
    "window": "SymInt?",
    "rotary": "str",
    "scale": "float",
    "softcap": "float?",
}
CALL = ", ".join(f"{kind} {name}" for name, kind in ARGUMENTS.items())
TENSORS, LIMITS = 7, 5


def attend(call: Call) -> Tensor:
    """`launch.run_forward` with gradients, or `launch.run_decode` for a few queries without."""
    if call.query.shape[2] <= MOST_DECODED and not call.requires_grad:
        return fused_decode(*taken_apart(call))
    return fused(*taken_apart(call))[0]


@torch.library.custom_op("iha::fused", mutates_args=(), schema=f"({CALL}) -> (Tensor, Tensor)")
def fused(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, N, d), and log2 of the softmax's denominators (B, H·Pq, N)."""
    with torch.cuda.device_of(arguments[0]):  # kernels start on the current device
        return launch.run_forward(_put_together(arguments))


@torch.library.custom_op(
    "iha::fused_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor log_sum, {CALL}) -> Tensor[]",
)
def fused_backward(gradient: Tensor, log_sum: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of the seven tensors of `fused`."""
    with torch.cuda.device_of(gradient):
        return list(launch.run_backward(_put_together(arguments), _dense(gradient), log_sum))


@torch.library.custom_op("iha::fused_decode", mutates_args=(), schema=f"({CALL}) -> Tensor")
def fused_decode(*arguments: Any) -> Tensor:
    """Outputs (B, H, N, d)."""
    with torch.cuda.device_of(arguments[0]):
        return launch.run_decode(_put_together(arguments))


@fused.register_fake
def _(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    (B, H, N, _), Pq = query.shape, arguments[2].shape[2]
    return query.new_empty(query.shape), query.new_empty((B, H * Pq, N), dtype=torch.float32)


@fused_backward.register_fake
def _(gradient: Tensor, log_sum: Tensor, *arguments: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in arguments[:TENSORS]]


@fused_decode.register_fake
def _(query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[: TENSORS + LIMITS])
    ctx.numbers = inputs[TENSORS + LIMITS :]


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = fused_backward(gradient, *ctx.saved_tensors, *ctx.numbers)
    return *found, *(None for _ in range(LIMITS + len(ctx.numbers)))


fused.register_autograd(_differentiate, setup_context=_save)


def taken_apart(call: Call) -> tuple[Any, ...]:
    """`ARGUMENTS` of an operator."""
    collapse, offset = call.collapse, call.query_offset
    if collapse.ndim == 2:  # each head's own: diagonal in (h', h)
        collapse = torch.diag_embed(collapse.T).permute(1, 2, 0)
    read, first = (offset, 0) if isinstance(offset, Tensor) else (None, offset)
    cos, sin = call.phase or (None, None)
    found = {"collapse": collapse, "offset": read, "first": first, "cos": cos, "sin": sin}
    return tuple(found[n] if n in found else getattr(call, n) for n in ARGUMENTS)


def _put_together(arguments: tuple[Any, ...]) -> Call:
    given = dict(zip(ARGUMENTS, arguments, strict=True))
    offset, first, cos, sin = (given.pop(name) for name in ("offset", "first", "cos", "sin"))
    base = {name: _dense(given.pop(name)) for name in ("query", "key", "value")}
    return Call(
        **base,
        **given,
        query_offset=first if offset is None else offset,
        phase=None if cos is None else (cos, sin),
    )


def _dense(heads: Tensor) -> Tensor:
    """The kernels walk along the head dimension, of a tensor with any other strides."""
    return heads if heads.stride(3) == 1 else heads.contiguous()
