"""The three linear maps of the operator: mix heads, rotate pseudo-heads, collapse them.

Layouts: *pseudo-major* (B, h, P, N, d) is what one matrix product over the heads gives;
*tokens-major* (B, N, P, h, d) what one per token gives, and this is also the *interleaved* sequence
(B, N·P, h, d), index i = n·P + p, that a causal attention expects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

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


def mix_tokens(
    base: Float[Tensor, "B H N d"], alpha: Float[Tensor, "H h P"]
) -> Float[Tensor, "B N P h d"]:
    """`mix`, as one (P·h, H)·(H, d) product per token, which writes pseudo-heads beside each other.

    So (B, N, P, h, d) *is* the interleaved sequence (B, N·P, h, d), i = n·P + p, without a copy.
    """
    (B, H, N, d), (h, P) = base.shape, alpha.shape[1:]
    weights = alpha.to(base.dtype).permute(2, 1, 0).reshape(P * h, H)
    return combine(weights, base.transpose(1, 2)).view(B, N, P, h, d)


def collapse_tokens(
    pseudo: Float[Tensor, "B N P h d"], collapse: Float[Tensor, "H h P"] | Float[Tensor, "h P"]
) -> Float[Tensor, "B H N d"]:
    """`collapse_heads` of what `mix_tokens` wrote."""
    weights = collapse.to(pseudo.dtype)
    if weights.ndim == 2:
        return (pseudo * weights.T[:, :, None]).sum(2).transpose(1, 2)
    return combine(weights.permute(0, 2, 1).flatten(1), pseudo.flatten(2, 3)).transpose(1, 2)


def rotate_by_phase(
    pseudo: Float[Tensor, "*batch P N d"], phase: Phase | None, rotary: RotaryConvention
) -> Float[Tensor, "*batch P N d"]:
    """Rotate pseudo-head p of every token by its phase, tables (P, r)."""
    if phase is None:
        return pseudo
    cos, sin = phase[0][:, None], phase[1][:, None]
    learned = cos.requires_grad or sin.requires_grad
    if torch.compiler.is_compiling() or learned:
        return rotate(pseudo, (cos, sin), rotary)
    if rotary == "pairs" and _turns_at_once(pseudo) and pseudo.is_contiguous():
        turn = torch.complex(cos.to(pseudo.dtype), sin.to(pseudo.dtype))
        turn = pad(turn, (0, pseudo.shape[-1] // 2 - turn.shape[-1]), value=1)
        numbers = torch.view_as_complex(pseudo.unflatten(-1, (-1, 2)))
        return torch.view_as_real(numbers * turn).flatten(-2)
    return _Rotation.apply(pseudo, cos.to(pseudo.dtype), sin.to(pseudo.dtype), rotary)  # pyright: ignore[reportReturnType]


def _turns_at_once(heads: Float[Tensor, "*batch d"]) -> bool:
    """Whether pairs of `heads` can be complex numbers, which are turned several times as fast."""
    if torch.compiler.is_compiling():
        return False
    exact = heads.dtype in (torch.float32, torch.float64)
    return heads.device.type == "cpu" and exact and heads.shape[-1] % 2 == 0


class _Rotation(torch.autograd.Function):
    """`rotate` in one pass, written where it stays; backwards the same by the negative angle."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor, rotary: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotary = rotary
        rotated, r = torch.empty_like(heads), cos.shape[-1]
        if rotary == "half":
            halves = [(t[..., :r], t[..., r : 2 * r]) for t in (heads, rotated)]
        else:
            halves = [(t[..., 0 : 2 * r : 2], t[..., 1 : 2 * r : 2]) for t in (heads, rotated)]
        (first, second), (to_first, to_second) = halves
        torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=to_second).addcmul_(first, sin)
        rotated[..., 2 * r :] = heads[..., 2 * r :]
        return rotated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grads[0], cos, -sin, ctx.rotary), None, None, None  # pyright: ignore[reportReturnType]


def pseudo_tokens(
    call: Call,
) -> tuple[Float[Tensor, "B N Pq h d"], Float[Tensor, "B S P g d"], Float[Tensor, "B S P g d"]]:
    """Pseudo-queries, -keys and -values of every token, rotated by their phase."""
    query = rotate_by_phase(mix_tokens(call.query, call.alpha_q), call.query_phase, call.rotary)
    key = rotate_by_phase(mix_tokens(call.key, call.alpha_k), call.phase, call.rotary)
    return query, key, mix_tokens(call.value, call.alpha_v)


def paired(call: Call) -> Call:
    """The same attention, its dimensions in the order in which a phase turns them at once.

    Scores do not tell an order that queries and keys share, and base tensors are P times smaller.
    """
    if call.phase is None or call.rotary == "pairs" or not _turns_at_once(call.query):
        return call
    r = call.phase[0].shape[-1]

    def neighbours(base: Tensor) -> Tensor:
        pairs = base[..., : 2 * r].unflatten(-1, (2, r)).mT.flatten(-2)
        return torch.cat((pairs, base[..., 2 * r :]), -1) if 2 * r < base.shape[-1] else pairs

    return call.replace(query=neighbours(call.query), key=neighbours(call.key), rotary="pairs")


def interleaved_inputs(
    call: Call,
) -> tuple[Float[Tensor, "B h NPq d"], Float[Tensor, "B g SP d"], Float[Tensor, "B g SP d"]]:
    """The N·Pq virtual queries and S·P virtual keys and values that one standard attention takes.

    Strided views: (B, N·P, h, d), their heads transposed to the front.
    """
    query, key, value = (pseudo.flatten(1, 2).transpose(1, 2) for pseudo in pseudo_tokens(call))
    return query, key, value


def interleaved_output(call: Call, virtual: Float[Tensor, "B h NPq d"]) -> Float[Tensor, "B H N d"]:
    pseudo = virtual.transpose(1, 2).unflatten(1, (-1, call.pseudo_queries))
    output = collapse_tokens(pseudo, call.collapse)
    if call.query.device.type != "cpu":
        return output
    # PyTorch's kernels for CPUs give zeros for a query without a score that is a number. One that
    # is NaN itself, or whose mixing is, is to be seen as what it is.
    mixing = 0.0 * (call.alpha_q.detach().amax() + call.alpha_k.detach().amax())
    broken = 0.0 * call.query.detach().amax((1, 3), keepdim=True) + mixing
    return output + broken.to(output.dtype)
