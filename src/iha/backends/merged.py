"""Attention in parts that a standard kernel's causal flag can say, merged by log-sum-exp.

With fewer pseudo-queries than pseudo-keys the virtual tokens are no causal sequence. But with the
pseudo-keys of *one* index q they are: every pseudo-query of token n sees those of the tokens up to
n, under flat causality where q < P - Pq, under token causality always. The other indices, the last
Pq of P, are a causal sequence of N·Pq virtual tokens, as in the paper. Parts O_i with log-sum-exps
L_i are one attention over all their keys, L = log Σ_i exp(L_i) and O = Σ_i exp(L_i - L)·O_i, and a
part's own backward kernel gives its share of the gradients when it is handed O and L for its own
(as Ring Attention does, arXiv 2310.01889). So no mask is written, forward or backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from iha.call import Call
from iha.mixing import interleaved_output, mix_tokens, rotate_by_phase

if TYPE_CHECKING:
    from jaxtyping import Float


class Part(NamedTuple):
    """Keys and values, and which pseudo-queries of all tokens attend to them."""

    queries: slice
    key: Float[Tensor, "B M g d"]
    value: Float[Tensor, "B M g d"]
    causal: bool  # otherwise all are seen


class Kernel(NamedTuple):
    """A standard attention in the layout (B, tokens, heads, d)."""

    # (query, part) -> output, log-sum-exp (B, tokens, heads)
    forward: Callable[[Tensor, Part], tuple[Tensor, Tensor]]
    # (gradient, query, part, output, log-sum-exp) -> gradients of query, key and value
    backward: Callable[[Tensor, Tensor, Part, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    # Whether its causal flag makes the last query level with the last key, not the first ones
    level_at_end: bool


def run(call: Call, kernel: Kernel) -> Tensor:
    """`call` has causality, an int for its offset, and no mask."""
    query = rotate_by_phase(mix_tokens(call.query, call.alpha_q), call.query_phase, call.rotary)
    apart = call.pseudo_heads - (call.pseudo_queries if call.causal == "flat" else 0)
    tensors: list[Tensor] = []
    for indices in (slice(apart), slice(apart, None)):
        phase = call.phase and (call.phase[0][indices], call.phase[1][indices])
        key = mix_tokens(call.key, call.alpha_k[..., indices])
        value = mix_tokens(call.value, call.alpha_v[..., indices])
        tensors += [rotate_by_phase(key, phase, call.rotary), value]
    output: Any = _Merged.apply(kernel, call.query_offset, query, *tensors)
    return interleaved_output(call, output.flatten(1, 2).transpose(1, 2))


def _parts(kernel: Kernel, query: Tensor, offset: int, tensors: Sequence[Tensor]) -> Iterator[Part]:
    """Views of `tensors`: keys and values of the indices that stand alone, then of the others."""
    (_, N, Pq, *_), all_queries = query.shape, slice(None)
    before = 0 if kernel.level_at_end else offset
    for key, value in (tensors[:2], tensors[2:]):
        if before and key.shape[2]:
            key, value = (t[:, :before].flatten(1, 2) for t in (key, value))
            yield Part(all_queries, key, value, causal=False)
    apart_key, apart_value, key, value = (t[:, before : offset + N] for t in tensors)
    for q, j in itertools.product(range(apart_key.shape[2]), range(Pq)):
        yield Part(slice(j, j + 1), apart_key[:, :, q], apart_value[:, :, q], causal=True)
    if key.shape[2]:
        yield Part(all_queries, key.flatten(1, 2), value.flatten(1, 2), causal=True)


def _rows(tokens: Float[Tensor, "B N Pq *rest"], part: Part) -> Float[Tensor, "B rows *rest"]:
    return tokens[:, :, part.queries].flatten(1, 2)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, offset: int, query: Tensor, *tensors: Tensor) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        output = torch.zeros_like(query, dtype=exact)
        log_sum = output.new_full(query.shape[:-1], -torch.inf)
        for part in _parts(kernel, query, offset, tensors):
            found, log = kernel.forward(_rows(query, part), part)
            total, known = (t[:, :, part.queries] for t in (output, log_sum))
            log = log.view_as(known)
            total.lerp_(found.to(exact).view_as(total), (log - known).sigmoid()[..., None])
            known.copy_(torch.logaddexp(known, log))
        output = output.to(query.dtype)
        ctx.save_for_backward(output, log_sum, query, *tensors)
        ctx.kernel, ctx.offset = kernel, offset
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        output, log_sum, query, *tensors = ctx.saved_tensors
        totals = [torch.zeros_like(t, dtype=log_sum.dtype) for t in (query, *tensors)]
        parts = (_parts(ctx.kernel, query, ctx.offset, t) for t in (tensors, totals[1:]))
        for part, total in zip(*parts, strict=True):
            gradient, queries, known, log = (
                _rows(t, part) for t in (*grads, query, output, log_sum)
            )
            of_query, of_key, of_value = ctx.kernel.backward(gradient, queries, part, known, log)
            rows = totals[0][:, :, part.queries]
            rows += of_query.view_as(rows)
            total.key.add_(of_key)
            total.value.add_(of_value)
        return None, None, *(total.to(query.dtype) for total in totals)


def on_cpu(scale: float) -> Kernel:
    """What `scaled_dot_product_attention` runs on a CPU."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def attend(query: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        heads = (t.transpose(1, 2) for t in (query, part.key, part.value))
        output, log_sum = forward(*heads, 0.0, part.causal, scale=scale)
        return output.transpose(1, 2), log_sum.transpose(1, 2)

    def differentiate(
        gradient: Tensor, query: Tensor, part: Part, output: Tensor, log_sum: Tensor
    ) -> Any:
        given = (gradient, query, part.key, part.value, output, log_sum)
        found = backward(*(t.transpose(1, 2) for t in given), 0.0, part.causal, scale=scale)
        return tuple(t.transpose(1, 2) for t in found)

    return Kernel(attend, differentiate, level_at_end=False)
