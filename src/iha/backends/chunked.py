"""A few queries against a long cache, in plain PyTorch: base keys and values are read once.

A chunk of the cache at a time meets all pseudo-queries, and an online softmax merges the chunks, so
what is written are the scores of one chunk and never a tensor of the cache's size. Mixing is
linear, so it need not be done to keys and values. It moves to the other side of each product,

    Q̃[c] · Σ_m α^K[m,q] K[m,s]        =  Σ_m α^K[m,q] ( Q̃[c] · K[m,s] )
    Σ_s,q w[s,q] Σ_m α^V[m,q] V[m,s]  =  Σ_m Σ_s ( Σ_q α^V[m,q] w[s,q] ) V[m,s]

for a pseudo-query c = (h, p): numbers are mixed, and not vectors of d numbers. Where there are so
many queries that the numbers are more than the vectors', or where a key has to turn by the phase of
its q before it meets a query, the chunk itself is mixed, while it is in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import dropout

from iha.call import Call, Refusal
from iha.checks import known
from iha.mixing import collapse_heads, combine, mix, rotate_by_phase
from iha.visibility import reach, token_mask, visible_pairs

if TYPE_CHECKING:
    from jaxtyping import Float

# The scores of keys (B, rows, P, tokens), and the sums (B, rows, d) of values by weights. A row is
# a pseudo-query (h, p, n).
Products = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]

NAME = "chunked"

# Bytes that a chunk needs. On a CPU they are to stay in its caches; elsewhere a chunk costs kernel
# launches and gains no cache, so it is as large as memory easily bears.
CHUNK_BYTES = {"cpu": 4 * 2**20}
OTHER_CHUNK_BYTES = 2**28
# Query tokens that are computed with at a time, and how many are few.
BLOCK, FEW = 64, 16


def refusal(call: Call) -> Refusal | None:
    return None


def suits(call: Call) -> bool:
    """Whether this is a decoding step: a few queries after a cache."""
    N, S = call.query.shape[2], call.key.shape[2]
    # In this order: a graph of any length N = S never asks how many are few.
    return N == 1 or (S > N and N <= FEW)


def run(call: Call) -> Tensor:
    device = call.query.device.type
    # Scores and weights are float32 here, which autocast would round.
    with call.without_autocast():
        if torch.compiler.is_compiling():
            # A compiler would write the loops out, and again for another length.
            return _attend(_within_reach(call))
        if isinstance(call.query_offset, Tensor) and device == "cpu":
            call = call.replace(query_offset=int(call.query_offset))  # nobody waits for it here
        fit = max(1, CHUNK_BYTES.get(device, OTHER_CHUNK_BYTES) // _token_bytes(call))
        outputs = [
            [_attend(_within_reach(block), fit) for block in blocks]
            for blocks in _blocks(call, max(1, fit // call.key.shape[2]))
        ]
        return _joined([_joined(blocks, dim=2) for blocks in outputs], dim=0)


def _token_bytes(call: Call) -> int:
    """What a block of queries needs for each key token of a sequence."""
    N, d = call.query.shape[2:]
    G, (g, P) = call.key.shape[1], call.alpha_k.shape[1:]
    rows = call.alpha_q.shape[1] * call.pseudo_queries * min(N, BLOCK)
    if _mixes_numbers(call):
        return rows * (P + G) * 4
    return rows * P * 4 + 2 * g * P * d * call.key.element_size()


def _blocks(call: Call, sequences: int) -> Iterator[list[Call]]:
    """For each run of `sequences`, the calls that blocks of its queries are."""
    (B, _, N, _), mask, ids = call.query.shape, call.attn_mask, call.document_ids
    if sequences >= B and N <= BLOCK:
        yield [call]
        return
    for b in range(0, B, sequences):
        batch = slice(b, b + sequences)
        part = call.replace(
            query=call.query[batch],
            key=call.key[batch],
            value=call.value[batch],
            attn_mask=mask[batch] if mask is not None and mask.shape[0] > 1 else mask,
            document_ids=None if ids is None else ids[batch],
        )
        yield [part.of_queries(n, n + BLOCK) for n in range(0, N, BLOCK)]


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _within_reach(call: Call) -> Call:
    """`call` on the keys that its queries may see by position, documents folded into the mask."""
    N, S, offset, mask = call.query.shape[2], call.key.shape[2], call.query_offset, token_mask(call)
    if call.window is None:
        bounded = call.causal is not None and not isinstance(offset, Tensor)
        start, stop = 0, offset + N if bounded else S
    else:
        back, ahead = reach(call)
        if isinstance(offset, Tensor):
            return _gathered(call, mask, back, back + N + ahead)
        start, stop = torch.sym_max(offset - back, 0), torch.sym_min(offset + N + ahead, S)
    return call.replace(
        key=call.key[:, :, start:stop],
        value=call.value[:, :, start:stop],
        attn_mask=None if mask is None else mask[..., start:stop],
        document_ids=None,
        query_offset=offset - start,
    )


def _gathered(call: Call, mask: Tensor | None, back: int, count: int) -> Call:
    """The `count` keys from `back` before the first query on: how many is known, not where."""
    S = call.key.shape[2]
    tokens = torch.arange(count, device=call.key.device) + (call.query_offset - back)
    exists = (tokens >= 0) & (tokens < S)
    tokens = tokens.clamp(0, S - 1)
    exists = exists[None, None, None] if mask is None else mask.index_select(3, tokens) & exists
    key, value = (base.index_select(2, tokens) for base in (call.key, call.value))
    return call.replace(
        key=key, value=value, attn_mask=exists, document_ids=None, query_offset=back
    )


def _attend(call: Call, step: int | None = None) -> Float[Tensor, "B H N d"]:
    """`step` keys at a time, or all."""
    N, S, masked = call.query.shape[2], call.key.shape[2], call.attn_mask is not None
    scores_of, sums_of = _numbers(call) if _mixes_numbers(call) else _vectors(call)
    if step is not None:
        step = -(-S // -(-S // step))  # as many chunks, of one size
    starts = (0,) if step is None else range(0, S, step)
    outputs: list[Tensor] = []
    logs: list[Tensor] = []  # of the sum of exponentials, for each row
    for start in starts:
        chunk = slice(start, None if step is None else start + step)
        scores = scores_of(call.key[:, :, chunk])
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        _hide(call, scores, start)
        scores = scores.flatten(2)
        weights = scores.softmax(-1)
        if len(starts) > 1 or masked:
            # The largest weight is 1 over the sum, its largest term taken out.
            logs.append(scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log())
        weights = dropout(weights, call.dropout_p).unflatten(2, (call.pseudo_heads, -1))
        outputs.append(sums_of(weights, call.value[:, :, chunk]))
    output = outputs[0]
    if len(starts) > 1:
        output = (torch.stack(logs).softmax(0) * torch.stack(outputs)).sum(0)
    if masked:
        seen = torch.stack(logs).amax(0) > torch.finfo(output.dtype).min / 2
        output = output.where(seen, 0.0)
    pseudo = output.unflatten(1, (-1, call.pseudo_queries, N))
    return collapse_heads(pseudo, call.collapse).to(call.query.dtype)


def _hide(call: Call, scores: Float[Tensor, "B rows P tokens"], start: int) -> None:
    """Lower, in place, the scores of what may not be seen of the tokens from `start` on."""
    P, N, tokens = call.pseudo_heads, call.query.shape[2], scores.shape[3]
    pairs = scores.unflatten(1, (-1, call.pseudo_queries, N))
    lowest = torch.finfo(scores.dtype).min
    if call.attn_mask is not None:
        mask = call.attn_mask[..., start : start + tokens]
        pairs.masked_fill_(~mask[:, :, None, :, None], lowest)
    if call.causal is None and call.window is None:
        return
    first = 0
    if call.window is None and not isinstance(call.query_offset, Tensor):
        first = torch.sym_max(call.query_offset - start, 0)  # what is before all queries is seen
        if first >= tokens:
            return
    visible = visible_pairs(
        call.query_positions()[:, None, None],
        call.query_indices()[:, None, None, None],
        torch.arange(tokens - first, device=scores.device) + (start + first),
        torch.arange(P, device=scores.device)[:, None],
        causal=call.causal,
        window=call.window,
        pseudo_heads=P,
    )
    pairs[..., first:].masked_fill_(~visible, lowest)


# --- the two products, by what is mixed ---


def _mixes_numbers(call: Call) -> bool:
    """Whether scores and weights are mixed, or the chunk: what is less work for a key token."""
    if call.phase is not None:
        return False
    (_, H, N, d), (G, g, P) = call.query.shape, call.alpha_k.shape
    heads = call.alpha_q.shape[1] * call.pseudo_queries
    numbers = N * (H * G * (d + heads) + heads * G * (2 * P + d))
    vectors = 2 * G * g * P * d + 2 * N * heads * P * d
    return known(numbers <= vectors)


def _numbers(call: Call) -> Products:
    """Base queries meet base keys; scores are mixed over the queries' heads, then the keys'."""
    exact, N = _exact(call), call.query.shape[2]
    count = call.heads_per_kv * call.pseudo_queries * N  # rows that share a key/value head
    # Scaled before the product, so that no score of half precision overflows on its way.
    query = (call.query.to(exact) * call.scale).to(call.query.dtype).flatten(1, 2)[:, None].mT
    alpha_q = call.alpha_q.to(exact).flatten(1).mT  # (h·Pq, m)
    alpha_k = call.alpha_k.to(exact).permute(1, 2, 0).repeat_interleave(count, 0)  # (rows, q, m)
    alpha_v = call.alpha_v.to(exact).permute(1, 0, 2).repeat_interleave(count, 0)  # (rows, m, q)

    def scores(key: Tensor) -> Tensor:
        base = (key @ query).to(exact).unflatten(3, (-1, N))  # (B, m, tokens, H, N)
        mixed = combine(alpha_q, base.permute(0, 1, 3, 4, 2).flatten(3))
        mixed = mixed.unflatten(3, (N, -1)).flatten(2, 3)  # (B, m, rows, tokens)
        return alpha_k @ mixed.transpose(1, 2)

    def sums(weights: Tensor, value: Tensor) -> Tensor:
        base = (alpha_v @ weights).to(value.dtype)  # (B, rows, m, tokens)
        return (base.transpose(1, 2) @ value).to(exact).sum(1)

    return scores, sums


def _vectors(call: Call) -> Products:
    """Pseudo-queries meet the pseudo-keys of the chunk."""
    exact, (g, P) = _exact(call), call.alpha_k.shape[1:]
    query = rotate_by_phase(mix(call.query.to(exact), call.alpha_q), call.query_phase, call.rotary)
    rows = call.heads_per_kv * call.pseudo_queries * call.query.shape[2]  # of a key/value head
    query = (query * call.scale).to(call.query.dtype).reshape(-1, g, rows, call.query.shape[3])

    def scores(key: Tensor) -> Tensor:
        tokens = key.shape[2]
        key = rotate_by_phase(mix(key, call.alpha_k), call.phase, call.rotary).flatten(2, 3)
        of_groups = (query @ key.mT).to(exact)  # (B, g, rows, q·tokens)
        # Flat first: to merge two dimensions torch.export compares their strides.
        return of_groups.flatten().view(-1, g * rows, P, tokens)

    def sums(weights: Tensor, value: Tensor) -> Tensor:
        value = mix(value, call.alpha_v).flatten(2, 3)
        of_groups = weights.flatten(2).unflatten(1, (g, -1)).to(value.dtype) @ value
        return of_groups.to(exact).flatten(1, 2)

    return scores, sums


def _exact(call: Call) -> torch.dtype:
    """Of scores, weights and sums."""
    return torch.promote_types(call.query.dtype, torch.float32)
