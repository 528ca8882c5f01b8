"""Window layers in O(N·W): block by block, on any device, without an N·P x N·P mask.

A block of T query tokens sees at most T + W key tokens. Both are read as strided views of the base
tensors; one batched matrix product mixes the heads and writes each block's virtual tokens where
they are used, *pseudo-major* (row p·T + t). Softmax does not care about the order of the keys, so
nothing is interleaved; which pairs are visible comes from index arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from iha.backends import sdpa
from iha.call import Call, visible_pairs
from iha.mixing import collapse_heads, mix, turn

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NAME = "local"


def refusal(call: Call) -> str | None:
    if call.window is None:
        return f"there is no window shorter than the sequence; {sdpa.instead(call)} can do it"
    return None


def block_size(window: int, pseudo_heads: int) -> int:
    """T: about a window, so that half of the computed pairs are wanted, but at least 64 rows."""
    return max(window, -(-64 // pseudo_heads))


def run(call: Call) -> Tensor:
    assert call.window is not None
    B, _, N, _ = call.query.shape
    P, W = call.pseudo_heads, call.window
    T = min(block_size(W, P), N)
    # Under flat causality the token W back is still seen in part, by the lower pseudo-queries.
    back = W if call.causal == "flat" else W - 1
    ahead = W - 1 if call.causal is None else 0
    blocks, seen = -(-N // T), back + T + ahead

    query = _blocks(pad(call.query, (0, 0, 0, blocks * T - N)), T, T)
    first = call.query_offset - back
    key, value = (
        _blocks(_tokens(base, first, blocks * T + back + ahead), seen, T)
        for base in (call.key, call.value)
    )
    query = turn(mix(query, call.alpha_q), call.phase, call.rotary).flatten(2, 3)
    key = turn(mix(key, call.alpha_k), call.phase, call.rotary).flatten(2, 3)
    value = mix(value, call.alpha_v).flatten(2, 3)

    mask = _block_mask(call, T, back, seen, blocks)
    attention = sdpa.attend if call.softcap is None else _softcapped
    pseudo = attention(call, query, key, value, mask).unflatten(2, (P, T))
    out = collapse_heads(pseudo, call.collapse).unflatten(0, (B, blocks)).transpose(1, 2)
    return out.flatten(2, 3)[:, :, :N]


def _tokens(
    base: Float[Tensor, "B G S d"], first: int | Int[Tensor, ""], count: int
) -> Float[Tensor, "B G count d"]:
    """Tokens first … first + count - 1; those outside of 0 … S-1 hold anything, and are masked."""
    S = base.shape[2]
    if isinstance(first, Tensor):
        positions = torch.arange(count, device=base.device) + first
        return base.index_select(2, positions.clamp(0, S - 1))
    start, stop = max(first, 0), min(first + count, S)
    return pad(base[:, :, start:stop], (0, 0, start - first, first + count - stop))


def _blocks(
    tokens: Float[Tensor, "B h M d"], size: int, step: int
) -> Float[Tensor, "runs h size d"]:
    """Overlapping runs of `size` tokens, `step` apart; a view where B = 1."""
    d = tokens.shape[3]
    runs = tokens.flatten(2).unfold(2, size * d, step * d).transpose(1, 2)
    return runs.flatten(0, 1).unflatten(2, (size, d))


def _block_mask(
    call: Call, T: int, back: int, seen: int, blocks: int
) -> Bool[Tensor, "#blocks #H P*T P*seen"]:
    """Visibility within each block: by position, by the ends of the sequence, by token masks."""
    P, N, device = call.pseudo_heads, call.query.shape[2], call.query.device
    pseudo = torch.arange(P, device=device)
    pairs = visible_pairs(
        torch.arange(T, device=device)[:, None, None],
        pseudo[:, None, None, None],
        torch.arange(seen, device=device) - back,
        pseudo[:, None],
        causal=call.causal,
        window=call.window,
        pseudo_heads=P,
    )  # (P, T, P, seen)
    start = torch.arange(blocks, device=device)[:, None] * T
    n = (start + torch.arange(T, device=device)).clamp(max=N - 1)  # token of the query tensor
    s = start + torch.arange(seen, device=device) - back + call.query_offset
    tokens = _token_pairs(call, n, s)
    return (tokens[:, :, None, :, None, :] & pairs).flatten(4, 5).flatten(2, 3)


def _token_pairs(
    call: Call, n: Int[Tensor, "blocks T"], s: Int[Tensor, "blocks seen"]
) -> Bool[Tensor, "#runs #H #T seen"]:
    """Whether key token s of a block exists, and the masks let query token n see it."""
    (B, _, N, _), S = call.query.shape, call.key.shape[2]
    visible = ((s >= 0) & (s < S))[None, :, None, None]
    s = s.clamp(0, S - 1)
    if call.attn_mask is not None:
        mask = call.attn_mask.expand(B, -1, N, S)[:, :, n[:, :, None], s[:, None]]
        visible = visible & mask.transpose(1, 2)
    if call.document_ids is not None:
        ids = call.document_ids
        same = ids[:, n + call.query_offset][..., None] == ids[:, s][:, :, None]
        visible = visible & same[:, :, None]
    return visible.expand(B, -1, -1, -1, -1).flatten(0, 1)


def _softcapped(
    call: Call,
    query: Float[Tensor, "blocks h rows d"],
    key: Float[Tensor, "blocks g columns d"],
    value: Float[Tensor, "blocks g columns d"],
    mask: Bool[Tensor, "#blocks #h rows columns"],
) -> Float[Tensor, "blocks h rows d"]:
    """What SDPA would do if it had a soft-cap. Blocks are small enough to write their scores."""
    assert call.softcap is not None
    key, value = (t.repeat_interleave(call.groups, dim=1) for t in (key, value))
    scores = call.scale * query @ key.mT
    scores = call.softcap * torch.tanh(scores / call.softcap)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
    return dropout(weights, call.dropout_p) @ value
