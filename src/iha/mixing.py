"""The three linear maps of the operator: mix heads, turn pseudo-heads, collapse them.

Layouts: *pseudo-major* (B, h, P, N, d) is what one matrix product over the heads gives for free;
*interleaved* (B, h, N·P, d), index i = n·P + p, is the sequence that a causal attention expects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iha.rotary import rotate

if TYPE_CHECKING:
    from jaxtyping import Float

    from iha.call import Call
    from iha.rotary import Phase, RotaryConvention


def mix(
    base: Float[Tensor, "*batch H N d"], alpha: Float[Tensor, "H h P"]
) -> Float[Tensor, "*batch h P N d"]:
    """Pseudo-heads Σ_m α[m,h,p]·X[m], as one (h·P, H)·(H, N·d) matrix product per batch element."""
    heads, tokens, width = base.shape[-3:]
    weights = alpha.to(base.dtype).permute(1, 2, 0).reshape(-1, heads)
    mixed = combine(weights, base.reshape(*base.shape[:-2], tokens * width))
    return mixed.reshape(*base.shape[:-3], alpha.shape[1], alpha.shape[2], tokens, width)


def collapse_heads(
    pseudo: Float[Tensor, "*batch h P N d"],
    collapse: Float[Tensor, "H h P"] | Float[Tensor, "h P"],
) -> Float[Tensor, "*batch H N d"]:
    """Output heads Σ_{h,p} R[h',h,p]·Õ[h,p]; with R of shape (h, P), each head over its own P."""
    weights = collapse.to(pseudo.dtype)
    if weights.ndim == 2:
        return (pseudo * weights[:, :, None, None]).sum(-3)
    *batch, h, pseudo_heads, tokens, width = pseudo.shape
    flat = pseudo.reshape(*batch, h * pseudo_heads, tokens * width)
    return combine(weights.flatten(1), flat).reshape(*batch, weights.shape[0], tokens, width)


def combine(
    weights: Float[Tensor, "out h"], heads: Float[Tensor, "*batch h x"]
) -> Float[Tensor, "*batch out x"]:
    """weights @ heads. `matmul` would fold the batch into x, which copies the large operand."""
    flat = heads.reshape(-1, *heads.shape[-2:])
    product = torch.bmm(weights.expand(flat.shape[0], -1, -1), flat)
    return product.reshape(*heads.shape[:-2], *product.shape[-2:])


def turn(
    pseudo: Float[Tensor, "*batch P N d"], phase: Phase | None, rotary: RotaryConvention
) -> Float[Tensor, "*batch P N d"]:
    """Rotate pseudo-head p of every token by its phase, tables (P, r)."""
    if phase is None:
        return pseudo
    cos, sin = phase
    return rotate(pseudo, (cos[:, None], sin[:, None]), rotary)


def interleave(pseudo: Float[Tensor, "B h P N d"]) -> Float[Tensor, "B h NP d"]:
    """Lay the P pseudo-heads of each token beside each other: i = n·P + p."""
    return pseudo.transpose(2, 3).flatten(2, 3)


def uninterleave(
    virtual: Float[Tensor, "B h NP d"], pseudo_heads: int
) -> Float[Tensor, "B h P N d"]:
    return virtual.unflatten(2, (-1, pseudo_heads)).transpose(2, 3)


def interleaved_inputs(
    call: Call,
) -> tuple[Float[Tensor, "B h NP d"], Float[Tensor, "B g SP d"], Float[Tensor, "B g SP d"]]:
    """The N·P virtual queries and S·P virtual keys and values that one standard attention takes."""
    query = turn(mix(call.query, call.alpha_q), call.query_phase, call.rotary)
    key = turn(mix(call.key, call.alpha_k), call.phase, call.rotary)
    value = mix(call.value, call.alpha_v)
    return interleave(query), interleave(key), interleave(value)


def interleaved_output(call: Call, virtual: Float[Tensor, "B h NP d"]) -> Float[Tensor, "B H N d"]:
    output = collapse_heads(uninterleave(virtual, call.pseudo_queries), call.collapse)
    if call.query.device.type != "cpu":
        return output
    # PyTorch's kernels for CPUs give zeros for a query without a score that is a number. One that
    # is NaN itself, or whose mixing is, is to be seen as what it is.
    scores = (call.query.amax((1, 3)), call.alpha_q.amax(), call.alpha_k.amax())
    broken = sum(0.0 * t.detach().to(output.dtype) for t in scores)
    return output + broken[:, None, :, None]
